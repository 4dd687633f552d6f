"""AP and AR: equal to pycocotools and to the other tools' rules on the same masks, and exact where arithmetic says."""

import contextlib
import copy
import io

import numpy as np
import pytest
from detection_toys import annotated
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fmdistill.evaluate import intervals, precision
from fmdistill.evaluate.matching import Rules, counted
from fmdistill.evaluate.precision import Precision

COCO_RULES = Rules()
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100"]


def collected(dataset: dict, results: list[dict], rules: Rules = COCO_RULES) -> Precision:
    """Match every image of a data set in COCO's layout."""
    groups = {c["id"]: c["frequency"] for c in dataset["categories"]} if rules.federated else {}
    gathered = Precision(rules, groups)
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
