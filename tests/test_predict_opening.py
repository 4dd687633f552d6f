"""load opens runs, folders and checkpoints by what they say of themselves; anything else is one line."""

import pickle
import shutil
from pathlib import Path

import clip_run
import clips
import numpy as np
import pytest
import sam_exports
import served
import timm_toys
import tiny
import torch
from nondegenerate import randomize
from PIL import Image
from safetensors.torch import save_file

import fmdistill
from fmdistill import cache
from fmdistill import recipe as recipes
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.tinyvit import TinyViTSAM
from fmdistill.backbones.tinyvit_clip import TinyViTCLIP
from fmdistill.export import mobilesam, openclip, sam_onnx
from fmdistill.export.folder import describe
from fmdistill.mini.clip import build_clip_mini, clip_mini_student
from fmdistill.mini.photos import photograph
from fmdistill.mini.sam import sam_mini_student
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.predict.clip import ClipPredictor
from fmdistill.predict.mobilesam import sam_of_state, student_sizes
from fmdistill.predict.sam import MaskPredictor, torch_predictor
from fmdistill.registry import UserError

CPU = torch.device("cpu")
MINI = {
    "embed_dim": 128, "image_embedding_size": 16, "image_size": 256, "mask_in_chans": 8, "transformer_depth": 3,
    "mlp_dim": 96, "num_heads": 4, "iou_head_hidden_dim": 48, "iou_head_depth": 2, "num_multimask_outputs": 3,
}  # fmt: skip
FULL = {
    "embed_dim": 256, "image_embedding_size": 64, "image_size": 1024, "mask_in_chans": 16, "transformer_depth": 2,
    "mlp_dim": 2048, "num_heads": 8, "iou_head_hidden_dim": 256, "iou_head_depth": 3, "num_multimask_outputs": 3,
}  # fmt: skip


def masks(predictor: MaskPredictor) -> np.ndarray:
    predictor.set_image(Image.fromarray(photograph("coffee")).resize((60, 40)))
    return predictor.predict([[20, 30]], [1], return_logits=True)[0]


def likely(predictor: ClipPredictor) -> np.ndarray:
    return predictor.classify(Image.fromarray(photograph("coffee")), ["red circle", "blue square", "green triangle"])


def test_a_mobilesam_file_of_the_quarter_scale_opens_with_its_sizes_from_its_shapes(tmp_path):
    student, head = randomize(tinyvit_sam_mini(), 1), randomize(PromptHead.from_config(MINI), 2)
    path = mobilesam.export(student, head, tmp_path / "mini.pt")
    opened = fmdistill.load(path, device="cpu")
    assert PromptHead.from_sam(opened.as_sam()).config == MINI
    assert np.array_equal(masks(opened), masks(torch_predictor(student, head, CPU)))
    torch.save({"model": torch.load(path, weights_only=True)}, tmp_path / "wrapped.pth")
    assert np.array_equal(masks(fmdistill.load(tmp_path / "wrapped.pth", device="cpu")), masks(opened))


@pytest.mark.parametrize("size", ["5m", "11m", "21m"])
def test_mobilesams_of_the_published_sizes_are_recognised(size):
    with torch.device("meta"):
        student = TinyViTSAM(f"tiny_vit_{size}_224")
    sizes = student_sizes(student.state_dict())
    assert sizes["variant"] == f"tiny_vit_{size}_224" and (sizes["image_size"], sizes["out_channels"]) == (1024, 256)
    with torch.device("meta"):
        again = TinyViTSAM(**sizes)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (student, again)]
    assert shapes[0] == shapes[1]
    settings = [[m.num_heads for m in each.modules() if hasattr(m, "num_heads")] for each in (student, again)]
    windows = [[m.window_size for m in each.modules() if hasattr(m, "window_size")] for each in (student, again)]
    assert settings[0] == settings[1] and windows[0] == windows[1] and len(windows[0]) == 10


def test_a_mobilesam_file_of_full_size_opens_with_every_weight(tmp_path):
    student, head = randomize(TinyViTSAM(), 1), randomize(PromptHead.from_config(FULL), 2)
    sam = fmdistill.load(mobilesam.export(student, head, tmp_path / "mobile_sam.pt"), device="cpu").as_sam()
    assert sam.image_encoder.img_size == 1024 and PromptHead.from_sam(sam).config == FULL
    loaded = sam.state_dict()
    for name, value in student.state_dict().items():
        assert torch.equal(loaded[f"image_encoder.student.{name}"], value)
    assert all(torch.equal(loaded[name], value) for name, value in head.state_dict().items())
    assert not any(parameter.requires_grad for parameter in sam.parameters())


