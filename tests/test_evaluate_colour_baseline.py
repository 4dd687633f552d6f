import numpy as np
import pytest
import torch

from fmdistill import evaluate, recipe
from fmdistill.backbones.clip_mini import clip_mini_student
from fmdistill.evaluate import colour_baseline, zeroshot
from fmdistill.evaluate.colour_baseline import CaptionedZeroshot, guess, nearest_colour
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.images.captioned import Captioned, class_names
from fmdistill.images.figures import COLOURS
from fmdistill.recipe import locate
from fmdistill.registry import UserError

PROTOCOL = "eval/clip_mini_zeroshot.yaml"


def test_the_class_file_is_the_sources_labels():
    for path in (PROTOCOL, "eval/clip_zeroshot_demo.yaml"):
        settings = evaluate.load(path).settings
        names = (settings.zeroshot if path == PROTOCOL else settings).classnames
        assert locate(names).read_text().splitlines() == class_names()


def test_the_nearest_colour_is_that_of_the_middle():
    for name, reference in COLOURS.items():
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:] = (0, 255, 255)
        picture[16:48, 16:48] = reference
        assert nearest_colour(picture) == name


def test_a_guess_is_worth_its_share_of_the_classes_of_that_colour():
    names = ["plain red star", "striped red star", "plain blue star", "dark redwood"]
    red = np.full((8, 8, 3), COLOURS["red"], np.uint8)
    assert [guess(red, label, names) for label in range(4)] == [0.5, 0.5, 0.0, 0.0]
    assert guess(np.full((8, 8, 3), COLOURS["green"], np.uint8), 0, names) == 0.0


def test_the_baselines_stand_beside_the_students_score(tmp_path):
    settings = recipe.load("recipes/mini/clip_mini.yaml", ["images.validation=51", f"out={tmp_path}"])
    protocol = evaluate.load(PROTOCOL, {"zeroshot": {"workers": 0}})
    assert isinstance(protocol.settings, CaptionedZeroshot) and protocol.judge is colour_baseline.judge
    torch.manual_seed(0)
    models = {"student": clip_mini_student().eval()}
    metrics, details = colour_baseline.judge(protocol.settings, settings, models)
    alone, rows = zeroshot.judge(protocol.settings.zeroshot, settings, models)
    assert {key: metrics[key] for key in alone} == alone and details == rows
    assert metrics["chance/top1"] == 1 / 256 and metrics["chance/top5"] == 5 / 256
    source = Captioned(validation=51, validation_combinations="unseen")
    shown = [source.attributes("validation", index) for index in range(51)]
    assert [row["label"] for row in details["rows"]] == [class_names().index(one.name) for one in shown]
    # Above a guess among all, and far below the 1/32 of naming every colour.
    assert 1 / 256 < metrics["nearest colour/top1"] < 1 / 32
    assert metrics["nearest colour/top5"] == pytest.approx(5 * metrics["nearest colour/top1"])


def test_classes_without_colours_are_refused():
    with pytest.raises(UserError, match="no name holds a colour"):
        CaptionedZeroshot(Zeroshot(classnames="eval/imagenet_zeroshot.yaml"))
