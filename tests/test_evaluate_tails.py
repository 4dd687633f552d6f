"""Tail scores: the buckets equal a plain loop over points with a distance transform, and add up to the whole."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from fmdistill import evaluate
from fmdistill.evaluate import grid_miou, results, tails
from fmdistill.evaluate.grid_miou import Case, GridMiou, run
from fmdistill.mini.scene_miou import bucket
from fmdistill.registry import UserError
from fmdistill.report import tables
from fmdistill.report.rows import TableRow

SIZE, GRID, K = 128, 8, 8
SHAPES = {"3:2": ((120, 180), (85, 128)), "1:2": ((170, 85), (128, 64)), "square": ((130, 130), (128, 128))}
RADII = (0.0, 3.3, 6.3, 14.3, 26.3, 50.3, 900.0)  # pixels; 0 is an empty mask, 900 the whole image
SHIFTS = (0, 0, 2, 6, 20)  # pixels between a point and its disk's centre
GROWTH = 3.1  # of the student's disks
BOTH = GridMiou(grids=(K,), by_size=True, by_edge=True, points_per_batch=10, device="cpu")


class Disks(torch.nn.Module):
    """A head that answers each point with a planted disk, at the original's resolution; a student's is larger."""

    config = {"image_size": SIZE, "image_embedding_size": GRID}

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.original, self.resized = SHAPES["3:2"]

    def decode(self, embedding, points, labels, boxes=None, multimask=True):
        """Return the same disk three times; the embedding is its growth in pixels."""
        scale = torch.tensor([self.original[1] / self.resized[1], self.original[0] / self.resized[0]])
        disks = [disk(x, y, self.original, float(embedding.mean())) for x, y in (points[:, 0] * scale).tolist()]
        return torch.from_numpy(np.stack(disks))[:, None].expand(-1, 3, -1, -1) - 0.5, torch.ones(len(points), 3)

    def upsample(self, logits, resized, original):
        """Return the logits unchanged."""
        return logits


def disk(x: float, y: float, original: tuple[int, int], growth: float = 0.0) -> np.ndarray:
    """Return the mask that the head plants for a point (in pixels, H x W), float32."""
    i, j = round(x / original[1] * K - 0.5), round(y / original[0] * K - 0.5)
    radius, shift = RADII[(i + 3 * j) % len(RADII)], SHIFTS[(2 * i + j) % len(SHIFTS)]
    rows, columns = np.mgrid[: original[0], : original[1]]
    return (np.hypot(rows - y, columns - x - shift) < radius + growth).astype(np.float32)


def cases(head: Disks, growths: dict[str, float]):
    """Yield one case per shape, setting the head to that shape."""
    for key, shape in SHAPES.items():
        head.original, head.resized = shape
        embedding = torch.zeros(4, GRID, GRID)
        yield Case(key, "photos", embedding, {name: embedding + g for name, g in growths.items()}, *shape)


def area_name(share: float) -> str:
    percent = 100 * share
    if percent < 1:
        return "area_below_0.3%" if percent < 0.3 else "area_0.3-1%"
    return "area_1-3%" if percent < 3 else "area_3-10%" if percent < 10 else "area_above_10%"


def edge_name(mask: np.ndarray, x: int, y: int) -> str:
    if mask.all() or not mask.any():
        return "edge_above_4%"
    side = mask if mask[y, x] else ~mask
    share = np.asarray(ndimage.distance_transform_edt(side))[y, x] / max(mask.shape)
    return "edge_below_1%" if share < 0.01 else "edge_1-4%" if share < 0.04 else "edge_above_4%"


@functools.cache
def loop(growth: float) -> dict[str, list[float]]:
    """Return the IoU per point by bucket, computed point by point."""
    ious: dict[str, list[float]] = {}
    for original, _ in SHAPES.values():
        for j in range(K):
            for i in range(K):
                x, y = (i + 0.5) / K * original[1], (j + 0.5) / K * original[0]
                teacher, student = disk(x, y, original) > 0, disk(x, y, original, growth) > 0
                union = (teacher | student).sum()
                iou = (teacher & student).sum() / union if union else 1.0
                for name in (area_name(float(teacher.mean())), edge_name(teacher, int(x), int(y))):
                    ious.setdefault(name, []).append(iou)
    return ious


def check() -> None:
    expected, head = loop(GROWTH), Disks()
    rows, _ = run(BOTH, head, cases(head, {"student": GROWTH}))
    buckets = {row["bucket"]: row for row in rows if "bucket" in row}
    assert buckets.keys() == expected.keys()
    for name, scores in expected.items():
        assert (buckets[name]["metric"], buckets[name]["grid"], buckets[name]["count"]) == (
            "miou",
            f"{K}x{K}",
            len(scores),
        )
        assert buckets[name]["value"] == pytest.approx(np.mean(scores), abs=1e-12), name


def test_every_bucket_equals_a_loop_over_the_points():
    expected = loop(GROWTH)
    assert set(expected) == {name for _, name in (*tails.AREAS, *tails.EDGES)}
    assert np.ptp([np.mean(scores) for scores in expected.values()]) > 0.1, "the buckets make no difference"
    check()


@pytest.mark.parametrize("planted", ["a bound", "swapped names", "outside", "border", "rows for columns", "shifted"])
def test_a_wrong_bucket_fails(planted, monkeypatch):
    true = tails.edge_distance
    if planted == "a bound":
        monkeypatch.setattr(tails, "EDGES", ((0.01, "edge_below_1%"), (0.05, "edge_1-4%"), (math.inf, "edge_above_4%")))
    elif planted == "swapped names":
        (a, first), (b, second), *rest = tails.AREAS
        monkeypatch.setattr(tails, "AREAS", ((a, second), (b, first), *rest))
    elif planted == "outside":  # points outside their mask at 0

        def outside(masks, xy):
            inside = masks[torch.arange(len(masks)), xy[:, 1], xy[:, 0]].numpy()
            return np.where(inside, true(masks, xy), 0.0)

        monkeypatch.setattr(tails, "edge_distance", outside)
    elif planted == "border":  # the border as an edge
        padded = torch.nn.functional.pad
        monkeypatch.setattr(tails, "edge_distance", lambda m, xy: true(padded(m, (1, 1, 1, 1)), xy + 1))
    elif planted == "rows for columns":
        side = min(n for original, _ in SHAPES.values() for n in original) - 1
        monkeypatch.setattr(tails, "edge_distance", lambda m, xy: true(m, xy.flip(1).clamp(max=side)))
    else:  # the next point's bucket
        split = tails.split
        monkeypatch.setattr(tails, "split", lambda v, b: {k: np.roll(m, 1) for k, m in split(v, b).items()})
    with pytest.raises(AssertionError):
        check()


def test_the_teacher_is_one_everywhere_and_the_buckets_add_up():
    head = Disks()
    rows, _ = run(BOTH, head, cases(head, {"self": 0.0, "student": GROWTH}))
    for name in ("self", "student"):
        for kind in (tails.AREAS, tails.EDGES):
            names = {bucket for _, bucket in kind}
            members = [row for row in rows if row["subject"] == name and row.get("bucket") in names]
            points, means = [row["count"] for row in members], [row["value"] for row in members]
            assert sum(points) == K * K * len(SHAPES)
            assert np.dot(points, means) / sum(points) == pytest.approx(
                results.value(rows, "miou", name, grid=f"{K}x{K}"), abs=1e-12
            )
    own = [row for row in rows if row["subject"] == "self" and row["metric"] == "miou"]
    assert {row["value"] for row in own} == {1.0}


@pytest.mark.parametrize("settings", [{}, {"by_size": True}, {"by_edge": True}, {"by_size": True, "by_edge": True}])
def test_only_the_chosen_buckets_are_computed_and_the_rest_is_unchanged(settings, monkeypatch):
    off, head = GridMiou(grids=(K,), device="cpu"), Disks()
    for setting, function in (("by_size", "area"), ("by_edge", "edge_distance")):
        if setting not in settings:
            monkeypatch.delattr(tails, function)
    expected, _ = run(off, head, cases(head, {"student": GROWTH}))
    rows, details = run(GridMiou(grids=(K,), device="cpu", **settings), head, cases(head, {"student": GROWTH}))
    assert [row for row in rows if "bucket" not in row] == expected
    added = {row["bucket"].split("_")[0] for row in rows if "bucket" in row}
    assert added == {setting.replace("by_size", "area").replace("by_", "") for setting in settings}
    assert len(details["images"]) == len(SHAPES)


def test_an_empty_bucket_has_no_row():
    image = {"group": "photos", "iou": {"2x2": {"a": [0.5, 1.0, 0.0, 0.0]}}}
    members = {"full": [True, True, False, False], "empty": [False] * 4}
    rows = grid_miou._miou_rows([{**image, "buckets": {"2x2": members}}])
    assert [(row["bucket"], row["value"], row["count"]) for row in rows if "bucket" in row] == [("full", 0.75, 2)]


@pytest.mark.parametrize("shape", [(60, 200), (130, 90)])
def test_edge_distance_equals_a_distance_transform(shape):
    random = np.random.default_rng(0)
    masks = ndimage.gaussian_filter(random.standard_normal((40, *shape)), (0, 6, 6)) > 0.01
    masks[0], masks[1] = True, False
    xy = random.integers(0, (shape[1], shape[0]), (40, 2))
    xy[2:6] = [(0, 0), (shape[1] - 1, 0), (0, shape[0] - 1), (shape[1] - 1, shape[0] - 1)]
    distances = tails.edge_distance(torch.from_numpy(masks), torch.from_numpy(xy))
    for mask, (x, y), distance in zip(masks, xy, distances, strict=True):
        reach = ndimage.distance_transform_edt(mask if mask[y, x] else ~mask)
        expected = math.inf if mask.all() or not mask.any() else np.asarray(reach)[y, x] / max(shape)
        assert distance == pytest.approx(expected) or (distance == math.inf and expected > 0.04)
    assert np.isfinite(distances).sum() > 10 and np.isinf(distances[:2]).all()


def test_areas_are_those_of_scenes_and_a_bound_belongs_above():
    share = np.concatenate([np.linspace(0, 1, 301), [0.003, 0.01, 0.03, 0.1]])
    members = tails.split(share, tails.AREAS)
    assert (np.sum(list(members.values()), axis=0) == 1).all()
    for i, value in enumerate(share):
        assert members[f"area_{bucket(value)}"][i]
    edges = tails.split(np.array([0.0, 0.00999, 0.01, 0.04, math.inf]), tails.EDGES)
    assert [members.tolist() for members in edges.values()] == [
        [True, True, False, False, False],
        [False, False, True, False, False],
        [False, False, False, True, True],
    ]


def test_the_table_heads_each_bucket():
    head = Disks()
    judged, _ = run(BOTH, head, cases(head, {"student": GROWTH}))
    cells = {results.key(row): row["value"] for row in judged}
    table = tables.build([TableRow("run", "run", cells)], GridMiou.metrics)
    shown = [(column.group, column.label) for column in table.columns if column.percent]
    names = [name for _, name in (*tails.AREAS, *tails.EDGES)]
    heads = [f"mIoU, {name}" for name in ("all images", "photos", *names)]
    assert shown == [(heading, f"{K}×{K}") for heading in heads]


def test_the_protocol_asks_for_both_and_paired_masks_are_an_error():
    settings = evaluate.load("eval/sam_grid_tail.yaml").evaluator
    assert settings.by_size and settings.by_edge and settings.grids == (16,) and not settings.floors
    for setting in ("by_size", "by_edge"):
        with pytest.raises(UserError, match="select=paired"):
            GridMiou(select="paired", **{setting: True})