def test_a_mobilesam_file_that_lacks_a_tensor_is_refused(tmp_path):
    student, head = tinyvit_sam_mini(), PromptHead.from_config(MINI)
    state = torch.load(mobilesam.export(student, head, tmp_path / "mini.pt"), weights_only=True)
    for lacking in ("image_encoder.neck.2.weight", "mask_decoder.iou_token.weight", "prompt_encoder.pe_layer"):
        less = {name: value for name, value in state.items() if not name.startswith(lacking)}
        with pytest.raises(UserError, match="^x.pt: not a MobileSAM checkpoint"):
            sam_of_state(less, "x.pt")


def test_a_run_of_a_whole_sam_or_clip_uses_its_own_head(tmp_path):
    for name, student in (("sam_mini", sam_mini_student("packaged")), ("clip_mini", clip_mini_student("packaged"))):
        recipe = recipes.load(f"recipes/mini/{name}.yaml", [f"out={tmp_path}/{name}"])
        run = clip_run.finish(recipe, student)
        opened, packaged = fmdistill.load(run, device="cpu"), fmdistill.load(packaged_file(name), device="cpu")
        predict = masks if name == "sam_mini" else likely
        assert np.array_equal(predict(opened), predict(packaged)) and np.ptp(predict(opened)) > 0
        with pytest.raises(UserError, match=f"is a part of {run}, whose recipe.yaml describes it; load the folder"):
            fmdistill.load(run / "student.safetensors")
        if name == "sam_mini":
            assert np.array_equal(masks(opened), masks(torch_predictor(student, student.head, CPU)))
        else:
            assert opened.scale == pytest.approx(float(build_clip_mini().logit_scale.detach().exp()))


def packaged_file(name: str) -> Path:
    return Path(fmdistill.__file__).parent / f"mini/weights/{name}.safetensors"


def test_without_its_cache_a_run_takes_the_head_of_its_teacher(tmp_path, caplog):
    (run,) = served.sam_runs(tmp_path, "run")
    before = masks(fmdistill.load(run, device="cpu", trust=True))
    shutil.rmtree(tmp_path / "cache")
    assert np.array_equal(masks(fmdistill.load(run, device="cpu", trust=True)), before)
    assert "the head is taken from the teacher" in caplog.text
    saved = Path(run) / "recipe.yaml"
    saved.write_text(saved.read_text().replace("tiny:teacher", "sam_vit_b"))
    with pytest.raises(UserError, match="neither from its cache .*no cache here.* nor from the teacher .*not set"):
        fmdistill.load(run, device="cpu", trust=True)


def test_an_exported_open_clip_folder_opens(tmp_path):
    whole = clip_mini_student("packaged")
    folder = openclip.export_whole(whole, tmp_path / "clip")
    expected = likely(fmdistill.load(packaged_file("clip_mini"), device="cpu"))
    assert np.allclose(likely(fmdistill.load(folder, device="cpu")), expected, atol=1e-6)
    describe(folder, kind="clip", format="openclip", precision="fp32", model={"runtime": "torch"}, check={}, source={})
    assert np.allclose(likely(fmdistill.load(folder, device="cpu")), expected, atol=1e-6)
    with pytest.raises(
        UserError, match="open_clip_model.safetensors: is a part of .*clip, whose open_clip_config.json"
    ):
        fmdistill.load(folder / "open_clip_model.safetensors")
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="is not the file that was exported"):
        fmdistill.load(folder, device="cpu")


def test_an_open_clip_folder_with_a_tinyvit_tower_opens(tmp_path):
    student = randomize(TinyViTCLIP(embed_dim=24, image_size=32), 1)
    teacher = clips.teacher()
    folder = openclip.export(student, teacher.head(), teacher.preprocess, tmp_path / "tinyvit")
    image = Image.fromarray(photograph("coffee"))
    pixels, size = teacher.preprocess.prepare(image)
    with torch.no_grad():
        expected = student(teacher.preprocess.normalize(pixels[None], torch.tensor([size])))["embedding"]
    embedding = fmdistill.load(folder, device="cpu").encode_image(image)
    assert np.allclose(embedding, torch.nn.functional.normalize(expected).numpy(), atol=1e-5)


