"""timm teachers against timm's own loop: transform, model, patch tokens, weights by file, and what is refused."""

import io
import math

import clip_run
import numpy as np
import PIL.Image
import pytest
import timm
import timm_toys
import torch
from nondegenerate import randomize
from safetensors.torch import save_file

from fmdistill import teachers
from fmdistill.cache.manifest import claim
from fmdistill.registry import UserError
from fmdistill.teachers import timm as family
from fmdistill.teachers.output import Output
from fmdistill.teachers.timm import TimmPreprocess, as_map

KINDS = sorted(timm_toys.TOYS)


def pictures() -> list[PIL.Image.Image]:
    """Three photograph-like pictures of different shapes, one of them gray."""
    opened = [PIL.Image.open(io.BytesIO(clip_run.picture(seed))).convert("RGB") for seed in range(2)]
    rng = np.random.default_rng(0)
    gray = PIL.Image.fromarray(rng.integers(0, 256, (9, 7), dtype=np.uint8)).resize((70, 90))
    return [*opened, gray]


def build(folder, kind, **settings):
    made = {"name": "timm", "model": timm_toys.write(folder / kind, kind), "device": "cpu", **settings}
    return teachers.build(made)


def prepared(teacher) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, sizes = zip(*(teacher.preprocess.prepare(picture) for picture in pictures()), strict=True)
    return torch.stack(pixels), torch.tensor(sizes)


def plainly(model, **changes) -> torch.Tensor:
    """Return the inputs that timm's documentation makes for a model: its data config and its transform."""
    config = {**timm.data.resolve_model_data_config(model), **changes}
    transform = timm.data.create_transform(**config, is_training=False)
    return torch.stack([transform(picture.convert("RGB")) for picture in pictures()])


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_timm_s_own_loop(kind, tmp_path):
    teacher = build(tmp_path, kind)
    plain = timm.create_model(f"local-dir:{tmp_path / kind}", pretrained=True, num_classes=0).eval()
    image = plainly(plain)
    pixels, sizes = prepared(teacher)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous() and teacher.preprocess.valid(sizes).all()
    torch.testing.assert_close(teacher.preprocess.normalize(pixels, sizes), image, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        expected = plain(image)
    made = teacher(pixels, sizes)
    assert made.keys() == {"embedding"} and teacher.outputs == {"embedding": Output(tuple(expected.shape[1:]))}
    assert made["embedding"].dtype == torch.float32 and expected.std(0).min() > 1e-3
    torch.testing.assert_close(made["embedding"], expected, atol=1e-5, rtol=1e-5)
    reference = family.FAMILY.reference(teacher)
    assert reference
    torch.testing.assert_close(
        reference.embed([picture.convert("RGB") for picture in pictures()]), expected, atol=1e-5, rtol=1e-5
    )
    assert reference.flops() > 0


@pytest.mark.parametrize(("kind", "shape"), [("dinov3", (32, 4, 4)), ("siglip", (32, 4, 4)), ("convnext", (32, 2, 2)),
                                             ("swin", (128, 2, 2))])  # fmt: skip
def test_tokens_are_timm_s_own_last_map(kind, shape, tmp_path):
    teacher = build(tmp_path, kind, tokens=True)
    assert teacher.outputs["tokens"] == Output(shape, "all")
    assert teacher.preprocess.stride == timm_toys.TOYS[kind][2] // shape[1]
    pixels, sizes = prepared(teacher)
    with torch.no_grad():
        final, (expected,) = teacher.model.forward_intermediates(
            teacher.preprocess.normalize(pixels, sizes), indices=1, norm=True
        )
    made = teacher(pixels, sizes)["tokens"]
    assert made.is_contiguous() and expected.std(0).min() > 1e-4
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert teacher.preprocess.valid(sizes).shape == (3, *shape[1:])


def test_the_pool_of_dinov3_may_be_its_class_token(tmp_path):
    own, token = build(tmp_path, "dinov3"), build(tmp_path, "dinov3", pool="token")
    pixels, sizes = prepared(own)
    with torch.no_grad():
        features = own.model.forward_features(own.preprocess.normalize(pixels, sizes))
    torch.testing.assert_close(own(pixels, sizes)["embedding"], features[:, 5:].mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(token(pixels, sizes)["embedding"], features[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "side"), [("dinov3", 48), ("siglip", 48), ("convnext", 96)])
def test_another_image_side_is_what_timm_makes_of_it(kind, side, tmp_path):
    teacher = build(tmp_path, kind, image_size=side, tokens=True)
    sized = {"img_size": side} if kind != "convnext" else {}
    plain = timm.create_model(f"local-dir:{tmp_path / kind}", pretrained=True, num_classes=0, **sized).eval()
    pixels, sizes = prepared(teacher)
    image = plainly(plain, input_size=(3, side, side))
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixels, sizes)["embedding"], plain(image), atol=1e-5, rtol=1e-5)
    grid = side // teacher.preprocess.stride
    assert teacher.outputs["tokens"].shape[1:] == (grid, grid) and pixels.shape[2:] == (side, side)


