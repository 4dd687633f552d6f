import io
import tarfile

import numpy as np
import PIL.Image
import pytest
import torch
from nondegenerate import randomize, tiny_sam
from torchvision.ops import sigmoid_focal_loss

from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.sam import SamPreprocess
from fmdistill.images import Images, build
from fmdistill.mini import promptable
from fmdistill.mini.labelled import LabelledImages, sample_prompts
from fmdistill.mini.promptable import Promptable, SameObject, coverage, longer_contours, mask_losses
from fmdistill.mini.sam import MiniSam
from fmdistill.mini.scenes import Scenes
from fmdistill.registry import UserError

SIDE = 64


def test_scenes_are_prepared_once_where_memory_is_given_and_prompted_anew_each_epoch(monkeypatch):
    images = Images(Scenes(train=4, validation=1, size=64, shard_size=4))
    plain, keeping = (LabelledImages(images, "train", SamPreprocess(64, 16), 5, 0, memory=gb) for gb in (0.0, 3e-5))
    drawn = []
    encode = Scenes.encode
    monkeypatch.setattr(Scenes, "encode", lambda self, *place: drawn.append(place) or encode(self, *place))
    for epoch in (0, 1):
        for index in range(3):
            expected, found = plain.item(epoch, 0, index), keeping.item(epoch, 0, index)
            assert expected.keys() == found.keys() and expected["keys"] == found["keys"]
            tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
            assert len(tensors) == 9 and all(torch.equal(found[name], value) for name, value in tensors.items())
    assert len(drawn) == 6 + 3 + 2  # two of the three fit
    first, second = (keeping.item(epoch, 0, 0)["points"] for epoch in (0, 1))
    assert not torch.equal(first, second)