class Bomb:
    """A pickle that creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_is_no_whole_sam_or_clip_is_one_line_and_runs_nothing(tmp_path):
    torch.save({"w": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    (tmp_path / "text.pt").write_text("these are no weights\n")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "network.onnx").write_bytes(b"\x08\x0aonnx")
    shutil.copy(tmp_path / "network.onnx", tmp_path / "network.pt")
    save_file({name: value for name, value in tinyvit_sam_mini().state_dict().items()}, tmp_path / "half.safetensors")
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({"visual.conv1.weight": torch.ones(2), "logit_scale": torch.ones(1)}, tmp_path / "clip.safetensors")
    save_file({"image_encoder.pos_embed": torch.ones(1, 4, 4, 48)}, tmp_path / "small.safetensors")
    save_file({"image_encoder.pos_embed": torch.ones(1, 64, 64, 768)}, tmp_path / "vit_b.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "sam_vit_b_01ec64.pth")
    for name, says in {
        "bomb.pt": "not a readable checkpoint of plain tensors .*nothing in it was executed",
        "old.pt": "not a readable checkpoint of plain tensors",
        "text.pt": "not a readable checkpoint of plain tensors",
        "empty.pt": "not a readable checkpoint of plain tensors",
        "network.pt": "not a readable checkpoint of plain tensors",
        "network.onnx": "an ONNX file alone does not say how to use it; load the folder",
        "half.safetensors": "a student without its teacher's head; load the run",
        "other.safetensors": "neither a SAM nor a CLIP, its first tensor is 'conv.weight'",
        "clip.safetensors": "weights of an open_clip model, without its sizes",
        "small.safetensors": "contains a SAM of unknown size",
        "vit_b.safetensors": "not a SAM vit_b checkpoint, it lacks 'image_encoder",
        "sam_vit_b_01ec64.pth": "sha256 is .*damaged or incomplete",
    }.items():
        with pytest.raises(UserError, match=says) as raised:
            fmdistill.load(tmp_path / name, device="cpu")
        assert str(raised.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()
    Bomb(tmp_path / "ran").__reduce__()[0](tmp_path / "ran")
    assert (tmp_path / "ran").exists()  # so the bomb is live


def test_a_folder_that_is_not_one_of_ours_is_one_line(tmp_path):
    for name in ("empty", "other", "coreml", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/readme.txt").touch()
    (tmp_path / "broken/open_clip_config.json").write_text("{")
    (tmp_path / "coreml/a.bin").touch()
    about = {"precision": "fp16", "check": {}, "source": {}}
    describe(tmp_path / "coreml", kind="sam", format="coreml", model={"runtime": "coreml"}, **about)
    for name, says in {
        "missing": "missing: no such file or folder; name a finished run",
        "empty": "empty: is empty; name a finished run",
        "other": "other: has no fmdistill.json, recipe.yaml or open_clip_config.json",
        "broken": "broken: not a readable open_clip folder",
        "coreml": "coreml: its format 'coreml' runs in coreml, which load does not open",
    }.items():
        with pytest.raises(UserError, match=f"^{tmp_path}/{says}"):
            fmdistill.load(tmp_path / name, device="cpu")
    with pytest.raises(UserError, match="device=gpu: not a device"):
        fmdistill.load(tmp_path, device="gpu")


def test_a_run_that_cannot_predict_is_one_line(tmp_path):
    recipe = tiny.load(tmp_path)
    recipes.save(recipe, recipe.out)
    with pytest.raises(UserError, match="names code outside fmdistill .* add trust=true"):
        fmdistill.load(recipe.out)
    with pytest.raises(UserError, match="run: not finished, it has no student.safetensors"):
        fmdistill.load(recipe.out, trust=True)
    cache.run(recipe)
    with pytest.raises(UserError, match="cache: is a cache of teacher outputs"):
        fmdistill.load(tmp_path / "cache")
    alone = tiny.load(tmp_path, "teacher=null", "cache=null", f"out={tmp_path}/alone")
    run = clip_run.finish(alone, tiny.Student())
    with pytest.raises(UserError, match="alone: its student is a Student, without a mask decoder or a text tower"):
        fmdistill.load(run, trust=True)


def test_a_student_of_a_teacher_without_a_head_is_refused(tmp_path):
    timm_toys.write_job(tmp_path)
    recipe = timm_toys.load(tmp_path)
    cache.run(recipe)
    run = clip_run.finish(recipe, torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="its teacher is of the family 'timm', without a mask decoder or a text tower"):
        fmdistill.load(run, trust=True)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_an_exported_onnx_folder_of_a_sam_opens_with_the_same_calls(onnx_export, device):
    student, head, folder = onnx_export
    opened = fmdistill.load(folder, device=device)
    expected, actual = masks(torch_predictor(student, head, CPU)), masks(opened)
    assert actual.shape == expected.shape and np.allclose(actual, expected, atol=1e-2 * np.ptp(expected))
    with pytest.raises(UserError, match="encoder.onnx: is a part of .*, whose fmdistill.json describes it"):
        fmdistill.load(folder / "encoder.onnx")


@pytest.fixture(scope="module")
def onnx_export(tmp_path_factory):
    """The quarter-scale student, its teacher's head, and the folder of their ONNX export."""
    student, head = sam_exports.mini()
    out = tmp_path_factory.mktemp("onnx") / "out"
    return student, head, sam_onnx.write(sam_exports.export(student, head, "onnx", False), out, "fp32", 0.999)
