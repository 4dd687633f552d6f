"""A CLIP's ONNX folders: names, numbers and tokens as other programs read them, and embeddings equal to PyTorch's."""

import json
import re
from pathlib import Path

import clip_run
import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from nondegenerate import randomize
from open_clip import SimpleTokenizer
from torch import nn

from fmdistill import cache, export
from fmdistill.backbones.tinyvit_clip import tinyvit_clip
from fmdistill.distill.student import load_student
from fmdistill.export import checks, clip_check, clip_onnx, clip_tokenizer
from fmdistill.export.source import FinishedRun
from fmdistill.mini.clip import clip_mini_student
from fmdistill.mini.tinyvit import tinyvit_clip_mini
from fmdistill.predict import artefact
from fmdistill.predict.clip_onnx import open_artefact
from fmdistill.predict.onnx_session import Session
from fmdistill.registry import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.slow  # exporting and checking three folders takes a quarter of a minute

TEXTS = ["a photo of a red fox", "the sky, at night!", "", "un café", "a word " * 40]
WRITERS = {"immich": clip_onnx.immich, "transformers": clip_onnx.transformers, "onnx": clip_onnx.onnx}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """Make a folder with the cache of a toy CLIP and the run of a TinyViT with random weights and statistics."""
    folder = tmp_path_factory.mktemp("clip_onnx")
    clip_run.finished_tinyvit(folder)
    return folder


@pytest.fixture(scope="module")
def light(ran) -> FinishedRun:
    """A source with a student that is exported in a moment."""
    source = FinishedRun.of(ran / "run")
    return FinishedRun(source.run, source.recipe, randomize(clip_run.Student(), 1))


@pytest.fixture(scope="module")
def folders(ran) -> dict[str, Path]:
    source = FinishedRun.of(ran / "run")
    return {name: write(source, ran / "exports" / name) for name, write in WRITERS.items()}


def torch_embeddings(ran: Path, pixels: torch.Tensor, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    head = cache.open_cache(clip_run.load(ran, *clip_run.TINYVIT)).head()
    with torch.no_grad():
        return load_student(ran / "run").eval()(pixels)["embedding"].numpy(), head.encode_text(texts).numpy()


def difference(got: np.ndarray, right: np.ndarray) -> float:
    """Return the largest relative error of an embedding."""
    return float((np.linalg.norm(got - right, axis=1) / np.linalg.norm(right, axis=1)).max())


def unit(embedding: np.ndarray) -> np.ndarray:
    return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)


