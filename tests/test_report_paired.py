"""Paired comparisons against scipy's own test, the correction for many methods, and when nothing is decided."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fmdistill import recipe
from fmdistill.evaluate import intervals
from fmdistill.evaluate.intervals import Means
from fmdistill.evaluate.results import Metric, Result, row
from fmdistill.report import paired
from fmdistill.report.rows import Run


def run(value: float, seconds: float = 10.0, ess: float = 0.5) -> Run:
    settings = recipe.load("recipes/demo/sam_mse.yaml")
    log = [
        {
            "step": 100,
            "images_per_second": 100 * settings.train.batch_size / seconds,
            "a/effective_sample_size": ess,
            "b/effective_sample_size": 1.0,
        }
    ]
    rows = [row("student", "top1", value), row("student", "mse", 1.0), row("teacher", "top1", 1)]
    metrics = {"top1": Metric("top-1", percent=True, better="higher"), "mse": Metric("feature", better="lower")}
    return Run("x", Path("x"), settings, log, {"p": Result({"name": "p"}, rows, metrics)})


def with_images(value: float, images: int = 12, seed: int = 0) -> Run:
    """Return a run whose result has the sums of its images; those of one seed have the same noise for every method."""
    means, noise = Means(), np.random.default_rng(seed).normal(size=(images, 2))
    for image in range(images):
        means.add(str(image), "student", "top1", value + 0.1 * noise[image])
        means.add(str(image), "teacher", "top1", [1.0])
    made = run(value)
    result = Result({"name": "p"}, means.rows(), made.evaluations["p"].metrics, {}, means.details()["per_image"])
    return Run("x", Path("x"), made.recipe, made.log, {"p": result})


def lines(*values: list[float], seconds: float = 10.0) -> dict[str, paired.Line]:
    runs = {f"m{i}": [run(v, seconds) for v in group] for i, group in enumerate(values)}
    return {line.method: line for line in paired.compare(runs, "p") if line.metric == "top1"}


RNG = np.random.default_rng(0)
BASE = list(0.5 + 0.01 * RNG.standard_normal(8))


def test_the_interval_is_that_of_a_paired_t_test():
    other = [v + 0.005 + 0.004 * d for v, d in zip(BASE, RNG.standard_normal(8), strict=True)]
    line = lines(BASE, other)["m1"]
    reference = stats.ttest_rel(other, BASE).confidence_interval(0.95)
    assert (line.low, line.high) == pytest.approx((reference.low, reference.high))
    assert line.mean - lines(BASE, other)["m0"].mean == pytest.approx(line.difference)
    assert line.verdict == ("better" if reference.low > 0 else "not decided") and line.seeds == 8
    assert line.deviation == pytest.approx(np.std(other, ddof=1)) and line.effective_sample_size == 0.5


@pytest.mark.parametrize(("methods", "level"), [(3, 0.95), (4, 1 - 0.05 / 3), (11, 1 - 0.05 / 10)])
def test_more_than_three_methods_are_corrected_for(methods, level):
    group = [[v + 0.01 * d for v, d in zip(BASE, RNG.standard_normal(8), strict=True)] for _ in range(methods - 1)]
    line = lines(BASE, *group)["m1"]
    reference = stats.ttest_rel(group[0], BASE).confidence_interval(level)
    assert (line.low, line.high) == pytest.approx((reference.low, reference.high))


def test_too_few_seeds_decide_nothing_and_quick_runs_need_more():
    better = [v + 0.1 for v in BASE]
    assert lines(BASE, better)["m1"].verdict == "better" and lines(better, BASE)["m1"].verdict == "worse"
    assert lines(BASE[:5], better[:5])["m1"].verdict == "not decided: 5 of 8 seeds"
    assert lines(BASE[:5], better[:5], seconds=100)["m1"].verdict == "better"
    alone = lines(BASE[:1], better[:1])["m1"]
    assert (alone.low, alone.high) == (-math.inf, math.inf) and alone.verdict == "not decided: 1 of 8 seeds"


def test_the_table_has_a_row_for_each_method_and_metric_of_the_student():
    runs = {"kd": [run(v) for v in BASE], "srw": [run(v + 0.1) for v in BASE]}
    table = paired.text(paired.compare(runs, "p"))
    assert table.count("**") == 4 and "**top1**, 8 seeds, differences to kd" in table  # no teacher
    assert "**mse**, 8 seeds" in table and "| srw | 1 | 0 | +0 | +0 to +0 | not decided |" in table
    assert "| srw |" in table and "+10.00 | +10.00 to +10.00 | better | 0.500 |" in table


def test_a_metric_of_an_unknown_name_is_shown_as_it_is_and_called_higher_or_lower():
    runs = {"kd": [run(v) for v in BASE], "srw": [run(v) for v in BASE]}
    for number, group in enumerate(runs.values()):
        for seed, seed_run in enumerate(group):
            rows = seed_run.evaluations["p"].rows
            rows += [row("student", "chamfer", 0.004 - 0.003 * number + 1e-5 * seed)]
            rows += [row("student", "latency", 3 + number), row("student", "latency", 9 - number, device="phone")]
            rows += [{"subject": "student", "metric": "odd", "value": None if seed == 3 else 1.0}]
            rows += [{"subject": "student", "metric": "only", "value": True}]
    compared = paired.compare(runs, "p")
    lines = {(line.metric, line.method): line for line in compared if not line.dimensions}
    assert {metric for metric, _ in lines} == {"top1", "mse", "chamfer", "latency"}
    (phone,) = (line for line in compared if line.dimensions and line.method == "srw")
    assert phone.dimensions == {"device": "phone"} and phone.verdict == "lower" and phone.difference == -1
    assert "**latency, phone**, 8 seeds" in paired.text(compared)
    assert lines["chamfer", "srw"].verdict == "lower" and lines["latency", "srw"].verdict == "higher"
    assert lines["chamfer", "srw"].difference == pytest.approx(-0.003)
    assert "| srw | 0.001035 | 2.449e-05 | -0.003 | -0.003 to -0.003 | lower |" in paired.text(list(lines.values()))


def test_of_a_metric_that_is_better_lower_less_is_better():
    runs = {"kd": [run(v) for v in BASE], "srw": [run(v) for v in BASE]}
    for seed_run in runs["srw"]:
        seed_run.evaluations["p"].rows[1]["value"] = 0.5
    lines = {(line.metric, line.method): line for line in paired.compare(runs, "p")}
    assert lines["mse", "srw"].verdict == "better" and lines["mse", "srw"].difference == -0.5
    swapped = {line.method: line for line in paired.compare(dict(reversed(runs.items())), "p") if line.metric == "mse"}
    assert swapped["kd"].verdict == "worse"


def test_intervals_over_images_are_beside_those_over_seeds_and_decide_nothing():
    runs = {name: [with_images(shift, seed=s) for s in range(8)] for name, shift in (("kd", 0.5), ("srw", 0.6))}
    kd, srw = paired.compare(runs, "p")
    entries = [run.evaluations["p"].per_image[0] for run in runs["srw"]]
    mean = {**entries[0], "sums": list(np.mean([entry["sums"] for entry in entries], axis=0))}
    assert srw.over_images == pytest.approx(intervals.of_entries([mean])[0])
    assert srw.over_images[0] < srw.mean < srw.over_images[1]
    assert srw.difference_over_images == pytest.approx((0.1, 0.1)) and kd.difference_over_images is None
    text = paired.text([kd, srw])
    assert "| method | mean | over images | sd | difference | over seeds | over images | | ESS |" in text.replace(
        "|  |", "| |"
    )
    low, high = (f"{100 * end:.2f}" for end in srw.over_images)
    assert f"| srw | {100 * srw.mean:.2f} | {low} to {high} |" in text
    assert "| +10.00 | +10.00 to +10.00 | +10.00 to +10.00 | better |" in text
    assert "over seeds: Student's t interval of the paired differences, by which the verdict is; over images:" in text


def test_with_more_than_three_methods_the_intervals_over_images_are_corrected_too():
    shifts = (0.5, 0.6, 0.7, 0.8)
    runs = {f"m{i}": [with_images(shift, seed=i)] for i, shift in enumerate(shifts)}
    compared = paired.compare(runs, "p")
    entries = [members[0].evaluations["p"].per_image[0] for members in runs.values()]
    expected = intervals.paired(entries[3], entries[0], 1 - 0.05 / 3)
    assert compared[3].difference_over_images == pytest.approx(expected[1:])
    assert "Intervals at 95 %, of differences 98.33 %; over seeds" in paired.text(compared)


def test_seeds_judged_on_other_images_have_no_interval_over_images():
    runs = {"kd": [with_images(0.5), with_images(0.5, images=11)], "srw": [with_images(0.6), with_images(0.6)]}
    kd, srw = paired.compare(runs, "p")
    assert kd.over_images is None and srw.over_images is not None and srw.difference_over_images is None
