"""Scene scores: where the point is put, what each measure means, and how objects are counted."""

import numpy as np
import pytest
import torch

from fmdistill.backbones.promptable import PromptHead
from fmdistill.evaluate.results import value
from fmdistill.evaluate.tails import SHARES
from fmdistill.mini.scene_miou import MEASURES, SceneCase, SceneMiou, bucket, object_points, run, scene_rows
from fmdistill.registry import UserError

SIZE, GRID = 64, 8


class Oracle(torch.nn.Module):
    """A head that answers each point with planted boxes: mask 1 right, mask 2 (picked) half of it, mask 3 nothing."""

    config = {"image_size": SIZE, "image_embedding_size": GRID}
    downsample = PromptHead.downsample

    def __init__(self, labels: np.ndarray, resized: tuple[int, int]):
        super().__init__()
        self.labels, self.resized = torch.from_numpy(labels), resized
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[int, int]] = []

    def decode(self, embedding, points, labels, boxes=None, multimask=True):
        """Masks at the full resolution of the labels; `upsample` leaves them."""
        assert (labels == 1).all()
        scale = torch.tensor([self.labels.shape[1] / self.resized[1], self.labels.shape[0] / self.resized[0]])
        answers = []
        for x, y in (points[:, 0] * scale).round().long().tolist():
            self.asked.append((x, y))
            true = self.labels == self.labels[y, x]
            half = true & (torch.cumsum(true.flatten(), 0).reshape(true.shape) <= true.sum() // 2)
            answers.append(torch.stack([true, half, true & False] if multimask else [half]).float() - 0.5)
        predicted = torch.tensor([0.5, 0.9, 0.1] if multimask else [0.5]).expand(len(points), -1)
        return torch.stack(answers), predicted

    def upsample(self, logits, resized, original):
        """Leave planted masks, enlarge the ceiling's by SAM's path."""
        if logits.shape[-2:] == original:
            return logits
        enlarged = torch.nn.functional.interpolate(logits, (SIZE, SIZE), mode="bilinear")
        return torch.nn.functional.interpolate(enlarged[..., : resized[0], : resized[1]], original, mode="bilinear")


def scene() -> np.ndarray:
    """Two rectangles and an L on 40 x 60, one padded column of -1 in none."""
    labels = np.zeros((40, 60), dtype=np.int64)
    labels[0:16, 0:16] = 1
    labels[24:28, 40:56] = 2
    labels[20:36, 8:12] = 5
    labels[32:36, 8:28] = 5
    return labels


def test_point_is_the_visible_pixel_furthest_from_every_edge():
    labels = scene()
    points = object_points(labels)
    assert list(points) == [1, 2, 5]
    for index, (x, y) in points.items():
        assert labels[y, x] == index
        # Brute force: the distance from each of the object's pixels to the nearest pixel that is not its own.
        inside = np.argwhere(np.pad(labels == index, 1))
        outside = np.argwhere(~np.pad(labels == index, 1))
        reach = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(-1)).min(1)
        own = reach[(inside == [y + 1, x + 1]).all(1)]
        assert own == reach.max()


def test_a_point_never_falls_into_what_hides_the_object():
    labels = np.zeros((20, 20), dtype=np.int64)
    labels[2:18, 2:18] = 1
    labels[6:14, 6:18] = 2
    x, y = object_points(labels)[1]
    assert labels[y, x] == 1


def test_measures_of_planted_masks():
    labels, resized = scene(), (43, 64)
    head = Oracle(labels, resized)
    rows = scene_rows(head, torch.zeros(4, GRID, GRID), labels, resized, points_per_batch=2)
    assert [row["object"] for row in rows] == [1, 2, 5]
    assert head.asked[:2] == [tuple(rows[0]["point"]), tuple(rows[1]["point"])]
    for row in rows:
        assert row["best"] == 1.0
        assert row["picked"] == pytest.approx(0.5, abs=0.01) and row["single"] == pytest.approx(0.5, abs=0.01)
        assert row["share"] == pytest.approx((labels == row["object"]).mean())
        assert 0.0 < row["ceiling"] <= 1.0
    assert rows[0]["ceiling"] > 0.85, "a large aligned square survives the logits' grid"


def test_ceiling_falls_with_the_object():
    from fmdistill.mini.sam import sam_mini_modules

    _, head = sam_mini_modules()
    labels = np.zeros((256, 256), dtype=np.int64)
    labels[40:140, 40:140], labels[180:186, 180:186], labels[220:221, 220:240] = 1, 2, 3
    rows = scene_rows(head.eval(), torch.randn(128, 16, 16), labels, (256, 256))
    large, small, thin = (row["ceiling"] for row in rows)
    assert large > 0.97 and large > small > thin == 0.0


def test_area_buckets():
    shares = {0.001: "below_0.3%", 0.003: "0.3-1%", 0.01: "1-3%", 0.05: "3-10%", 0.1: "above_10%", 0.9: "above_10%"}
    assert {share: bucket(share) for share in shares} == shares


def test_run_counts_every_object_once():
    labels, resized = scene(), (43, 64)
    cases = [SceneCase(str(i), torch.zeros(4, GRID, GRID), labels, resized) for i in range(3)]
    rows, details = run(SceneMiou(images=2, device="cpu"), Oracle(labels, resized), cases)
    objects = details["objects"]
    assert len(objects) == 6 and {row["count"] for row in rows if "bucket" not in row} == {6}
    for measure in MEASURES:
        assert sum(row["count"] for row in rows if row["mask"] == measure and "bucket" in row) == 6
        assert value(rows, "miou", mask=measure) == pytest.approx(np.mean([one[measure] for one in objects]))
        members = [one[measure] for one in objects if one["bucket"] == "above_10%"]
        assert value(rows, "miou", mask=measure, bucket="above_10%") == pytest.approx(np.mean(members))
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert {tuple(entry["images"]) for entry in details["per_image"]} == {("0", "1")}
    order = list(dict.fromkeys(row.get("bucket") for row in rows))
    assert order == [name for name in (None, *(name for _, name in SHARES)) if name in order]


def test_what_would_measure_nothing_is_refused():
    for settings in ({"points_per_batch": 0}, {"images": 0}):
        with pytest.raises(UserError):
            SceneMiou(**settings)
    empty = SceneCase("a", torch.zeros(4, GRID, GRID), np.zeros((8, 8), dtype=np.int64), (64, 64))
    with pytest.raises(UserError, match="no objects"):
        run(SceneMiou(device="cpu"), Oracle(empty.labels, (64, 64)), [empty])
