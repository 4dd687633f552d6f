"""AP and AR: equal to pycocotools and to the other tools' rules on the same masks, and exact where arithmetic says."""

import contextlib
import copy
import io
from typing import Any

import numpy as np
import pytest
from detection_toys import annotated
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fmdistill.evaluate import intervals, precision
from fmdistill.evaluate.faster_precision import FasterPrecision
from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.matching import IOUS_T, Matches, Rules, counted
from fmdistill.evaluate.precision import Precision

COCO_RULES = Rules()
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100"]


def collected(dataset: dict, results: list[dict], rules: Rules = COCO_RULES, scorer=Precision) -> Any:
    """Match every image of a data set in COCO's layout."""
    groups = {c["id"]: c["frequency"] for c in dataset["categories"]} if rules.federated else {}
    gathered = scorer(rules, groups)
    for image in sorted(dataset["images"], key=lambda one: one["id"]):
        objects = [a for a in dataset["annotations"] if a["image_id"] == image["id"]]
        detections = [r for r in results if r["image_id"] == image["id"]]
        lists = [[d[name] for d in detections] for name in ("category_id", "score")]
        annotated_here = {a["category_id"] for a in objects}
        chosen = counted(*lists, annotated_here, image.get("neg_category_ids", ()), rules)
        unfinished = image.get("not_exhaustive_category_ids", ())
        gathered.add(objects, [detections[i] for i in chosen], unfinished)
    return gathered


def by_hand(dataset: dict, results: list[dict], **params) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "segm")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_those_of_pycocotools_by_hand(seed):
    dataset, results = annotated(seed)
    figures = collected(dataset, results).figures()
    expected = np.where(by_hand(dataset, results).stats < 0, np.nan, by_hand(dataset, results).stats)
    assert list(figures) == NAMES
    assert 0.05 < figures["AP"] < 0.95
    np.testing.assert_allclose(list(figures.values()), expected, rtol=0, atol=1e-12)


def test_without_classes_figures_equal_those_of_pycocotools_without_categories():
    dataset, results = annotated(3)
    figures = collected(dataset, results, Rules(limits=(1, 10, 1000), classes=False)).figures()
    expected = by_hand(dataset, results, useCats=0, maxDets=[1, 10, 1000])
    assert figures["AR@1000"] == pytest.approx(expected.eval["recall"][:, 0, 0, 2].mean(), abs=1e-12)
    assert figures["AR@1"] == pytest.approx(expected.eval["recall"][:, 0, 0, 0].mean(), abs=1e-12)
    assert figures["AP"] == pytest.approx(expected.eval["precision"][:, :, 0, 0, 2].mean(), abs=1e-12)


@pytest.mark.parametrize("rules", [Rules(), Rules(boundary=0.02), Rules((300,), federated=True)])
def test_resamples_with_weights_of_one_equal_the_figures(rules):
    dataset, results = annotated(4, lvis=rules.federated)
    gathered = collected(dataset, results, rules)
    ones = np.ones((2, gathered.images))
    tables = [precision.weighted(m, ones[:, n], rules) for n, m in gathered.by_category.values()]
    references = [precision.accumulate(m, rules) for _, m in gathered.by_category.values()]
    for table, reference in zip(tables, references, strict=True):
        for resample in range(2):
            np.testing.assert_allclose(table.precision[resample], reference.precision, rtol=0, atol=1e-12)
            np.testing.assert_allclose(table.recall[resample], reference.recall, rtol=0, atol=1e-12)


def test_a_resample_equals_pycocotools_on_copies_of_the_images(monkeypatch):
    dataset, results = annotated(5, images=8)
    for number, result in enumerate(results):
        result["score"] = (result["score"] + number) / (len(results) + 1)  # all different: copies only tie themselves
    monkeypatch.setattr(precision, "RESAMPLES", 4)
    resampled = collected(dataset, results).resampled()
    weights = np.concatenate(list(intervals.resamples(8, count=4)))
    ids = sorted(image["id"] for image in dataset["images"])
    for number, weight in enumerate(weights):
        copies = {"images": [], "annotations": [], "categories": dataset["categories"]}
        copied = []
        for old, times in zip(ids, weight, strict=True):
            for _ in range(int(times)):
                new = len(copies["images"]) + 1
                copies["images"].append({**next(i for i in dataset["images"] if i["id"] == old), "id": new})
                for a in dataset["annotations"]:
                    if a["image_id"] == old:
                        copies["annotations"].append({**a, "id": len(copies["annotations"]) + 1, "image_id": new})
                copied += [{**r, "image_id": new} for r in results if r["image_id"] == old]
        expected = by_hand(copies, copied).stats
        got = [resampled[name][number] for name in NAMES]
        np.testing.assert_allclose(got, np.where(expected < 0, np.nan, expected), rtol=0, atol=1e-12)


