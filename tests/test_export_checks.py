import logging
from types import SimpleNamespace

import numpy as np
import pytest

from fmdistill.export import checks
from fmdistill.registry import UserError


def test_pictures_are_the_recipe_s_own_spread_over_the_split(caplog):
    caplog.set_level(logging.INFO)
    recipe = SimpleNamespace(images={"name": "photos", "train": 8, "validation": 6, "size": 64, "shard_size": 4})
    three, six = (checks.pictures(recipe, "validation", count) for count in (3, 6))  # type: ignore[arg-type]
    assert [np.array_equal(three[i], six[2 * i]) for i in range(3)] == [True] * 3
    assert len(checks.pictures(recipe, "validation", 20)) == 6  # type: ignore[arg-type]
    assert not np.array_equal(checks.pictures(recipe, "train", 1)[0], six[0])  # type: ignore[arg-type]
    assert "not at hand" not in caplog.text


def test_photographs_stand_in_for_images_that_are_not_at_hand(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recipe = SimpleNamespace(images={"name": "folder", "root": str(tmp_path / "gone")})
    pictures = checks.pictures(recipe, "validation", 6)  # type: ignore[arg-type]
    shapes = [picture.shape[:2] for picture in pictures]
    assert len(shapes) == 6 and any(h == w for h, w in shapes) and any(h > w for h, w in shapes)
    assert "not at hand" in caplog.text


def test_the_relative_error_is_that_of_norms_and_infinite_for_nan():
    assert checks.relative_error(np.array([3.0, 0.0]), np.array([3.0, 4.0])) == pytest.approx(0.8)
    assert checks.relative_error(np.array([np.nan, 1.0]), np.ones(2)) == float("inf")


def test_a_figure_below_its_limit_is_one_line_that_says_how_to_accept_it():
    checks.require({"miou": 0.9}, "miou", 0.9, "min_miou", "export onnx")
    for value in (0.899, float("nan")):
        with pytest.raises(UserError, match="export onnx: .* below min_miou=0.9; nothing was written") as error:
            checks.require({"miou": value}, "miou", 0.9, "min_miou", "export onnx")
        assert "\n" not in str(error.value)
