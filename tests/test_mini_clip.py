import json
import logging

import open_clip
import pytest
import torch
from nondegenerate import randomize
from open_clip.model import CLIP
from safetensors.torch import save_file

from fmdistill.backbones.clip import TextHead
from fmdistill.export import half
from fmdistill.mini import clip
from fmdistill.mini.captioned import Captioned, class_names
from fmdistill.mini.clip import CONFIG, build_clip_mini, clip_mini_student, tokenize, tokenizer
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def model():
    return randomize(clip_mini_student(), seed=1)


def captions(number=24):
    source = Captioned(train=number)
    return [encoded.extra["txt"].decode() for encoded in source.read("train-000")]


def test_it_is_open_clips_own_class_and_packs_small(model, tmp_path):
    assert type(model.clip) is CLIP and type(model.whole()) is CLIP
    packed = half.export(model, tmp_path / "w.safetensors")
    assert packed.stat().st_size <= 8_000_000
    assert model.clip.token_embedding.weight.shape[0] == len(model.token_ids) < 100
    assert model.whole().token_embedding.weight.shape[0] == 49408


def test_packed_weights_come_back_and_unused_rows_are_zero(model, tmp_path):
    path = half.export(model, tmp_path / "student.safetensors")
    whole, stored = build_clip_mini(path).state_dict(), model.clip.state_dict()
    rows = whole.pop("token_embedding.weight")
    assert torch.equal(rows[model.token_ids], stored.pop("token_embedding.weight").half().float())
    assert int((rows != 0).any(1).sum()) == len(model.token_ids)
    assert all(torch.equal(whole[name], value.half().float()) for name, value in stored.items())
    assert whole.keys() == stored.keys()
    again = build_clip_mini(tmp_path).state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole), "a run's folder holds the same"
    student = clip_mini_student(str(path)).state_dict()
    assert all(torch.equal(student[name], value.half().float() if value.is_floating_point() else value)
               for name, value in model.state_dict().items())  # fmt: skip


@torch.no_grad()
def test_kept_rows_give_the_whole_vocabularys_text_embeddings(model):
    texts, whole = captions(), model.whole()
    tokens = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])(texts)
    assert torch.equal(tokenize(texts, model.token_ids), tokens)
    ours = model.encode_text(tokens)
    torch.testing.assert_close(ours, whole.encode_text(tokens), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(TextHead.from_clip(whole, model.config).encode_text(texts), ours, rtol=1e-5, atol=1e-5)
    assert (torch.nn.functional.normalize(ours, dim=1) @ torch.nn.functional.normalize(ours[0], dim=0)).std() > 1e-3
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(pixels)["embedding"], model.clip.encode_image(pixels))


def test_every_caption_and_class_name_fits_the_context_and_has_its_rows(model):
    texts = [*captions(256), *class_names(), *(f"a picture of a {name}" for name in class_names())]
    tokens = tokenize(texts, model.token_ids)
    end = tokenizer().eot_token_id
    assert (tokens == end).any(1).all()
    assert (tokens[:, -1] != end).all(), "no caption is cut"


def test_a_word_without_a_row_is_named(model):
    with pytest.raises(UserError, match="'a photo of a zebra' has a word that clip_mini does not know"):
        tokenize(["a red star", "a photo of a zebra"], model.token_ids)
    with pytest.raises(AssertionError):
        model.encode_text(tokenizer()(["a zebra"]))


def test_the_configuration_is_open_clips(model, tmp_path):
    settings = {name: CONFIG[name] for name in ("model_cfg", "preprocess_cfg")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    state = {name: value.contiguous() for name, value in model.whole().state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    sizes = [step.size for step in preprocess.transforms if "Crop" in type(step).__name__]
    assert sizes == [(64, 64)] and model.preprocess.image_size == model.image_size == 64
    assert model.out_channels == settings["model_cfg"]["embed_dim"]


def test_untrained_is_the_same_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = build_clip_mini("none")
    assert torch.equal(torch.rand(1), expected) and not one.training
    two = build_clip_mini("none").state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.state_dict().items())


def test_the_kept_rows_ascend_to_the_end_token(model):
    ids = model.token_ids.tolist()
    assert ids == sorted(set(ids)) and ids[-1] == tokenizer().eot_token_id and ids[0] == 0  # 0 pads


def test_a_checkout_without_weights_warns_in_one_line(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(clip, "PACKAGED", tmp_path / "clip_mini.safetensors")
    with caplog.at_level(logging.WARNING):
        build_clip_mini("packaged")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "untrained" in caplog.text


def test_missing_and_foreign_weights_are_one_clear_line(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name, words in [
        ("absent", "no such file"),
        ("junk", "clip_mini weights .*not a readable"),
        ("other", "not a clip_mini"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            build_clip_mini(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)