def square(x: int, y: int, side: int, size: int = 100) -> dict:
    mask_HW = np.zeros((size, size), bool)
    mask_HW[y : y + side, x : x + side] = True
    return to_rle(mask_HW)


def objects(*squares: tuple, category: int = 1) -> list[dict]:
    return [{"category_id": category, "segmentation": square(*s), "area": s[2] ** 2, "iscrowd": 0} for s in squares]


def detected(*squares: tuple, category: int = 1, score: float = 0.5) -> list[dict]:
    return [{"category_id": category, "segmentation": square(*s), "score": score} for s in squares]


def test_a_perfect_predictor_has_1_and_a_shifted_one_what_arithmetic_says():
    gathered = {name: Precision(Rules(boundary=b)) for name, b in (("mask", None), ("boundary", 0.02))}
    perfect = {name: Precision(Rules(boundary=b)) for name, b in (("mask", None), ("boundary", 0.02))}
    places = [(10, 10, 20), (50, 60, 20), (60, 5, 40), (0, 70, 30)]
    for name in gathered:
        perfect[name].add(objects(*places), detected(*places))
        gathered[name].add(objects(*places[:2]), detected(*((x + 2, y, side) for x, y, side in places[:2])))
    for figures in (scorer.figures() for scorer in perfect.values()):
        known = {name: value for name, value in figures.items() if not name.endswith("l@100") and name != "APl"}
        # to the spacing that pycocotools adds to its denominators; one detection of four objects
        assert known == pytest.approx({name: 0.25 if name == "AR@1" else 1 for name in known}, abs=1e-15)
    # 18 of 22 columns overlap: 0.818 passes seven of the ten thresholds
    assert gathered["mask"].figures()["AP"] == pytest.approx(0.7)
    assert gathered["mask"].figures()["AR@100"] == pytest.approx(0.7)
    # bands of round(0.02 * 141.4) = 3 pixels have 20^2 - 14^2 = 204 pixels each. Of their rows, the six at top and
    # bottom share 18 pixels, the 14 others only column 18 or 19 of either side's: 1 + 1
    shared = 6 * 18 + 14 * 2
    overlap = shared / (2 * 204 - shared)  # 0.5 and no more
    assert overlap == pytest.approx(0.5)
    assert gathered["boundary"].figures()["AP"] == pytest.approx(0.1)


