"""Intervals over images: what they contain, how often they hold the truth, and pairs of subjects."""

import numpy as np
import pytest

from fmdistill.evaluate import intervals, results
from fmdistill.evaluate.intervals import Means


def test_a_mean_is_over_all_values_and_its_row_has_count_and_interval():
    means = Means()
    means.add("a", "student", "iou", [0.0, 1.0], bucket=None, grid="5x5")
    means.add("b", "student", "iou", [1.0], grid="5x5")
    means.add("b", "student", "iou", [1.0], grid="5x5")  # in two calls
    means.add("c", "student", "iou", [], grid="5x5")
    (row,) = means.rows()
    assert results.key(row) == ("iou", (("grid", "5x5"),))
    assert (row["value"], row["count"], row["interval"]) == (0.75, 4, intervals.INTERVAL)
    assert (row["low"], row["high"]) == (0.5, 1.0)  # resamples of the two images: aa .5, ab .75, bb 1


def test_one_image_has_no_interval():
    means = Means()
    means.add("a", "student", "iou", [0.0, 1.0])
    (row,) = means.rows()
    assert row["value"] == 0.5 and "low" not in row


def test_intervals_hold_the_true_mean_about_as_often_as_they_say():
    """Two hundred sets of 60 images: each image has its own level and 1 to 20 values around it."""
    generator, held = np.random.default_rng(7), 0
    for _ in range(200):
        means = Means()
        for image in range(60):
            level = generator.beta(4, 2)
            values = generator.beta(8 * level, 8 * (1 - level), size=generator.integers(1, 21))
            means.add(str(image), "student", "iou", values)
        (row,) = means.rows()
        held += row["low"] <= 4 / 6 <= row["high"]
    assert 180 <= held <= 196


def test_resamples_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 5)
    monkeypatch.setattr(intervals, "CHUNK", 8)  # two resamples of four images at once
    sums, counts = np.array([1.0, 2.0, 0.0, 5.0]), np.array([2.0, 2.0, 1.0, 5.0])
    weights = np.concatenate(list(intervals.resamples(4)))
    assert weights.shape == (5, 4) and (weights.sum(1) == 4).all()
    got = intervals.resampled(sums[:, None], counts[:, None])[:, 0]
    for row, mean in zip(weights, got, strict=True):
        chosen = [i for i, times in enumerate(row) for _ in range(int(times))]
        assert mean == pytest.approx(sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen))


def entries(first, second):
    means = Means()
    for subject, values in (("a", first), ("b", second)):
        for image, value in values.items():
            means.add(image, subject, "iou", [value])
    return means.details()[intervals.PER_IMAGE]


def test_a_paired_difference_is_surer_than_two_intervals():
    generator = np.random.default_rng(3)
    levels = {str(i): float(v) for i, v in enumerate(generator.random(50))}
    better = {image: value + 0.01 for image, value in reversed(levels.items())}  # in another order
    assert intervals.paired(*entries(better, levels)) == pytest.approx((0.01, 0.01, 0.01))


def test_subjects_of_different_images_are_not_paired():
    assert intervals.paired(*entries({"x": 1.0, "y": 0.0}, {"x": 1.0, "z": 0.0})) is None
    assert intervals.paired(*entries({"x": 1.0}, {"x": 0.5})) is None
