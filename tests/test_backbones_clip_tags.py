"""Values for a CLIP's file come from its tag, or from all tags of its model if they agree; else they must be set."""

import copy
import io
import json

import clips
import open_clip
import pytest
import torch
from nondegenerate import randomize
from open_clip import factory, pretrained
from PIL import Image
from safetensors.torch import save_file

from fmdistill import teachers
from fmdistill.backbones.clip_tags import NOTHING_SET, ClipSettings, file_values
from fmdistill.registry import UserError
from fmdistill.teachers import build as build_teacher
from fmdistill.teachers import check
from fmdistill.teachers.clip import clip_settings, identity
from fmdistill.teachers.clip import open_clip as build

KEYS = ("mean", "std", "interpolation", "resize_mode")
CONFIG = {key: value for key, value in clips.MODEL_CFG.items() if key != "quick_gelu"}
MOBILE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "shortest"}
SQUASHED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.4, 0.3), "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A checkpoint of the toy model; models with agreeing, torn and no (bare) tags, and one with QuickGELU on."""
    path = tmp_path / "toy.safetensors"
    state = randomize(open_clip.CLIP(**CONFIG), 2).state_dict()
    save_file(state, path)
    torch.save(
        {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 1}, tmp_path / "wrapped.pt"
    )
    tags = {
        "agreeing": {"alpha": MOBILE, "beta": dict(MOBILE)},
        "torn": {"alpha": MOBILE, "beta": {**SQUASHED, "quick_gelu": True}, "gamma": MOBILE},
        "on": {"alpha": {**SQUASHED, "quick_gelu": True}},
    }
    for name in ("agreeing", "torn", "bare", "on"):
        config = {**copy.deepcopy(CONFIG), **({"quick_gelu": True} if name == "on" else {})}
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, config)
    for name, known in tags.items():
        monkeypatch.setitem(pretrained._PRETRAINED, name, {k: {**v, "file": str(path)} for k, v in known.items()})
    return path


def made(model: str, weights, **settings):
    return build(model, str(weights), device="cpu", dtype="fp32", **settings)


def differ_by_open_clip_s_table(name: str) -> set[str]:
    """Return the values in which the tags of a model differ, by open_clip's own table."""
    known, quick = pretrained._PRETRAINED.get(name, {}), open_clip.get_model_config(name).get("quick_gelu", False)
    differing = {key for key in KEYS if len({tag[key] for tag in known.values()}) > 1}
    activations = {bool(tag.get("quick_gelu")) or quick for tag in known.values()}
    return differing | ({"quick_gelu"} if len(activations) > 1 else set())


def test_every_model_of_open_clip_uses_the_values_its_tags_agree_on_and_requires_the_others():
    requiring = []
    for name in open_clip.list_models():
        config, differing = open_clip.get_model_config(name), differ_by_open_clip_s_table(name)
        if differing:
            requiring.append(name)
            with pytest.raises(UserError) as error:
                file_values(name, "w.pt", config, NOTHING_SET, False)
            text = str(error.value)
            assert "teacher.as_tag=TAG" in text and "\n" not in text and len(text) < 800
            assert {key for key in (*KEYS, "quick_gelu") if f"teacher.{key}=VALUE" in text} == differing
            continue
        values, line = file_values(name, "w.pt", config, NOTHING_SET, False)
        for tag in pretrained._PRETRAINED.get(name, {}).values():
            assert all(values[key] == tag[key] for key in KEYS), name
            assert values["quick_gelu"] == (bool(tag.get("quick_gelu")) or config.get("quick_gelu", False))
        assert "\n" not in line and f"mean={list(values['mean'])}" in line
    assert {"ViT-B-32", "ViT-L-14", "ViT-H-14"} <= set(requiring)
    values, line = file_values("MobileCLIP-S1", "w.pt", open_clip.get_model_config("MobileCLIP-S1"), NOTHING_SET, False)
    assert values == {**MOBILE, "quick_gelu": False} and "only tag (datacompdr)" in line


@pytest.mark.slow
def test_a_file_makes_the_same_teacher_as_its_tag(file, caplog):
    """By the values all tags agree on; by `as_tag`; by every value alone; and as open_clip itself builds it."""
    picture = Image.open(io.BytesIO(clips.picture(3, (60, 40)))).convert("RGB")
    for model, tag, settings in (
        ("agreeing", "beta", {}),
        ("torn", "beta", {"as_tag": "beta"}),
        ("torn", "gamma", {"as_tag": "gamma"}),
        ("torn", "beta", {**SQUASHED, "quick_gelu": True}),
        ("torn", "beta", {"as_tag": "alpha", **SQUASHED, "quick_gelu": True}),
        ("on", "alpha", {}),
    ):
        own, _, transform = open_clip.create_model_and_transforms(model, pretrained=tag)
        if tag == "beta" and model == "torn":  # open_clip only warns
            own, _, transform = open_clip.create_model_and_transforms(model, pretrained=tag, force_quick_gelu=True)
        for weights in (file, file.with_name("wrapped.pt")):
            with caplog.at_level("INFO"):
                caplog.clear()
                teacher = made(model, weights, **settings)
            lines = [m for m in caplog.messages if "teacher.KEY=VALUE" in m]
            assert len(lines) == 1 and lines[0].startswith(f"teacher.pretrained={weights}: ")
            assert teacher.fingerprint() == made(model, tag).fingerprint()
            pixels, size = teacher.preprocess.prepare(picture)
            with torch.no_grad():
                expected = own.eval().encode_image(transform(picture)[None])
            assert torch.allclose(teacher(pixels[None], torch.tensor([size]))["embedding"], expected, atol=1e-5)


