"""AP and AR equal those of lvis-api and boundary-iou-api on the same masks; skipped without these packages.

pip install lvis; boundary_iou is github.com/bowenc0221/boundary-iou-api. Both need OpenCV and numpy's old names.
"""

import contextlib
import copy
import importlib
import io
import json

import numpy as np
import pytest
from detection_toys import annotated
from test_evaluate_precision import collected

from fmdistill.evaluate.matching import Rules


def equal(figures: dict[str, float], theirs: dict[str, float]) -> None:
    expected = {name: np.nan if value < 0 else value for name, value in theirs.items()}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert np.isfinite(list(expected.values())).sum() >= 8


@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.parametrize("limit", [300, 5])
def test_lvis_api_has_the_same_figures(tmp_path, monkeypatch, seed, limit):
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)
    dataset, results = annotated(seed, images=25, categories=9, crowds=False, lvis=True)
    (tmp_path / "lvis.json").write_text(json.dumps(dataset))
    truth = lvis.LVIS(str(tmp_path / "lvis.json"))
    evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, copy.deepcopy(results), max_dets=limit), "segm")
    evaluation.params.max_dets = limit
    evaluation.run()
    equal(collected(dataset, results, Rules((limit,), federated=True)).figures(), evaluation.results)


@pytest.mark.parametrize("seed", range(10, 14))
def test_boundary_iou_api_has_the_same_figures(monkeypatch, seed):
    utils = pytest.importorskip("boundary_iou.utils.boundary_utils")
    coco, cocoeval = (
        importlib.import_module(f"boundary_iou.coco_instance_api.{name}") for name in ("coco", "cocoeval")
    )
    monkeypatch.setattr(np, "float", float, raising=False)
    monkeypatch.setattr(  # not in processes
        coco,
        "augment_annotations_with_boundary_multi_core",
        lambda *given, **named: utils.augment_annotations_with_boundary_single_core(0, *given, **named),
    )
    dataset, results = annotated(seed, images=25, categories=9)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(get_boundary=False, dilation_ratio=0.02)
        truth.dataset = copy.deepcopy(dataset)
        truth.createIndex()
        truth.get_boundary = True
        truth.createIndex()
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "boundary")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = collected(dataset, results, Rules(boundary=0.02)).figures()
    equal(figures, dict(zip(figures, evaluation.stats, strict=True)))
