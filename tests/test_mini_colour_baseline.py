import numpy as np
import pytest
import torch

from fmdistill import evaluate, recipe
from fmdistill.evaluate.results import value
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.mini.captioned import Captioned, class_names
from fmdistill.mini.clip import clip_mini_student
from fmdistill.mini.colour_baseline import CaptionedZeroshot, guess, nearest_colour
from fmdistill.mini.figures import COLOURS
from fmdistill.recipe import locate
from fmdistill.registry import UserError

PROTOCOL = "eval/clip_mini_zeroshot.yaml"


def test_the_class_file_is_the_sources_labels():
    for path in (PROTOCOL, "eval/clip_zeroshot_demo.yaml"):
        evaluator = evaluate.load(path).evaluator
        names = (evaluator.zeroshot if path == PROTOCOL else evaluator).classnames
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


@pytest.mark.slow
def test_the_baselines_stand_beside_the_students_score(tmp_path):
    settings = recipe.load("recipes/mini/clip_mini.yaml", ["images.validation=51", f"out={tmp_path}"])
    evaluator = evaluate.load(PROTOCOL, {"zeroshot": {"workers": 0}}).evaluator
    assert isinstance(evaluator, CaptionedZeroshot)
    torch.manual_seed(0)
    models = {"student": clip_mini_student().eval()}
    rows, details = evaluator.judge(settings, models)
    alone, images = evaluator.zeroshot.judge(settings, models)
    assert rows[: len(alone)] == alone and details == images
    assert value(rows, "top1", "chance") == 1 / 256 and value(rows, "top5", "chance") == 5 / 256
    source = Captioned(validation=51, validation_combinations="unseen")
    shown = [source.attributes("validation", index) for index in range(51)]
    assert [image["label"] for image in details["images"]] == [class_names().index(one.name) for one in shown]
    # Above a guess among all, and far below the 1/32 of naming every colour.
    top1, top5 = (value(rows, metric, "nearest colour") for metric in ("top1", "top5"))
    assert 1 / 256 < top1 < 1 / 32 and top5 == pytest.approx(5 * top1)


def test_classes_without_colours_are_refused():
    with pytest.raises(UserError, match="no name holds a colour"):
        CaptionedZeroshot(Zeroshot(classnames="eval/imagenet_zeroshot.yaml"))