def test_a_tag_and_an_untrained_model_keep_their_own_values(file, caplog):
    with caplog.at_level("INFO"):
        assert made("torn", "beta").fingerprint()["quick_gelu"] is True
        assert made("torn", "none").fingerprint()["preprocess"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
        assert made("torn", "none", as_tag="alpha").fingerprint()["preprocess"]["mean"] == [0, 0, 0]
    assert not [m for m in caplog.messages if "teacher.KEY=VALUE" in m]


def test_tags_that_differ_raise_before_the_weights_are_read(file):
    file.write_bytes(b"no tensors at all")
    with pytest.raises(UserError) as error:
        made("torn", file)
    for says in (
        "mean is [0.0, 0.0, 0.0] for alpha, gamma, [0.5, 0.5, 0.5] for beta",
        "quick_gelu is false for alpha, gamma, true for beta",
        "Set teacher.as_tag=TAG",
        "teacher.mean=VALUE teacher.std=VALUE teacher.interpolation=VALUE teacher.resize_mode=VALUE",
    ):
        assert says in str(error.value)
    given = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}
    with pytest.raises(UserError, match=r"differ: resize_mode is .*; quick_gelu is .*teacher\.quick_gelu=VALUE$"):
        made("torn", file, **given)
    with pytest.raises(UserError, match="not a readable checkpoint of plain tensors"):
        made("torn", file, **given, resize_mode="squash", quick_gelu=False)


def test_a_model_without_tags_uses_open_clip_s_defaults_and_logs_it(file, caplog):
    with caplog.at_level("INFO"):
        fingerprint = made("bare", file).fingerprint()
    assert fingerprint["preprocess"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert fingerprint["quick_gelu"] is False
    assert "by open_clip's defaults, since bare has no tag" in caplog.text


def test_each_setting_changes_the_teacher_s_identity(file):
    plain = made("agreeing", file).fingerprint()
    for settings, place in (
        ({"mean": (0.1, 0.2, 0.3)}, "preprocess"),
        ({"std": (0.1, 0.2, 0.3)}, "preprocess"),
        ({"interpolation": "bicubic"}, "preprocess"),
        ({"resize_mode": "squash"}, "preprocess"),
        ({"quick_gelu": True}, "quick_gelu"),
    ):
        other = made("agreeing", file, **settings).fingerprint()
        assert {key for key in plain if other[key] != plain[key]} == {place}
        # the settings alone state it, even if the file is gone
        assert {
            **plain,
            **identity({"name": "open_clip", "model": "agreeing", **settings}, plain),
            "name": "open_clip",
        } == other
    assert {**plain, **identity({"name": "open_clip", "model": "agreeing"}, plain)} == plain
    assert plain["context_length"] == 16 and plain["tokenizer"] == "simple"
    torn = made("torn", file, as_tag="beta").fingerprint()
    alpha = made("torn", file, as_tag="alpha").fingerprint()
    assert {**torn, **identity({"name": "open_clip", "model": "torn", "as_tag": "alpha"}, torn)} == alpha != torn


def test_quick_gelu_that_a_name_turns_on_can_be_turned_off(file):
    off, on = made("on", file, quick_gelu=False), made("on", file)
    assert off.fingerprint()["quick_gelu"] is False and on.fingerprint()["quick_gelu"] is True
    pixels, sizes = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([[32, 32]] * 2)
    assert (off(pixels, sizes)["embedding"] - on(pixels, sizes)["embedding"]).norm() > 1e-3
    assert off.head().config["model_cfg"]["quick_gelu"] is False


def test_a_file_of_another_context_length_raises(file, tmp_path):
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "context_length": 12}}
    network = randomize(open_clip.CLIP(**config), 3)
    save_file(network.state_dict(), tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=r"reads 12 tokens, agreeing reads 16; set teacher\.context_length=12"):
        made("agreeing", tmp_path / "short.safetensors")
    teacher = made("agreeing", tmp_path / "short.safetensors", context_length=12)
    assert teacher.fingerprint()["context_length"] == 12
    with torch.no_grad():
        expected = network.eval().encode_text(open_clip.SimpleTokenizer(context_length=12)(["a cat"]))
    assert torch.equal(teacher.head().encode_text(["a cat"]), expected)


