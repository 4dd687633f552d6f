"""Students on any backbone of timm: their shapes, their weights, and ten of them from training to an opened export."""

import numpy as np
import pytest
import timm
import tiny
import torch
from nondegenerate import randomize
from open_clip.timm_model import TimmModel
from safetensors.torch import save_file
from torch.nn import functional as F

import fmdistill
from fmdistill import cache, distill, evaluate, export
from fmdistill.backbones.timm_clip import TimmCLIP, timm_clip
from fmdistill.backbones.timm_model import without_drop_path
from fmdistill.backbones.timm_sam import timm_sam
from fmdistill.distill.student import load_student
from fmdistill.export import timm_checkpoint
from fmdistill.mini.photos import photograph
from fmdistill.registry import UserError
from fmdistill.teachers.timm import TimmPreprocess

TEN = ["repvit_m0_9", "efficientvit_b0", "fastvit_t8", "mobilenetv4_conv_small", "convnext_atto",
       "efficientformerv2_s0", "vit_tiny_patch16_224", "edgenext_xx_small", "starnet_s1", "resnet10t"]  # fmt: skip
SMALL = {"image_size": 64, "out_channels": 32}


@pytest.mark.slow
@pytest.mark.parametrize("model", TEN)
def test_a_backbone_is_trained_judged_exported_and_opened(model, tmp_path):
    (tmp_path / "grid.yaml").write_text("{name: grid_miou, grids: [2], images: 2}")
    student = [f"student.model={model}", *(f"student.{name}={value}" for name, value in SMALL.items())]
    recipe = tiny.load(tmp_path, "student.name=timm_sam", *student, "train.steps=20", "train.log_every=1")
    cache.run(recipe)
    distill.run(recipe)
    trained = load_student(recipe.out, trust=True)
    assert all(p.isfinite().all() for p in trained.parameters())
    losses = [row["loss"] for row in fmdistill.logs.read_json_lines(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5])
    rows = evaluate.run(tmp_path / "grid.yaml", recipe.out, ["trust=true"])
    assert 0 <= evaluate.results.value(rows, "miou", grid="2x2") <= 1
    out = export.run(recipe.out, "onnx", tmp_path / "out", trust=True)
    predictors = [fmdistill.load(recipe.out, trust=True), fmdistill.load(out)]
    picture, masks = photograph("coffee"), []
    for predictor in predictors:
        predictor.set_image(picture)
        masks.append(predictor.predict([[300, 200]], [1])[2])
    assert np.abs(masks[0] - masks[1]).max() < 1e-3 * np.abs(masks[0]).max()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["repvit_m1_1", "efficientvit_b1"])
