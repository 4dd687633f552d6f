"""Intervals over images: what they contain, how often they hold the truth, and pairs of subjects."""

import numpy as np
import pytest
from scipy import stats

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


@pytest.mark.parametrize(("images", "least", "most"), [(60, 180, 196), (6, 174, 196)])
def test_intervals_hold_the_true_mean_about_as_often_as_they_say(images, least, most):
    """Two hundred sets: each image has its own level and 1 to 20 values around it. Plain percentiles of 6 hold 166."""
    generator, means = np.random.default_rng(7), Means()
    for number in range(200):
        for image in range(images):
            level = generator.beta(4, 2)
            values = generator.beta(8 * level, 8 * (1 - level), size=generator.integers(1, 21))
            means.add(str(image), "student", f"iou {number}", values)
    held = sum(row["low"] <= 4 / 6 <= row["high"] for row in means.rows())
    assert least <= held <= most


def test_the_ends_are_percentiles_at_the_tails_of_student_s_t():
    values = np.random.default_rng(0).normal(size=2000)
    for images, level in ((6, 0.95), (60, 0.95), (60, 1 - 0.05 / 3)):
        half = np.sqrt(images / (images - 1)) * stats.t.interval(level, images - 1)[1]
        expected = np.percentile(values, [100 * stats.norm.cdf(-half), 100 * stats.norm.cdf(half)])
        assert intervals.ends(values, images, level) == pytest.approx(tuple(expected))


def test_rows_of_equally_many_images_share_resamples_and_are_as_if_alone():
    generator, together = np.random.default_rng(1), Means()
    for metric, images in (("a", 5), ("b", 5), ("c", 4)):
        for image in range(images):
            together.add(str(image), "s", metric, generator.random(3))
    for row, (place, images) in zip(together.rows(), together.parts.items(), strict=True):
        assert Means({place: images}).rows() == [row]


def test_an_empty_add_sets_the_place_of_a_row():
    means = Means()
    for bucket in ("small", "large", "never"):
        means.add("a", "s", "iou", [1.0] if bucket == "large" else [], bucket=bucket)
    means.add("b", "s", "iou", [0.0], bucket="small")
    assert [row["bucket"] for row in means.rows()] == ["small", "large"]
    assert [entry["bucket"] for entry in means.details()[intervals.PER_IMAGE]] == ["small", "large"]


def test_rows_computed_elsewhere_get_the_intervals_of_their_means():
    means = Means()
    for image, value in (("a", 0.0), ("b", 1.0)):
        means.add(image, "s", "iou", [value], grid="5x5")
    rows = [results.row("s", "iou", 0.75, grid="5x5"), results.row("s", "iou", 0.5), results.row("t", "iou", 0.5)]
    first, *others = means.with_intervals(rows)
    assert first == {**rows[0], "low": 0.0, "high": 1.0, "interval": intervals.INTERVAL} and others == rows[1:]


def test_seeds_of_one_method_are_pooled_if_their_images_and_counts_agree():
    def entry(values: dict[str, list[float]]) -> dict:
        means = Means()
        for image, members in values.items():
            means.add(image, "student", "iou", members)
        return means.details()[intervals.PER_IMAGE][0]

    first, second = entry({"a": [0.0, 1.0], "b": [0.5]}), entry({"b": [1.0], "a": [1.0, 1.0]})
    pooled = intervals.pooled([first, second])
    assert pooled == {**first, "sums": [1.5, 0.75], "counts": [2, 1]}
    assert intervals.of_entries([pooled]) == [(pytest.approx(0.75), pytest.approx(0.75))]
    assert intervals.pooled([first, entry({"a": [0.0], "b": [0.5]})]) is None
    assert intervals.pooled([first, entry({"a": [0.0, 1.0], "c": [0.5]})]) is None


def test_text_says_what_intervals_are():
    means = Means()
    for image, value in (("a", 0.0), ("b", 1.0)):
        means.add(image, "s", "iou", [value])
    assert results.text(means.rows()).splitlines() == [
        "s  iou  0.5000  [0.0000, 1.0000]  n=2",
        "[low, high]: 95 % bootstrap over images",
    ]


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


def test_entries_without_keys_are_paired_by_the_hash_of_their_images():
    first = {"x": 1.0, "y": 0.0, "z": 1.0}
    means = Means()
    for subject, values in (("a", first), ("b", {**first, "y": 1.0}), ("c", dict(reversed(first.items())))):
        means.add_each(list(values), subject, "top1", values.values())
    whole, short = (means.details(keys)[intervals.PER_IMAGE] for keys in (True, False))
    assert isinstance(short[0]["images"], str) and short[0]["counts"] == 1 and short[0]["sums"] == [1.0, 0.0, 1.0]
    assert intervals.paired(short[1], short[0]) == intervals.paired(whole[1], whole[0])
    assert intervals.paired(short[1], whole[0]) == intervals.paired(whole[1], whole[0])
    assert intervals.paired(short[0], short[2]) is None  # another order, which a hash cannot undo
    means.add("x", "a", "top1", [0.0])
    assert means.details(keys=False)[intervals.PER_IMAGE][0]["counts"] == [2, 1, 1]


def test_means_of_the_same_images_are_resampled_together_and_each_as_if_alone(monkeypatch):
    calls = []
    resampled = intervals.resampled
    monkeypatch.setattr(intervals, "resampled", lambda *arrays: calls.append(arrays) or resampled(*arrays))
    values = np.random.default_rng(0).random((2, 30))
    together, alone = Means(), [Means(), Means()]
    for metric, values_N in zip(("a", "b"), values, strict=True):
        together.add_each([str(i) for i in range(30)], "student", metric, values_N)
        alone["ab".index(metric)].add_each([str(i) for i in range(30)], "student", metric, values_N)
    rows = together.rows()
    assert len(calls) == 1
    for row, single in zip(rows, alone, strict=True):
        assert row["low"] == pytest.approx(single.rows()[0]["low"], rel=1e-12)
        assert row["high"] == pytest.approx(single.rows()[0]["high"], rel=1e-12)