def test_a_name_is_built_as_timm_builds_it(tmp_path):
    torch.manual_seed(3)
    teacher = teachers.build({"name": "timm", "model": "test_vit", "pretrained": "false", "device": "cpu"})
    torch.manual_seed(3)
    plain = timm.create_model("test_vit", num_classes=0).eval()
    pixels, sizes = prepared(teacher)
    with torch.no_grad():
        expected = plain(plainly(plain))
    torch.testing.assert_close(teacher(pixels, sizes)["embedding"], expected, atol=1e-5, rtol=1e-5)
    drawn = family.FAMILY.random_weights({"name": "timm", "model": "test_vit", "image_size": 96}, tmp_path)
    assert teachers.build({**drawn, "device": "cpu"}).preprocess.image_size == 96


def test_a_file_s_wrappers_classifier_and_names_are_converted(tmp_path):
    model = timm_toys.model("dinov3", num_classes=7)
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "own.pth")
    meta = {k.replace("reg_token", "storage_tokens"): v for k, v in model.state_dict().items()}  # Meta's names
    meta = {k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for k, v in meta.items()}
    save_file({k: v for k, v in meta.items() if not k.startswith("head.")}, tmp_path / "meta.safetensors")
    for name in ("own.pth", "meta.safetensors"):
        loaded = timm_toys.model("dinov3", seed=9)
        family.load_weights(loaded, tmp_path / name, "teacher.pretrained=x")
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), (name, key)


def test_names_that_do_not_fit_are_told(tmp_path):
    path, whole = tmp_path / "x.safetensors", timm_toys.model("dinov3").state_dict()
    for changed, told in (
        ({k: v for k, v in whole.items() if k != "norm.bias"}, r"norm\.bias is missing;"),
        ({**whole, "blocks.9.norm1.bias": torch.ones(32)}, r"blocks\.9\.norm1\.bias is not the model's"),
        ({**whole, "norm.bias": torch.ones(31)}, r"norm\.bias is \(31,\), not \(32,\)"),
        ({"a": torch.ones(1)}, r"cls_token is missing, .* and \d+ more"),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=rf"teacher\.pretrained=x: does not fit the model: {told}"):
            family.load_weights(timm_toys.model("dinov3"), path, "teacher.pretrained=x")


def refused(message: str, **settings) -> None:
    with pytest.raises(UserError, match=message) as caught:
        teachers.build({"name": "timm", "device": "cpu", **settings})
    assert "\n" not in str(caught.value)


def test_what_cannot_be_a_teacher_is_one_line(tmp_path, monkeypatch):
    refused(r"none of timm's 1,\d+ models\. Did you mean 'vit_small_patch16_dinov3'\?", model="vit_smal_patch16_dinov3")
    refused(r"teacher\.model=zzz.*Known: none", model="zzzzzzzz")
    refused(r"has no weights 'lvd1690m'\. Did you mean 'lvd1689m'", model="vit_small_patch16_dinov3.lvd1690m")
    refused(r"no timm model in that folder; it needs config\.json", model=f"local-dir:{tmp_path}")
    refused(r"teacher\.pretrained=none\.pth: no such file", model="test_vit", pretrained="none.pth")
    refused(r"timm has no weights of coatnet_0_224;", model="coatnet_0_224")
    refused(r"teacher\.pool='tokn': unknown", model="test_vit", pretrained=False, pool="tokn")
    refused(r"timm cannot build it with .*'global_pool': 'map'", model="resnet18", pretrained=False, pool="map")
    refused(r"teacher\.batch=0: expected 1 or more", model="test_vit", batch=0)

    def offline(*given, pretrained=False, **rest):
        raise OSError("We couldn't connect to the hub\nand more")

    monkeypatch.setattr(family, "create_model", offline)
    refused(r"could not load the weights of test_vit \(OSError: We couldn't .* set teacher\.pretrained=FILE",
            model="test_vit")  # fmt: skip