def test_at_sam_s_size_the_embedding_is_256x64x64_and_two_steps_lower_the_loss(model):
    torch.manual_seed(0)
    student = timm_sam(model).train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    image, target, losses = torch.randn(1, 3, 1024, 1024), torch.randn(1, 256, 64, 64), []
    for _ in range(3):
        embedding = student(image)["embedding"]
        assert embedding.shape == (1, 256, 64, 64)
        losses.append(F.mse_loss(embedding, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model", ["repvit_m0_9", "mambaout_femto", "vit_tiny_patch16_224"])
def test_the_embedding_is_the_neck_of_the_sum_of_timm_s_own_feature_maps(model):
    student = randomize(timm_sam(model, **SMALL)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = student.trunk(image)
        if model == "mambaout_femto":  # a backbone with channels last
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        assert [m.shape[-1] for m in maps] == ([4] if model.startswith("vit") else [4, 2])
        summed = sum(
            F.interpolate(lateral(m), (4, 4), mode="bilinear") for lateral, m in zip(student.lateral, maps, strict=True)
        )
        assert torch.allclose(student(image)["embedding"], student.neck(summed), atol=1e-5)


def test_a_smaller_input_is_resized_inside_and_the_embedding_stays_on_the_teacher_s_grid():
    student = randomize(timm_sam("repvit_m0_9", input_size=32, **SMALL)).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        embedding = student(image)["embedding"]
        assert embedding.shape == (2, 32, 4, 4)
        small = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
        assert torch.equal(student(small)["embedding"], embedding)


def test_weights_start_from_a_file_under_timm_s_names(tmp_path):
    reference = randomize(timm.create_model("repvit_m0_9"), 5)
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    student = timm_sam("repvit_m0_9", **SMALL, pretrained=str(tmp_path / "weights.safetensors"))
    tower = timm_clip("repvit_m0_9", 16, 64, pretrained=str(tmp_path / "weights.safetensors"))
    stem = reference.stem.conv1.c.weight
    assert torch.equal(dict(student.trunk.named_parameters())["stem.conv1.c.weight"], stem)
    assert torch.equal(tower.trunk.stem.conv1.c.weight, stem)


@pytest.mark.parametrize("model", ["repvit_m0_9", "vit_tiny_patch16_224", "fastvit_t8"])
def test_a_clip_tower_equals_open_clip_s_bit_by_bit(model):
    student = randomize(timm_clip(model, embed_dim=24)).eval()
    reference = TimmModel(model, 24, 224, pool="avg", proj="linear").eval()
    reference.load_state_dict(student.state_dict(), strict=True)
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(student(image)["embedding"], reference(image))
    assert (student.timm_name, student.image_size, student.out_channels) == (model, 224, 24)


def test_a_fixed_size_is_passed_to_timm_and_such_a_tower_has_no_name_in_open_clip():
    student = timm_clip("vit_tiny_patch16_224", embed_dim=8, image_size=64)
    assert student(torch.randn(1, 3, 64, 64))["embedding"].shape == (1, 8)
    assert (student.timm_name, student.trunk_settings) == (None, {"img_size": 64})


def test_stochastic_depth_is_off():
    network = without_drop_path(timm.create_model("convnext_atto", drop_path_rate=0.5)).train()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(image), network(image))


def test_the_timm_format_is_written_only_if_timm_s_own_model_gives_the_embedding(tmp_path):
    preprocess = TimmPreprocess(64, 64, (0.5, 0.4, 0.3), (0.3, 0.25, 0.2), "bilinear", 0.9, "squash")
    student = randomize(TimmCLIP("convnext_atto", 8, 64)).eval()
    out = timm_checkpoint.export(student, preprocess, tmp_path / "convnext.safetensors")
    model = timm.create_model("convnext_atto", num_classes=8, checkpoint_path=str(out)).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(model(image), student(image)["embedding"], atol=1e-5)
    for name, reason in (("vit_tiny_patch16_224", "pools its features in another way"), ("repvit_m0_9", "loading")):
        with pytest.raises(UserError, match=f"timm's {name} with one classifier does not give .*{reason}"):
            timm_checkpoint.export(randomize(timm_clip(name, 8, 64)), preprocess, tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm_sam("repvit_m11"), "student.model=repvit_m11: timm has no such model"),
        (
            lambda: timm_sam("repvit_m1_1.dist_300e_in1k"),
            "repvit_m1_1 student.pretrained=dist_300e_in1k",
        ),
        (lambda: timm_sam("repvit_m1_1", pretrained="in1k"), "neither a file .* nor a timm tag of repvit_m1_1"),
        (lambda: timm_sam("repvit_m1_1", pretrained="a/b.pth"), "student.pretrained=a/b.pth: no such file"),
        (lambda: timm_sam("repvit_m1_1", input_size=500), "student.input_size=500: expected a multiple of 32"),
        (lambda: timm_sam("repvit_m1_1", image_size=100), "student.image_size=100: expected a multiple of 16"),
        (lambda: timm_clip("mobilenetv4_conv_small"), "has a hidden layer of 1280 before its classifier"),
        (lambda: timm_clip("repvit_m1_1", embed_dim=0), "student.embed_dim=0"),
    ],
)
def test_what_timm_does_not_have_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_backbone_without_feature_maps_is_refused(monkeypatch):
    def refuse(*args, **settings):
        raise RuntimeError("features_only not implemented")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UserError, match="student.model=resnet18: timm gives no feature maps of it at 64 px .*not impl"):
        timm_sam("resnet18", **SMALL)
