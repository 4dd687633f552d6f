import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fmdistill import recipe as recipes
from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.distill import tasks
from fmdistill.images import Images
from fmdistill.images import build as build_images
from fmdistill.mini.captioned import Captioned
from fmdistill.mini.clip import clip_mini_student, tokenizer
from fmdistill.mini.contrastive import CaptionedImages, Contrastive, same, symmetric_cross_entropy
from fmdistill.registry import UserError

IMAGES = {"name": "captioned", "train": 24, "validation": 8, "shard_size": 8}
RECIPE = {
    "out": "runs/x",
    "images": IMAGES,
    "student": {"name": "clip_mini"},
    "task": {"name": "contrastive"},
    "optimizer": {"name": "muon", "lr": 0.01, "other_lr": 0.003},
    "schedule": {"name": "cosine"},
    "train": {"steps": 3, "batch_size": 8},
}


@pytest.fixture(scope="module")
def job():
    return tasks.build(recipes.freeze(RECIPE, "recipe"))


def collate(data, number=8, epoch=0):
    items = [data.item(epoch, 0, index) for index in range(number)]
    return {
        k: torch.stack([i[k] for i in items]) if torch.is_tensor(items[0][k]) else [i[k] for i in items]
        for k in items[0]
    }


def test_distinct_captions_give_open_clips_loss():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(6, 16, generator=generator), torch.randn(6, 16, generator=generator)
    scale = torch.tensor(14.0)
    ours = symmetric_cross_entropy(image, text, scale, torch.eye(6, dtype=torch.bool))
    expected = open_clip_loss.ClipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)
    torch.testing.assert_close(ours["loss"], expected)
    torch.testing.assert_close(ours["loss"], (ours["image"] + ours["text"]) / 2)


def test_equal_captions_share_the_target():
    tokens = tokenizer()(["a red star", "a blue ring", "a red star", "a red cross"])
    equal = same(tokens)
    assert equal.tolist() == [[i == j or {i, j} == {0, 2} for j in range(4)] for i in range(4)]
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(4, 16, generator=generator), torch.randn(4, 16, generator=generator)
    text[2] = text[0]
    found = symmetric_cross_entropy(image, text, torch.tensor(5.0), equal)
    logits = 5 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    for name, rows in (("image", logits), ("text", logits.T)):
        by_hand = []
        for i, row in enumerate(rows):
            log_p = row - row.logsumexp(0)
            by_hand.append(-sum(log_p[j] for j in range(4) if equal[i, j]) / equal[i].sum())
        torch.testing.assert_close(found[name], torch.stack(by_hand).mean())
    # An image that is as near to the other copy of its caption is not wrong.
    near = torch.zeros(4, 4)
    near[0, 2] = near[1, 1] = near[2, 0] = near[3, 3] = 1.0
    right = symmetric_cross_entropy(torch.eye(4), near.T.contiguous(), torch.tensor(5.0), equal)
    assert float(right["image_error"]) == float(right["text_error"]) == 0


def test_the_scale_is_clamped_and_still_learns_downwards(job):
    task, batch = job.task, collate(job.train)
    scale = job.student.clip.logit_scale
    with torch.no_grad():
        start = scale.clone()
        scale.fill_(9.0)
    found = task(batch)
    assert float(found["logit_scale"]) == pytest.approx(100.0, rel=1e-5)
    assert float(scale.detach().exp()) == pytest.approx(100.0, rel=1e-5)
    found["loss"].backward()
    assert scale.grad is not None and float(scale.grad) != 0
    task.zero_grad()
    with torch.no_grad():
        scale.copy_(start)


def test_every_parameter_learns_and_training_lowers_the_loss():
    torch.manual_seed(0)
    student = clip_mini_student()
    task = Contrastive(student).train()
    images = build_images({**IMAGES, "zipf": 0.0})
    batch = collate(CaptionedImages(images, "train", student.preprocess, student.token_ids.clone(), 0))
    optimizer = torch.optim.Adam(task.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        found = task(batch)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(float(found["loss"].detach()))
    assert losses[-1] < 0.5 * losses[0], losses
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert [name for name, _ in task.named_parameters() if not name.startswith("student.")] == []


def test_an_item_is_the_image_with_its_own_caption(job):
    source = Captioned(**{key: value for key, value in IMAGES.items() if key != "name"})
    assert job.train.counts == (8, 8, 8) and job.validation.counts == (8,)
    for shard, name in enumerate(source.shards()["train"]):
        for index, encoded in enumerate(source.read(name)):
            item = job.train.item(0, shard, index)
            assert item["keys"] == encoded.key
            assert torch.equal(item["tokens"], tokenizer()([encoded.extra["txt"].decode()])[0])
            assert item["pixels"].shape == (3, 64, 64) and item["pixels"].dtype == torch.uint8


class Lines:
    """One image with the caption column that a test gives."""

    def __init__(self, text):
        self.text = text

    def shards(self):
        return {"train": ["one"], "validation": []}

    def count(self, shard):
        return 1

    def keys(self, shard):
        return ["key"]

    def fetch(self, shard, key):
        drawn = Captioned().fetch("train-000", "captioned-train-000000")
        return dataclasses.replace(drawn, key=key, extra={} if self.text is None else {"txt": self.text})


def item(text, epoch=0, seed=0):
    data = CaptionedImages(Images(Lines(text)), "train", ClipPreprocess(64, 8), clip_mini_student().token_ids, seed)
    return data.item(epoch, 0, 0)


@pytest.mark.slow
def test_one_of_several_captions_is_drawn_from_seed_epoch_and_key():
    text = b"a red star\n\n a blue ring \na white cross\n"
    expected = {tuple(tokens) for tokens in tokenizer()(["a red star", "a blue ring", "a white cross"]).tolist()}
    drawn = [tuple(item(text, epoch)["tokens"].tolist()) for epoch in range(20)]
    assert set(drawn) == expected
    assert drawn == [tuple(item(text, epoch)["tokens"].tolist()) for epoch in range(20)]
    assert drawn != [tuple(item(text, epoch, seed=1)["tokens"].tolist()) for epoch in range(20)]


def test_a_caption_that_is_not_utf8_is_named_with_its_shard_key_and_column():
    with pytest.raises(UserError, match="one: image 'key', column txt: not UTF-8 .*Latin-1"):
        item("caf\xe9".encode("latin-1"))


@pytest.mark.parametrize("text", [None, b"", b" \n "])
def test_an_image_without_a_caption_is_named(text):
    with pytest.raises(UserError, match="image 'key' has no caption"):
        item(text)


def test_another_student_is_refused():
    with pytest.raises(UserError, match="trains clip_mini alone"):
        tasks.build(recipes.freeze({**RECIPE, "student": {"name": "tinyvit_sam_mini"}}, "recipe"))


def test_the_recipe_that_makes_clip_mini_never_shows_an_unseen_class():
    loaded = recipes.load("recipes/mini/clip_mini.yaml")
    assert loaded.images["validation_combinations"] == "unseen"
    assert loaded.images["train"] >= (loaded.train.steps or 0) * loaded.train.batch_size