def scene(rng, side=SIDE, objects=5, padded=True):
    labels = np.zeros((side, side), np.int64)
    for number in range(1, objects + 1):
        y, x = rng.integers(0, side * 3 // 4, 2)
        h, w = rng.integers(side // 8, side // 2, 2)
        labels[y : y + h, x : x + w] = number
    if padded:
        labels[side * 2 // 3 :] = -1
    return labels


def make_batch(images=2, prompts=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = [scene(rng, padded=i % 2 == 0) for i in range(images)]
    points, target, boxes, _ = map(np.stack, zip(*[sample_prompts(one, rng, prompts) for one in labels], strict=True))
    labels = torch.from_numpy(np.stack(labels))
    colour = (labels[:, None] + 1) * torch.tensor([37, 91, 53]).view(3, 1, 1)
    return {
        "pixels": (colour % 256).to(torch.uint8),
        "sizes": torch.tensor([(SIDE * 2 // 3, SIDE) if i % 2 == 0 else (SIDE, SIDE) for i in range(images)]),
        "objects": labels,
        "points": torch.from_numpy(points),
        "target": torch.from_numpy(target),
        "boxes": torch.from_numpy(boxes),
        "use_box": torch.tensor([[False, True] * (prompts // 2)] * images),
    }


def make_task(seed=0, **settings):
    sam = tiny_sam(seed)
    torch.manual_seed(seed)
    return Promptable(MiniSam(sam.image_encoder, PromptHead.from_sam(sam)), **settings).train()


def test_every_parameter_learns():
    task = make_task(refined=0.5)
    task(make_batch())["loss"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # A softmax does not see what is added to all of its keys, so a key bias has no gradient in any network.
        assert parameter.grad.abs().max() > 1e-9 or name.endswith("k_proj.bias"), name


def test_the_throwaway_head_is_not_in_the_student():
    task = make_task()
    assert not [name for name in task.student.state_dict() if "expand" in name or "dense." in name]
    assert task.dense.expand.weight.requires_grad


def test_the_loss_is_the_sum_of_its_parts_and_a_function_of_the_batch():
    task, batch = make_task(), make_batch()
    first, again = task(batch), task(batch)
    parts = [first[name] for name in ("best", "single", "iou", "refined", "dense")]
    torch.testing.assert_close(first["loss"], torch.stack(parts).sum())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "refined" not in make_task(refined=0.0)(batch)


@pytest.mark.slow
def test_training_lowers_the_loss():
    task, batch = make_task(), make_batch()
    for module in task.student.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.LayerNorm):
            module.reset_parameters()
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        out = task(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append({name: float(value.detach()) for name, value in out.items()})
    for name in ("loss", "dense", "best_error"):
        assert losses[-1][name] < 0.7 * losses[0][name], (name, losses[0], losses[-1])


@torch.no_grad()
def test_points_and_boxes_share_a_call():
    head = randomize(PromptHead.from_sam(tiny_sam()), seed=3)
    batch, embedding = make_batch(), torch.randn(2, 32, 4, 4)
    points, boxes, boxed = (
        batch["points"].flatten(0, 1)[:, None],
        batch["boxes"].flatten(0, 1),
        batch["use_box"].flatten(),
    )
    logits, score = head.decode_batch(embedding, *head.encode_mixed(points, torch.ones(8, 1), boxes, boxed))
    for row in range(8):
        own = slice(row, row + 1)
        asked = (None, None, boxes[own]) if boxed[row] else (points[own], torch.ones(1, 1))
        expected, expected_score = head.decode_all(embedding[row // 4], *asked)
        torch.testing.assert_close(logits[own], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(score[own], expected_score, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_corrective_point_joins_points_and_boxes():
    head = randomize(PromptHead.from_sam(tiny_sam()), seed=3)
    point, box, extra = torch.rand(2, 1, 2) * 64, torch.rand(2, 4) * 64, torch.rand(2, 1, 2) * 64
    one, zero, mask = torch.ones(2, 1), torch.zeros(2, 1), torch.randn(2, 1, 16, 16)
    points, labels = torch.cat([point, extra], 1), torch.cat([one, zero], 1)
    sparse, dense = head.encode_mixed(points, labels, box, torch.tensor([False, True]), mask)
    by_point = head.prompt_encoder((torch.cat([point, extra], 1), torch.cat([one, zero], 1)), None, mask)
    by_box = head.prompt_encoder((extra, zero), box, mask)
    torch.testing.assert_close(sparse, torch.stack([by_point[0][0], by_box[0][1]]))
    torch.testing.assert_close(dense, by_box[1])


def test_coverage_is_the_share_of_real_pixels():
    labels = torch.from_numpy(scene(np.random.default_rng(3), padded=True))[None]
    labels[0, :, 61:] = -1
    target = torch.tensor([[1, 4]])
    got, valid = coverage(labels, target, 16)
    for prompt in range(2):
        for row in range(16):
            for column in range(16):
                cell = labels[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                real = cell[cell >= 0]
                assert bool(valid[prompt, row, column]) == (len(real) > 0)
                share = (real == target[0, prompt]).float().mean() if len(real) else torch.tensor(0.0)
                torch.testing.assert_close(got[prompt, row, column], share, atol=1e-6, rtol=0)


def test_longer_contours_counts_specks_and_holes_but_not_the_contour_of_the_target_or_padding():
    target = torch.zeros(1, 12, 12)
    target[0, 2:6, 2:6] = 1  # its contour has 16 edges
    speck, hole, part, outside = (target.clone() for _ in range(4))
    speck[0, 9, 9] = 1
    hole[0, 3, 3] = 0
    part[0, 4:6] = 0
    outside[0, 8, 11] = 1
    valid = torch.ones(1, 12, 12, dtype=torch.bool)
    valid[:, :, 11:] = False
    logits = torch.stack([target, speck, hole, part, outside], dim=1) * 200 - 100
    expected = torch.tensor([[0, 4 / 16, 4 / 16, 0, 0]])
    torch.testing.assert_close(longer_contours(logits, target, valid), expected)


@pytest.mark.parametrize("focal_norm", promptable.FOCAL_NORMS)
def test_mask_losses_equal_independent_formulas(focal_norm):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 8, 8, generator=generator) * 3
    target = (torch.rand(3, 8, 8, generator=generator) > 0.6).float()
    valid = torch.ones(3, 8, 8, dtype=torch.bool)
    valid[1, 5:] = False
    focal, dice, iou = mask_losses(logits, target, valid, focal_norm)
    for n in range(3):
        for m in range(4):
            x, y = logits[n, m][valid[n]], target[n][valid[n]]
            p = torch.sigmoid(x)
            each = sigmoid_focal_loss(x, y, alpha=-1, gamma=1, reduction="none")
            wanted = {
                "parts": each[y == 1].mean() + each[y == 0].mean(),
                "object": each[y == 1].mean() + each[y == 0].sum() / y.sum() / 2,
                "image": 2 * each.mean(),
            }[focal_norm]
            torch.testing.assert_close(focal[n, m], wanted)
            torch.testing.assert_close(dice[n, m], 1 - (2 * (p @ y) + 1) / (p.sum() + y.sum() + 1))
            on, off = x > 0, y > 0.5
            torch.testing.assert_close(iou[n, m], (on & off).sum() / (on | off).sum())


def test_padding_takes_no_part():
    task, batch = make_task(), make_batch()
    logits = torch.randn(8, 4, 16, 16)
    target, valid = coverage(batch["objects"], batch["target"], 16)
    changed = torch.where(valid[:, None], logits, 9.0)
    assert not valid.all()
    assert all(
        torch.equal(a, b)
        for a, b in zip(mask_losses(logits, target, valid), mask_losses(changed, target, valid), strict=True)
    )
    weights = promptable._by_object(batch["objects"].flatten(1))
    objects = batch["objects"].flatten(1)
    assert (weights[objects < 0] == 0).all() and (weights[objects >= 0] > 0).all()
    assert task.dense.samples == 256


def test_iou_counts_full_resolution_pixels():
    labels = torch.from_numpy(scene(np.random.default_rng(1), padded=False))[None]
    target, valid = coverage(labels, torch.tensor([[2]]), 16)
    logits = torch.randn(1, 4, 16, 16)
    _, _, iou = mask_losses(logits, target, valid)
    on, wanted = (logits[0] > 0).repeat_interleave(4, 1).repeat_interleave(4, 2), labels[0] == 2
    torch.testing.assert_close(iou[0], (on & wanted).sum((1, 2)) / (on | wanted).sum((1, 2)))


def test_the_dense_loss_tells_objects_apart():
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, :, 8:] = 1
    loss = SameObject(2, width=2, upscale=1, samples=64)
    with torch.no_grad():
        loss.expand.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        loss.expand.bias.zero_()
    right = torch.nn.functional.one_hot(labels, 2).permute(0, 3, 1, 2).float()
    draw = lambda e: float(loss(e, labels, torch.Generator().manual_seed(0)).detach())  # noqa: E731
    # Centred, two objects are opposite: every pair costs log(1 + e^-5) at scale 5; equal pixels have no direction.
    assert draw(right) == pytest.approx(np.log1p(np.exp(-5)), rel=1e-3)
    assert draw(torch.ones_like(right)) == pytest.approx(np.log(2), rel=1e-3)
    assert draw(right.roll(4, dims=3)) > 1


def test_a_correction_lies_in_the_error_and_knows_its_side():
    target = torch.zeros(2, 16, 16)
    target[0, 2:9, 2:9] = 1  # missed: a positive point
    mask = torch.full((2, 16, 16), -1.0)
    mask[1, 4:12, 6:14] = 1.0  # invented: a negative point
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    xy, label = promptable.correction(mask, target, valid, 64)
    assert label.flatten().tolist() == [1, 0]
    assert xy[0, 0].tolist() == [5 * 4 + 1.5, 5 * 4 + 1.5]
    assert 6 * 4 <= xy[1, 0, 0] < 14 * 4 and 4 * 4 <= xy[1, 0, 1] < 12 * 4


def test_prompts_lie_on_their_objects():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = scene(rng, side=128)
        labels[3, 3] = 99  # too small to ask for
        points, target, boxes, use_box = sample_prompts(labels, rng, 8, background=0.0)
        assert points.shape == (8, 2) and boxes.shape == (8, 4) and use_box.dtype == bool
        for (x, y), one, box in zip(points.astype(int), target, boxes, strict=True):
            assert labels[y, x] == one and one not in (0, -1, 99)
            rows, columns = np.nonzero(labels == one)
            exact = [columns.min(), rows.min(), columns.max(), rows.max()]
            assert np.abs(box - exact).max() <= 20 * 128 / 1024 and (box >= 0).all() and (box <= 127).all()
    assert 0 < np.mean([sample_prompts(labels, rng, 6)[3].mean() for _ in range(50)]) < 0.6


def test_prompts_are_a_function_of_the_generator_and_cover_every_object():
    labels = scene(np.random.default_rng(2), side=128)
    one, two = (sample_prompts(labels, np.random.default_rng(7), 6) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    many = sample_prompts(labels, np.random.default_rng(0), 400, background=0.0)[1]
    big_enough = [i for i in np.unique(labels) if i > 0 and (labels == i).sum() >= 12]
    assert set(many) == set(big_enough)


def test_a_share_of_points_asks_for_the_background():
    labels = scene(np.random.default_rng(2), side=128)
    points, target, _, use_box = sample_prompts(labels, np.random.default_rng(0), 1000, background=0.1)
    assert 0.06 < (target == 0).mean() < 0.14
    assert all(labels[int(y), int(x)] == one for (x, y), one in zip(points, target, strict=True))
    assert not use_box[target == 0].any(), "a box around the background is the whole image and says nothing"


def test_an_empty_scene_asks_for_its_background():
    labels = np.zeros((32, 32), np.int64)
    labels[20:] = -1
    points, target, _, _ = sample_prompts(labels, np.random.default_rng(0), 3)
    assert (target == 0).all() and (points[:, 1] < 20).all()


def test_masks_of_an_image_that_its_exif_turns_are_refused_or_taken_as_stored(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, image, tagged in (
            ("0.png", PIL.Image.new("RGB", (64, 40), "red"), {"exif": exif}),
            ("0.labels.png", PIL.Image.new("L", (64, 40), 1), {}),
        ):
            buffer = io.BytesIO()
            image.save(buffer, "PNG", **tagged)
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    settings = {"name": "tar", "root": str(tmp_path), "train": ["a.tar"]}
    data = LabelledImages(build(settings), "train", SamPreprocess(64, 16), 5, 0)
    with pytest.raises(UserError, match="a: image '0' is 40 x 64, its labels.png 64 x 40; .*images.orientation=ignore"):
        data.item(0, 0, 0)
    stored = LabelledImages(build({**settings, "orientation": "ignore"}), "train", SamPreprocess(64, 16), 5, 0)
    assert stored.item(0, 0, 0)["sizes"].tolist() == [40, 64]