def test_a_file_for_another_image_size_is_resized_as_open_clip_does_and_logged(file, tmp_path, caplog):
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 64}}
    save_file(randomize(open_clip.CLIP(**config), 3).state_dict(), tmp_path / "large.safetensors")
    teacher = made("agreeing", tmp_path / "large.safetensors")
    assert "its 65 image position embeddings are resized to the 17 of agreeing" in caplog.text
    own = open_clip.create_model("agreeing", pretrained=str(tmp_path / "large.safetensors"))
    assert torch.equal(teacher.visual.positional_embedding, own.visual.positional_embedding)


def test_another_tokenizer_replaces_that_of_the_name_with_its_options(monkeypatch, file):
    config = {**copy.deepcopy(CONFIG), "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "someone/tokens"}}
    config["text_cfg"]["tokenizer_kwargs"] = {"strip_sep_token": True}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "bare", config)
    teacher = made("bare", file, tokenizer="simple")
    assert teacher.fingerprint()["tokenizer"] == "simple"
    assert teacher.head().tokenizer(["a cat"]).shape == (1, 16)


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("torn", {"as_tag": "alhpa"}, r"teacher\.as_tag=alhpa: no tag of torn\. Did you mean 'alpha'"),
        ("bare", {"as_tag": "alpha"}, r"teacher\.as_tag=alpha: no tag of bare\. bare has none; set teacher\.mean"),
        ("torn", {"mean": (123.7, 116.3, 103.5)}, r"teacher\.mean=\[123\.7.*: expected three numbers from 0 to 1"),
        ("torn", {"mean": (float("nan"), 0, 0)}, r"teacher\.mean=\[nan"),
        ("torn", {"std": (0.0, 1.0, 1.0)}, r"teacher\.std=\[0\.0.*above 0"),
        ("torn", {"context_length": 0}, r"teacher\.context_length=0: expected 1 or more"),
    ],
)
def test_an_impossible_setting_raises_one_clear_line(file, model, settings, says):
    with pytest.raises(UserError, match=says) as error:
        made(model, file, **settings)
    assert "\n" not in str(error.value)


def test_a_setting_that_would_be_ignored_raises(file, tmp_path):
    local = clips.folder(tmp_path / "folder")
    with pytest.raises(UserError, match=r"teacher\.mean: local-dir:.* states it in its open_clip_config\.json"):
        build(local, mean=(0.0, 0.0, 0.0))
    with pytest.raises(UserError, match=r"teacher\.as_tag=beta: teacher\.pretrained=alpha is a tag; remove as_tag"):
        made("torn", "alpha", as_tag="beta")


def test_settings_are_read_as_a_recipe_or_the_command_line_writes_them():
    given = {
        "name": "open_clip",
        "pretrained": "w.pt",
        "mean": "[0, 0, 0.5]",
        "quick_gelu": "false",
        "as_tag": "openai",
    }
    assert clip_settings(given) == ClipSettings("openai", mean=(0.0, 0.0, 0.5), quick_gelu=False)
    check(given)
    for name, value, says in (
        ("interpolation", "nearest", r"teacher\.interpolation='nearest': unknown.*bicubic, bilinear"),
        ("resize_mode", "longest", r"teacher\.resize_mode='longest': unknown.*shortest, squash"),
        ("std", "[1, 1]", r"teacher\.std"),
    ):
        with pytest.raises(UserError, match=says):
            check({**given, name: value})


def test_a_failed_download_names_the_settings_of_a_file(file, monkeypatch):
    def offline(_):
        raise ConnectionError("no route")

    monkeypatch.setattr("fmdistill.backbones.clip_weights.download_pretrained", offline)
    with pytest.raises(UserError, match=r"teacher\.pretrained=FILE teacher\.as_tag=beta$"):
        made("torn", "beta")


def test_the_fingerprint_is_plain_json(file):
    fingerprint = made("torn", file, as_tag="beta").fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint


def test_the_reference_and_the_random_teacher_of_bench_have_the_same_settings(file, tmp_path):
    settings = {"name": "open_clip", "model": "torn", "pretrained": str(file), "as_tag": "beta", "mean": "[0, 0.5, 1]"}
    settings |= {"device": "cpu", "dtype": "fp32"}
    teacher = build_teacher(settings)
    plain, picture = (
        teachers.load_family("clip").reference(teacher),
        Image.open(io.BytesIO(clips.picture(3, (60, 40)))).convert("RGB"),
    )
    assert plain
    pixels, size = teacher.preprocess.prepare(picture)
    expected = teacher(pixels[None], torch.tensor([size]))["embedding"]
    assert torch.allclose(plain.embed([picture]), expected, atol=1e-5)
    other = teachers.load_family("clip").reference(build_teacher({**settings, "mean": None}))
    assert other and not torch.allclose(other.embed([picture]), expected, atol=1e-3)
    drawn = build_teacher(teachers.load_family("clip").random_weights(settings, tmp_path)).fingerprint()
    own = teacher.fingerprint()
    assert {key for key in own if drawn[key] != own[key]} == {"weights"}
