import json

import numpy as np
import pytest
import torch
from nondegenerate import randomize, tiny_sam
from segment_anything import SamPredictor

from fmdistill.backbones.promptable import PromptHead
from fmdistill.registry import UserError

ORIGINAL = (50, 75)


@pytest.fixture(scope="module")
def predictor():
    predictor = SamPredictor(tiny_sam(seed=3))
    predictor.set_image(np.random.default_rng(0).integers(0, 256, (*ORIGINAL, 3), dtype=np.uint8))
    return predictor


def prompts(kind, count=5):
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(count, 2, 2, generator=generator) * 42
    labels = torch.tensor([[1, 0]] * count)
    low = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat([low, low + 15], dim=1)
    return {
        "point": (points[:, :1], labels[:, :1], None),
        "two points": (points, labels, None),
        "box": (None, None, boxes),
        "point and box": (points[:, :1], labels[:, :1], boxes),
    }[kind]


@pytest.mark.parametrize("kind", ["point", "two points", "box", "point and box"])
@pytest.mark.parametrize("multimask", [True, False])
@torch.no_grad()
def test_decode_and_upsample_equal_the_predictor(predictor, kind, multimask):
    points, labels, boxes = prompts(kind)
    masks, iou, low = predictor.predict_torch(points, labels, boxes, None, multimask, return_logits=True)
    head = PromptHead.from_sam(predictor.model)
    logits, score = head.decode(predictor.features[0], points, labels, boxes, multimask=multimask)
    assert logits.shape == (5, 3 if multimask else 1, 16, 16)
    torch.testing.assert_close(logits, low, atol=1e-5, rtol=0)
    torch.testing.assert_close(score, iou, atol=1e-5, rtol=0)
    full = head.upsample(logits, predictor.input_size, ORIGINAL)
    torch.testing.assert_close(full, masks, atol=1e-5, rtol=0)
    assert logits.std() > 1e-2, "degenerate logits would agree with anything"


@torch.no_grad()
def test_decode_equals_sam_forward(predictor):
    sam, (points, labels, _) = predictor.model, prompts("point")
    image = torch.randint(0, 256, (3, 43, 64), generator=torch.Generator().manual_seed(0)).float()
    record = {"image": image, "original_size": ORIGINAL, "point_coords": points, "point_labels": labels}
    expected = sam([record], multimask_output=True)[0]
    embedding = sam.image_encoder(sam.preprocess(image)[None])[0]
    head = PromptHead.from_sam(sam)
    logits, score = head.decode(embedding, points, labels)
    torch.testing.assert_close(logits, expected["low_res_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(score, expected["iou_predictions"], atol=1e-5, rtol=0)
    assert torch.equal(head.upsample(logits, (43, 64), ORIGINAL) > 0, expected["masks"])


@torch.no_grad()
def test_decode_all_returns_both_outputs(predictor):
    head, (points, labels, _) = PromptHead.from_sam(predictor.model), prompts("point")
    logits, score = head.decode_all(predictor.features[0], points, labels)
    assert torch.equal(logits[:, :1], head.decode(predictor.features[0], points, labels, multimask=False)[0])
    assert torch.equal(score[:, 1:], head.decode(predictor.features[0], points, labels)[1])


@torch.no_grad()
def test_decode_batch_equals_image_by_image():
    head = randomize(PromptHead.from_sam(tiny_sam()), seed=5)
    embeddings = torch.randn(3, 32, 4, 4)
    points, labels = torch.rand(12, 2, 2) * 64, torch.tensor([[1, 0]] * 12)
    masks = torch.randn(12, 1, 16, 16)
    for mask in (None, masks):
        sparse, dense, pe = head.encode_prompts(points, labels, masks=mask)
        together = head.decode_batch(embeddings, sparse, dense)
        for image in range(3):
            own = slice(4 * image, 4 * image + 4)
            alone = head.mask_decoder.predict_masks(embeddings[image, None], pe, sparse[own], dense[own])
            torch.testing.assert_close(together[0][own], alone[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together[1][own], alone[1], atol=1e-5, rtol=1e-5)


def test_prompts_keep_full_precision_under_autocast():
    head = randomize(PromptHead.from_sam(tiny_sam()), seed=5)
    points, labels = torch.rand(4, 1, 2) * 64, torch.ones(4, 1)
    exact = head.encode_prompts(points, labels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = head.encode_prompts(points, labels)
    assert all(torch.equal(a, b) for a, b in zip(exact, cast, strict=True))


def test_a_saved_head_is_loaded_unchanged(tmp_path):
    head = randomize(PromptHead.from_sam(tiny_sam()), seed=7)
    head.save(tmp_path / "head")
    loaded = PromptHead.load(tmp_path / "head")
    assert loaded.config == head.config and not loaded.training
    assert loaded.state_dict().keys() == head.state_dict().keys()
    assert any("positional_encoding_gaussian_matrix" in name for name in loaded.state_dict())
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_an_interrupted_save_does_not_change_the_saved_head(tmp_path, monkeypatch):
    old, new = (randomize(PromptHead.from_sam(tiny_sam()), seed=seed) for seed in (7, 8))
    old.save(tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path)
    loaded = PromptHead.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in old.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head.json", "head.safetensors"]


def damage(folder, how):
    if how == "no weights":
        (folder / "head.safetensors").unlink()
    elif how == "truncated weights":
        path = folder / "head.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "broken json":
        (folder / "head.json").write_text("{")
    elif how == "missing key":
        (folder / "head.json").write_text("{}")
    elif how == "a number":
        (folder / "head.json").write_text("1")
    elif how == "no text":
        (folder / "head.json").write_bytes(b"\xff\x00")
    elif how == "nonsense":
        config = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps({**config, "num_heads": 7, "embed_dim": None}))
    else:
        config = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps({**config, "mlp_dim": 8}))


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "truncated weights",
        "broken json",
        "missing key",
        "a number",
        "no text",
        "nonsense",
        "another shape",
    ],
)
def test_a_damaged_head_raises_one_clear_line(tmp_path, how):
    PromptHead.from_sam(tiny_sam()).save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(UserError, match="prompt head") as caught:
        PromptHead.load(tmp_path)
    assert "\n" not in str(caught.value)
