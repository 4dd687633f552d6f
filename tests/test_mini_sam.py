import logging

import numpy as np
import pytest
import torch
from nondegenerate import randomize
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder

from fmdistill.export import half
from fmdistill.mini import sam as mini
from fmdistill.mini.sam import MiniSam, build_sam_mini, sam_mini_modules, sam_mini_student
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def model():
    return randomize(MiniSam(*sam_mini_modules()), seed=1)


def test_it_is_made_of_segment_anythings_own_classes():
    sam = build_sam_mini("none")
    assert type(sam.image_encoder) is ImageEncoderViT
    assert type(sam.prompt_encoder) is PromptEncoder
    assert type(sam.mask_decoder) is MaskDecoder
    assert not sam.training


def test_packed_weights_fit_and_load(model, tmp_path):
    assert half.export(model, tmp_path / "w.safetensors").stat().st_size <= 8_000_000
    sam = build_sam_mini(tmp_path / "w.safetensors")
    again = sam_mini_student(str(tmp_path / "w.safetensors"))
    stored, student = dict(model.state_dict()), dict(again.state_dict())
    for name, tensor in sam.state_dict().items():
        ours = name.replace("image_encoder.", "encoder.") if "image_encoder" in name else f"head.{name}"
        assert torch.equal(tensor, stored.pop(ours).half().float()), name
        assert torch.equal(tensor, student[ours]), name
    assert not stored, "every tensor must have come back"


def test_embed_equals_the_predictor_on_a_wide_image(model, tmp_path):
    half.export(model, tmp_path / "w.safetensors")
    student = sam_mini_student(str(tmp_path / "w.safetensors")).eval()
    assert (student.image_size, student.out_channels) == (256, 128)
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    predictor = SamPredictor(build_sam_mini(tmp_path / "w.safetensors"))
    predictor.set_image(image)
    pixels, size = student.preprocess.prepare(Image.fromarray(image))
    with torch.no_grad():
        embedding = student.embed(pixels[None], torch.tensor([size]))
    assert embedding.shape == (1, 128, 16, 16)
    torch.testing.assert_close(embedding, predictor.features, atol=1e-5, rtol=0)


def test_untrained_is_the_same_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = build_sam_mini("none").state_dict()
    assert torch.equal(torch.rand(1), expected)
    two = build_sam_mini("none").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["image_encoder.pos_embed"].std() > 0


def test_a_checkout_without_weights_warns_in_one_line(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(mini, "PACKAGED", tmp_path / "sam_mini.safetensors")
    with caplog.at_level(logging.WARNING):
        build_sam_mini("packaged")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "untrained" in caplog.text


def test_missing_and_foreign_weights_are_one_clear_line(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for path, words in [
        ("absent.safetensors", "no such file"),
        (tmp_path / "junk.safetensors", "sam_mini weights .*not a readable"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            build_sam_mini(path)
        assert "\n" not in str(caught.value)