def signature(path: Path) -> tuple[dict, dict, int, set[str]]:
    """Inputs and outputs with their type and sides, the opset, and the files that the network's weights are in."""
    model = onnx.load(path, load_external_data=False)

    def described(values) -> dict:
        return {
            value.name: (
                onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
                [side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    external = {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
    opset = {entry.domain: entry.version for entry in model.opset_import}[""]
    return described(model.graph.input), described(model.graph.output), opset, external


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_immich_gets_its_folder_names_numbers_and_shapes(folders):
    folder = folders["immich"]
    assert files(folder) == [
        "README.md", "config.json", "fmdistill.json", "textual/model.onnx", "textual/tokenizer.json",
        "textual/tokenizer_config.json", "visual/model.onnx", "visual/preprocess_cfg.json",
    ]  # fmt: skip
    image = ({"image": ("FLOAT", [1, 3, 32, 32])}, {"embedding": ("FLOAT", [1, 24])}, 19, set())
    text = ({"text": ("INT32", [1, 16])}, {"embedding": ("FLOAT", [1, 24])}, 19, set())
    assert signature(folder / "visual/model.onnx") == image
    assert signature(folder / "textual/model.onnx") == text
    config = json.loads((folder / "config.json").read_text())
    assert config["embed_dim"] == 24 and config["text_cfg"]["context_length"] == 16
    assert config["vision_cfg"]["timm_model_name"] == "tiny_vit_5m_224"
    cfg = json.loads((folder / "visual/preprocess_cfg.json").read_text())
    assert (cfg["size"], cfg["interpolation"], cfg["resize_mode"]) == ([32, 32], "bicubic", "shortest")
    assert (cfg["mean"], cfg["std"]) == ([0.48, 0.45, 0.4], [0.26, 0.26, 0.27])
    assert json.loads((folder / "textual/tokenizer_config.json").read_text())["pad_token"] == "!"


def test_transformers_gets_its_folder_names_numbers_and_shapes(folders):
    folder = folders["transformers"]
    assert files(folder) == [
        "README.md", "config.json", "fmdistill.json", "onnx/text_model.onnx", "onnx/vision_model.onnx",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    image, text = (signature(folder / f"onnx/{tower}_model.onnx") for tower in ("vision", "text"))
    assert image[:2] == (
        {"pixel_values": ("FLOAT", ["batch", 3, 32, 32])}, {"image_embeds": ("FLOAT", ["batch", 24])}
    )  # fmt: skip
    assert text[:2] == ({"input_ids": ("INT64", ["batch", "tokens"])}, {"text_embeds": ("FLOAT", ["batch", 24])})
    assert image[2:] == text[2:] == (18, set())
    cfg = json.loads((folder / "preprocessor_config.json").read_text())
    assert (cfg["size"], cfg["crop_size"], cfg["resample"]) == ({"shortest_edge": 32}, {"height": 32, "width": 32}, 3)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"


def test_the_text_model_of_transformers_takes_any_number_of_tokens(ran, folders):
    """transformers.js pads to the longest text of a batch, and cuts a long text with its end token."""
    session, own = Session(folders["transformers"] / "onnx/text_model.onnx"), SimpleTokenizer(context_length=16)
    long = [own.sot_token_id, *own.encode("a word " * 40)]
    for text, ids in (("a word " * 40, long[:16]), ("a word " * 40, long), ("a fox", own(["a fox"])[0, :4].tolist())):
        right = torch_embeddings(ran, torch.zeros(1, 3, 32, 32), [text])[1]
        assert difference(session({"input_ids": np.array([ids])})["text_embeds"], right) < 1e-3


def test_immich_s_steps_give_the_student_s_embeddings(ran, folders):
    """A test of immich's documented contract, step by step as its service computes; its own code is not installed."""
    folder, picture = folders["immich"], PIL.Image.fromarray(checks.photographs()[1])  # 3:2
    cfg = json.loads((folder / "visual/preprocess_cfg.json").read_text())
    side = cfg["size"][0]
    resample = PIL.Image.Resampling[cfg["interpolation"].upper()]
    resized = picture.resize((int(picture.width / picture.height * side), side), resample)
    left = int(resized.width / 2 - side / 2)
    pixels = np.asarray(resized.crop((left, 0, left + side, side)), np.float32) / 255
    pixels = ((pixels - np.array(cfg["mean"])) / np.array(cfg["std"])).astype(np.float32).transpose(2, 0, 1)[None]
    got = Session(folder / "visual/model.onnx")({"image": pixels})["embedding"]

    text_cfg = json.loads((folder / "config.json").read_text())["text_cfg"]
    pad = json.loads((folder / "textual/tokenizer_config.json").read_text())["pad_token"]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
    tokenizer.enable_padding(
        length=text_cfg.get("context_length", 77), pad_token=pad, pad_id=tokenizer.token_to_id(pad)
    )
    tokenizer.enable_truncation(max_length=text_cfg.get("context_length", 77))
    ids = np.array([tokenizer.encode(TEXTS[1]).ids], np.int32)
    text = Session(folder / "textual/model.onnx")({"text": ids})["embedding"]

    predictor = open_artefact(artefact.read(folders["onnx"]))
    assert difference(got, predictor.encode_image(np.asarray(picture))) < 0.02  # int() cuts a pixel of the long side
    assert difference(text, predictor.encode_text(TEXTS[1])) < 1e-3
    assert np.allclose([np.linalg.norm(got), np.linalg.norm(text)], 1, atol=1e-5)


def test_plain_files_take_any_batch(folders):
    assert files(folders["onnx"]) == [
        "README.md", "fmdistill.json", "image.onnx", "text.onnx", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]  # fmt: skip
    assert signature(folders["onnx"] / "image.onnx")[0] == {"image": ("FLOAT", ["batch", 3, 32, 32])}
    assert signature(folders["onnx"] / "text.onnx")[0] == {"text": ("INT64", ["batch", 16])}


@pytest.mark.parametrize("format", WRITERS)
def test_embeddings_are_those_of_pytorch(ran, folders, format):
    folder = folders[format]
    model = artefact.read(folder).model
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    right_image, right_text = torch_embeddings(ran, pixels, TEXTS)
    if format == "immich":
        right_image, right_text = unit(right_image), unit(right_text)
    tokens = clip_tokenizer.tokenize(folder / model["tokenizer_files"], TEXTS, 16)
    for path, given, right in ((model["image"], pixels.numpy(), right_image), (model["text"], tokens, right_text)):
        session = Session(folder / path)
        ((name, (kind, _)),) = session.inputs.items()
        given = given.astype({"tensor(int32)": np.int32}.get(kind, given.dtype))
        size = 1 if format == "immich" else len(given)
        got = [session({name: given[i : i + size]})[session.outputs[0]] for i in range(0, len(given), size)]
        assert difference(np.concatenate(got), right) < 1e-3
    assert right_image.std(0).min() > 1e-4 and difference(right_text[:1], right_text[1:2]) > 1e-2


@pytest.mark.parametrize("format", WRITERS)
def test_a_predictor_opens_the_folder_and_embeds_pictures_and_texts(ran, folders, format):
    pictures = [checks.photographs()[i] for i in (0, 2)]
    preprocess = cache.open_cache(clip_run.load(ran, *clip_run.TINYVIT)).preprocess
    pixels, sizes = zip(*map(preprocess.prepare, pictures), strict=True)
    right_image, right_text = torch_embeddings(
        ran, preprocess.normalize(torch.stack(pixels), torch.tensor(sizes)), TEXTS
    )
    predictor = open_artefact(artefact.read(folders[format]), "cpu")
    assert difference(predictor.encode_image(pictures), unit(right_image)) < 1e-3
    assert difference(predictor.encode_text(TEXTS), unit(right_text)) < 1e-3
    odds = predictor.classify(pictures, ["fox", "owl", "tram"])
    assert odds.shape == (2, 3) and np.allclose(odds.sum(1), 1, atol=1e-5)


def test_the_code_of_the_page_classifies_a_picture(folders, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "exports_clip.md").read_text()
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "classify(" in b]
    monkeypatch.chdir(tmp_path)
    PIL.Image.fromarray(checks.photographs()[0]).save("photo.jpg")
    for format, named in [("immich", "out/immich"), ("transformers", "out/js"), ("onnx", "out/plain")]:
        assert named in code
        shown = {}
        exec(code.replace("out/immich", str(folders[format])), shown)
        assert shown["probabilities"].shape == (1, 2) and shown["probabilities"].sum() == pytest.approx(1)


def test_the_check_is_recorded(folders):
    check = artefact.read(folders["immich"]).check
    assert check["image_cosine"]["min"] > 0.99999 and check["text_cosine"]["min"] > 0.99999
    assert check["tokens_equal"] and check["pictures"] == 6 + 6 and check["texts"] == len(clip_check.TEXTS)


TOKENS = [
    "a photo of a cat", "Hello, World!!! it's THE dog's", "", "  spaces \t\n  two", "naïve café Straße", "e\u0301cole",
    "“curly” ‘quotes’ it’s", "ﬁsh ＡＢＣ　１２", "&amp;lt; &lt;b&gt; A&amp;B &quot;x&quot;",
    "日本語 한국어", "العربية हिन्दी",
    "emoji 😀👍🏽 ok", "12345 1.5kg", "<start_of_text> x <END_OF_TEXT> y",
    "word " * 200, "don't we'll they've I'd I'm",
    "a\u00a0b\u200bc", "x_y__z #tag @me http://a.b/c?d=e&f", "İstanbul",
    "¿qué? ¡sí!", "½ ² Ⅷ ①", "--- ... !!!", "! !!",
    "'s 's'S", "\ufeffbom", "A‑B–C—D", "ABC'S", "ﾊﾝｶｸ ｶﾞ", "a|b\\c",
]  # fmt: skip


@pytest.mark.parametrize("clean", ["lower", "canonicalize", "whitespace"])
def test_tokens_are_open_clips(tmp_path, clean):
    own = SimpleTokenizer(context_length=20, clean=clean)
    clip_tokenizer.write(own, {"text_cfg": {"tokenizer_kwargs": {"clean": clean}}}, tmp_path)
    texts = [text for text in TOKENS if clean == "lower" or "of_text" not in text]  # these are matched in any case
    assert np.array_equal(clip_tokenizer.tokenize(tmp_path, texts, 20), own(texts).numpy())
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # which pads and cuts by itself
    assert np.array_equal([plain.encode(text).ids for text in texts], own(texts).numpy())


@pytest.mark.parametrize("text", ["schÃ¶n", "&eacute;", "ΟΔΥΣΣΕΥΣ", "\x1b[31mred"])
def test_what_a_tokenizer_file_cannot_do_differs_as_the_documentation_says(tmp_path, text):
    own = SimpleTokenizer()
    clip_tokenizer.write(own, {"text_cfg": {}}, tmp_path)
    assert not np.array_equal(clip_tokenizer.tokenize(tmp_path, [text], 77), own([text]).numpy())


def test_a_tokenizer_that_drops_tokens_at_random_is_refused(tmp_path):
    with pytest.raises(UserError, match="reduction_mask=random: .* export with the format openclip"):
        clip_tokenizer.write(
            SimpleTokenizer(), {"text_cfg": {"tokenizer_kwargs": {"reduction_mask": "random"}}}, tmp_path
        )


def test_padding_follows_open_clip_unless_transformers_would_misread_it(folders):
    expected = {"immich": "!", "onnx": "!", "transformers": "<end_of_text>"}
    for format, pad in expected.items():
        folder = folders[format] / artefact.read(folders[format]).model["tokenizer_files"]
        assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == pad


@pytest.mark.parametrize("student", [clip_mini_student, lambda: tinyvit_clip_mini(24, 32)])
def test_mini_students_are_exported(ran, tmp_path, student):
    source = FinishedRun.of(ran / "run")
    network = randomize(student(), 3)
    out = clip_onnx.immich(FinishedRun(source.run, source.recipe, network), tmp_path / "out")
    predictor, picture = open_artefact(artefact.read(out)), checks.photographs()[1]
    pixels, size = predictor.preprocess.prepare(picture)
    with torch.no_grad():
        right = network(predictor.preprocess.normalize(pixels[None], torch.tensor([size])))["embedding"].numpy()
    assert difference(predictor.encode_image([picture]), unit(right)) < 1e-3


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_precisions_are_checked_and_open(ran, light, folders, tmp_path, precision):
    limit = {"fp16": None, "int8": 0.9}[precision]  # six images of coarse colours are a poor calibration
    out = clip_onnx.transformers(light, tmp_path / precision, precision=precision, min_cosine=limit)
    opened, suffix = artefact.read(out), {"fp16": "_fp16", "int8": "_int8"}[precision]
    assert opened.precision == precision and opened.model["image"] == f"onnx/vision_model{suffix}.onnx"
    for tower in ("image", "text"):
        least = opened.check[f"{tower}_cosine"]["min"]
        assert opened.check["min_cosine"] <= least < 1 - 1e-9
    saved = {"fp16": 0.6, "int8": 1.0}[
        precision
    ]  # int8 leaves the token embeddings, nearly all of this toy, in float32
    assert (out / opened.model["text"]).stat().st_size < saved * (folders["onnx"] / "text.onnx").stat().st_size
    assert open_artefact(opened).encode_text(TEXTS).shape == (5, 24)


def test_the_families_of_onnx_and_transformers_lead_here(ran, tmp_path):
    out = export.run(ran / "run", "onnx", tmp_path / "out", settings={"min_cosine": 0.999})
    assert artefact.read(out).kind == "clip" and artefact.read(out).check["min_cosine"] == 0.999


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("planted", [0.0, float("nan")])
def test_a_tower_that_differs_is_not_published(light, tmp_path, monkeypatch, tower, planted):
    write = clip_onnx.onnx_file.write

    def damaged(network, inputs, outputs, path, **settings):
        if path.name == f"{tower}.onnx":
            network = nn.Sequential(network, Planted(planted))
        write(network, inputs, outputs, path, **settings)

    monkeypatch.setattr(clip_onnx.onnx_file, "write", damaged)
    with pytest.raises(UserError, match=f"the {tower} tower's embeddings differ .* nothing was written") as error:
        clip_onnx.onnx(light, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    assert ("min_cosine=" in str(error.value)) == (planted == 0)
    if planted == 0:
        assert clip_onnx.onnx(light, tmp_path / "out", min_cosine=-1.0).is_dir()


class Planted(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.factor = torch.cat([torch.full((12,), value), torch.ones(12)])

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding * self.factor


def test_an_export_replaces_an_earlier_one_and_nothing_else(ran, light, folders, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("")
    with pytest.raises(UserError, match="already exists and is not an fmdistill export"):
        export.run(ran / "run", "immich", tmp_path / "other")
    out = clip_onnx.immich(light, tmp_path / "again")
    (out / "stale").write_text("")
    assert files(clip_onnx.immich(light, out)) == files(folders["immich"])


@pytest.mark.parametrize(
    ("student", "says"),
    [
        (lambda: tinyvit_clip(embed_dim=16, image_size=32), "embedding has 16, its teacher's 24"),
        (lambda: tinyvit_clip(embed_dim=24, image_size=64), "image side is 64, its teacher's 32"),
        (lambda: nn.Linear(2, 2), "embedding has None, its teacher's 24"),
    ],
)
def test_a_student_that_does_not_fit_raises_one_clear_line(ran, tmp_path, student, says):
    source = FinishedRun.of(ran / "run")
    with pytest.raises(UserError, match=says) as error:
        clip_onnx.immich(FinishedRun(source.run, source.recipe, student()), tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_run_without_a_text_tower_is_one_clear_line(tmp_path):
    sam = tiny.load(tmp_path, "train.steps=1")
    clip_run.finish(sam, tiny.Student())
    cache.run(sam)
    with pytest.raises(UserError, match="of the family 'sam' and has no text tower; immich exports runs"):
        export.run(sam.out, "immich", tmp_path / "out", trust=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_is_one_clear_line(light, tmp_path):
    out = clip_onnx.onnx(light, tmp_path / "out")
    opened = artefact.read(out)
    for name in ("image.onnx", "text.onnx", "tokenizer/tokenizer.json"):
        before = (out / name).read_bytes()
        (out / name).write_bytes(before[:-9] + b"x" * 9)
        with pytest.raises(UserError, match=f"{name}: is not the file that was exported"):
            open_artefact(opened)
        (out / name).write_bytes(before)
    assert open_artefact(opened).encode_text("a fox").shape == (1, 24)


def test_a_picture_file_is_embedded_too(ran, folders, tmp_path):
    PIL.Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    predictor = open_artefact(artefact.read(folders["immich"]))
    assert predictor.encode_image(tmp_path / "red.png").shape == (1, 24)
