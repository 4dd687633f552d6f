"""Each named protocol equals a plain loop over segment_anything's SamPredictor, written from its description."""

from pathlib import Path
from typing import Any

import numpy as np
import plain_prompts
import pytest
from plain_prompts import BASE, NAMED, check_equal, plain, protocol

from fmdistill import recipe


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    return plain_prompts.toys(tmp_path_factory.mktemp("prompted"))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return plain_prompts.models()


@pytest.fixture(scope="module")
def loaded():
    return recipe.load("recipes/mini/sam_mini.yaml")


BOX = {"prompt": "box", "clicks": [0, 2]}
QUICK = ("coco_boxes", "sa1b_clicks", "edgesam_coco_click")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMED])
def test_a_named_protocol_equals_a_plain_loop_over_the_predictor(toys, models, loaded, name):
    rules = NAMED[name]
    overrides = {"per_image": 1} if "most" in rules else {}
    chosen = models if name == "coco_boxes" else {"worse": models["worse"]}
    rows, details = protocol(name, toys, **overrides).judge(loaded, dict(chosen))
    for model_name, model in chosen.items():
        expected = plain(toys, model, rules)
        scores = [s[0] for s in expected[max(rules["clicks"])]]
        assert 0.05 < np.mean(scores) < 0.97 and np.ptp(scores) > 0.1, "the scores are degenerate"
        check_equal(rows, model_name, expected)
    assert len(details["per_image"][0]["images"]) == 3


@pytest.mark.parametrize(
    ("settings", "rules"),
    [
        ({"select": "oracle", "first_click": "box_centre"}, {"choice": "oracle", "first": "box_centre"}),
        ({"mask_input": True, "first_click": "point"}, {"feed": True, "first": "point"}),
        (
            {"prompt": "box", "clicks": [0, 2], "select": "single"},
            {"prompt": "box", "clicks": [0, 2], "choice": "first"},
        ),
    ],
)
def test_every_choice_equals_a_plain_loop(toys, models, loaded, settings, rules):
    overrides = {"clicks": [1, 2], "min_area": 0, **settings}
    rows, _ = protocol("sa1b_clicks", toys, **overrides).judge(loaded, {"worse": models["worse"]})
    check_equal(rows, "worse", plain(toys, models["worse"], {**BASE, **rules}))