def test_lvis_counts_only_what_was_stated_about_an_image():
    """Four classes: 1 annotated; 2 not exhaustively; 3 stated to be absent from the first image; 4 not stated there."""
    rules = Rules((300,), federated=True)
    gathered = Precision(rules, {1: "r", 2: "c", 3: "f", 4: "f"})
    first = objects((0, 0, 20), category=1) + objects((40, 0, 20), category=2)
    found = detected((0, 0, 20), category=1, score=0.9) + detected((40, 0, 20), category=2, score=0.8)
    # each would be a false positive before a right one
    for category in (2, 3, 4):
        found += detected((70, 70, 20), category=category, score=0.99)
    categories, scores = [one["category_id"] for one in found], [one["score"] for one in found]
    chosen = counted(categories, scores, {1, 2}, {3}, rules)
    assert [categories[i] for i in chosen] == [1, 2, 2, 3]
    gathered.add(first, [found[i] for i in chosen], unfinished={2})
    second = objects((0, 0, 20), category=3) + objects((40, 0, 20), category=4)
    right = detected((0, 0, 20), category=3, score=0.5) + detected((40, 0, 20), category=4, score=0.5)
    gathered.add(second, right)
    figures = gathered.figures()
    assert figures["AP"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert (figures["APr"], figures["APc"], figures["APf"]) == pytest.approx((1, 1, 0.75))
    assert figures["AR@300"] == 1


def test_lvis_limits_the_detections_of_an_image_coco_those_of_a_class():
    lists = [1, 2, 1, 2], [0.1, 0.9, 0.5, 0.7]
    assert counted(*lists, {1, 2}, (), Rules((1, 2), federated=True)) == [1, 3]
    assert counted(*lists, {1, 2}, (), Rules((1, 2))) == [0, 1, 2, 3]
    gathered = Precision(Rules((1, 2)))
    gathered.add(objects((0, 0, 20)), detected((50, 50, 20), score=0.9) + detected((0, 0, 20), score=0.5))
    assert (gathered.figures()["AR@1"], gathered.figures()["AR@2"]) == (0, 1)
    assert list(gathered.figures()) == [*NAMES[:6], "AR@1", "AR@2", "ARs@2", "ARm@2", "ARl@2"]


def test_a_crowd_takes_any_number_of_detections_and_is_no_miss():
    gathered = Precision(Rules())
    crowd = [{**one, "iscrowd": 1} for one in objects((40, 40, 60))]
    found = detected((0, 0, 20), score=0.1) + detected((40, 40, 20), (60, 60, 20), (70, 50, 20), score=0.9)
    gathered.add(objects((0, 0, 20)) + crowd, found)
    assert gathered.figures()["AP"] == pytest.approx(1)
    gathered.add(objects((0, 0, 20)), [])
    assert gathered.figures()["AP"] == pytest.approx(51 / 101)  # the recalls up to a half


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("lvis", [False, True])
@pytest.mark.parametrize("ratio", [None, 0.02])
def test_faster_coco_eval_has_the_same_figures(lvis, ratio, classes):
    pytest.importorskip("faster_coco_eval")
    dataset, results = annotated(6, crowds=not lvis, lvis=lvis)
    rules = Rules((300,) if lvis else (1, 10, 100), federated=lvis, classes=classes, boundary=ratio)
    for detections in (results, []):
        plain, faster = (collected(dataset, detections, rules, scorer) for scorer in (Precision, FasterPrecision))
        assert faster.figures() == pytest.approx(plain.figures(), abs=1e-12, nan_ok=True)


def simulated(generator: np.random.Generator, classes: int) -> dict[int, Matches]:
    """Return an image of a level of its own: objects that are found or not, more or less well, and wrong detections."""
    level, made = generator.beta(4, 2), {}
    for category in range(classes):
        objects, wrong = generator.poisson(0.8), generator.poisson(0.7)
        hit = generator.random(objects) < 0.5 + 0.5 * level
        quality = (level + 0.15 * generator.normal(size=objects))[hit]
        scores = np.concatenate([generator.beta(5, 2, hit.sum()), generator.beta(2, 4, wrong)])
        right = np.concatenate([quality[:, None] >= IOUS_T, np.zeros((wrong, len(IOUS_T)), bool)])
        order = np.argsort(-scores)
        if objects + wrong:
            matched = right[order].T[None]
            made[category] = Matches(scores[order], matched, np.zeros_like(matched), np.array([objects]))
    return made


@pytest.mark.slow
def test_intervals_hold_the_mean_of_such_sets_about_as_often_as_they_say(monkeypatch):
    """Two hundred sets of 60 images: AP depends on a set's size, so its mean over sets of 60 is the truth."""
    monkeypatch.setattr(precision, "AREAS", {"all": [0, 1e10]})
    generator, sets = np.random.default_rng(5), []
    for _ in range(200):
        gathered = Precision(Rules((100,)))
        for _ in range(60):
            gathered.add_matches(simulated(generator, 2))
        tables = [precision.weighted(m, np.ones((1, len(n))), gathered.rules) for n, m in gathered.by_category.values()]
        value = float(np.mean([table.precision for table in tables]))
        sets.append((value, precision.interval(value, gathered.resampled()["AP"], gathered.images)))
    truth = np.mean([value for value, _ in sets])
    held = sum(low <= truth <= high for _, (low, high) in sets)
    assert 180 <= held <= 196


def test_an_interval_s_middle_is_the_figure():
    assert precision.interval(0.5, np.linspace(0.5, 0.7, 201), 10**6) == pytest.approx((0.405, 0.595))
    assert precision.interval(1.0, np.ones(200), 9) == (1, 1)
    assert precision.interval(0.01, np.linspace(0.0, 0.2, 201), 9)[0] == 0