def test_tokens_without_a_square_grid_are_refused(tmp_path):
    class Flat(torch.nn.Module):
        num_features, pretrained_cfg = 4, {"input_size": (3, 8, 8)}  # noqa: RUF012

        def forward_features(self, x):
            return torch.ones(len(x), 4, 2, 3)

        def forward_head(self, x, pre_logits):
            return x.mean((2, 3))

    settings = {"kind": "flat", "device": "cpu", "dtype": "fp32", "batch": 1, "workers": 0}
    assert family.TimmTeacher(Flat(), **settings).preprocess.stride == 8
    with pytest.raises(UserError, match=r"teacher\.tokens=true: its features \(4, 2, 3\) are no square grid"):
        family.TimmTeacher(Flat(), tokens=True, **settings)
    Flat.pretrained_cfg = {"input_size": (3, 8, 16)}
    with pytest.raises(UserError, match=r"sees 3 x 8 x 16, not RGB squares"):
        family.TimmTeacher(Flat(), **settings)
    refused(r"gives no features of a 8 x 8 image", model="vit_small_patch16_dinov3", pretrained=False, image_size=8)


def test_layouts_are_told_by_the_model_or_by_its_width():
    class Model:
        num_features = 6

    assert as_map(Model(), torch.ones(1, 3, 4, 6)).shape == (1, 6, 3, 4)
    assert as_map(Model(), torch.ones(1, 6, 3, 4)).shape == (1, 6, 3, 4)
    assert as_map(Model(), torch.ones(1, 6, 6, 6)).shape == (1, 6, 6, 6)
    assert as_map(Model(), torch.ones(1, 9, 6)) is None


def test_a_description_opens_as_it_was_and_no_other_does():
    own = TimmPreprocess(32, 8, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1), "lanczos", 0.9, "border")
    assert TimmPreprocess.from_json(own.to_json()) == own
    for change in ({"interpolation": "random"}, {"crop_mode": "none"}, {"stride": 0}, {"extra": 1}, {"name": "clip"},
                   {"crop_pct": math.nan}, {"mean": [0.5]}, {"mean": None}, {"image_size": "32"}):  # fmt: skip
        with pytest.raises(UserError):
            TimmPreprocess.from_json({**own.to_json(), **change})


def test_settings_tell_what_they_can_of_the_identity(tmp_path):
    teacher = build(tmp_path, "dinov3")
    settings = {"name": "timm", "model": f"local-dir:{tmp_path / 'dinov3'}"}
    stored = teacher.fingerprint()
    told = teachers.identity(settings, stored)
    assert told.items() <= stored.items() and told["model"] == "local-dir"
    assert teachers.identity({**settings, "image_size": 32}, stored)["preprocess"] == stored["preprocess"]
    for change in ({"image_size": 48}, {"tokens": True}, {"pool": "token"}, {"model": "test_vit"}):
        assert not teachers.identity({**settings, **change}, stored).items() <= stored.items(), change
    assert teachers.weights_file(settings) == tmp_path / "dinov3/model.safetensors"
    assert teachers.weights_file({"name": "timm", "model": "test_vit", "pretrained": "a.pth"}).name == "a.pth"
    for none in ({}, {"pretrained": False}, {"pretrained": "none"}):
        assert teachers.weights_file({"name": "timm", "model": "test_vit", **none}) is None
    rest = {"family": "timm", "head": False, "outputs": {}, "images": {}}
    claim(tmp_path, {**rest, "teacher": stored})
    randomize(teacher.model, 5)
    with pytest.raises(UserError, match="this cache is another one"):
        claim(tmp_path, {**rest, "teacher": teacher.fingerprint()})
