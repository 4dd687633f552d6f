"""Too little memory: the error names the settings, and `auto` finds the parts that fit, the same ones each time."""

import pytest
import spoiled
import tiny
import yaml
from test_distill import rows, same, weights

from fmdistill import distill, recipe
from fmdistill.registry import UserError

HUNGRY = "student.name=spoiled:Hungry"


def test_the_error_names_the_settings_with_their_values_and_the_ways_out(cached, monkeypatch):
    with pytest.raises(UserError) as error:
        distill.run(tiny.load(cached, HUNGRY, "train.accumulate=2"))
    assert str(error.value) == (
        "step 1: the memory of cpu is full with 4 images at once (train.batch_size=8, train.accumulate=2, "
        "train.precision=fp32); set train.accumulate=4 or train.batch_size=auto, which leave a step's images the same; "
        "or set train.precision=bf16"
    )
    monkeypatch.setattr(spoiled.Hungry, "LIMIT", 0)
    for accumulate, begin in (("8", "step 1: "), ("auto", "train.accumulate=auto: ")):
        with pytest.raises(UserError, match=f"{begin}the memory of cpu is full with 1 images") as error:
            distill.run(tiny.load(cached, HUNGRY, f"train.accumulate={accumulate}", "train.precision=bf16"))
        assert str(error.value).endswith("; choose a smaller student, or a larger device")


def test_auto_picks_the_same_size_twice_and_gives_the_curve_of_that_size(cached):
    """3 images fit, so 8 are taken in 4 parts of 2, the fewest equal ones."""
    settings = [HUNGRY, "train.ema=0.9"]
    runs = [distill.run(tiny.load(cached, *settings, "train.batch_size=auto", f"out={cached}/{n}")) for n in "ab"]
    fixed = distill.run(tiny.load(cached, *settings, "train.accumulate=4", f"out={cached}/fixed"))
    for run in runs:
        saved = yaml.safe_load((run / "recipe.yaml").read_text())["train"]
        assert (saved["batch_size"], saved["accumulate"]) == (8, 4)
        assert same(weights(run), weights(fixed)) and rows(run) == rows(fixed)


def test_a_resumed_run_uses_the_size_that_it_began_with(cached, monkeypatch):
    recipe = tiny.load(cached, HUNGRY, "train.batch_size=auto")
    run = distill.run(recipe)
    expected = weights(run)
    (run / "student.safetensors").unlink()
    (run / "checkpoints/step-00000012/state.json").unlink()
    monkeypatch.setattr(spoiled.Hungry, "LIMIT", 8)
    assert same(weights(distill.run(recipe)), expected)
    assert same(weights(distill.run(tiny.load(cached, HUNGRY, "train.accumulate=4"))), expected)
    with pytest.raises(UserError, match=r"train\.accumulate is 4 in the run and 2 in the recipe"):
        distill.run(tiny.load(cached, HUNGRY, "train.accumulate=2"))


def test_auto_as_batch_size_leaves_the_number_that_a_recipe_has(tmp_path):
    assert tiny.load(tmp_path, "train.batch_size=auto").train.batch_size == 8
    assert tiny.load(tmp_path, "train.batch_size=auto").train.accumulate == "auto"
    assert tiny.load(tmp_path, "train.accumulate=4").train.accumulate == 4
    text = tiny.RECIPE.format(folder=tmp_path)
    (tmp_path / "alone.yaml").write_text(text.replace("batch_size: 8", "batch_size: auto"))
    (tmp_path / "child.yaml").write_text(f"extends: {tmp_path}/tiny.yaml\ntrain: {{batch_size: auto}}\n")
    tiny.write(tmp_path)
    for name, size in (("alone", 16), ("child", 8)):
        train = recipe.load(tmp_path / f"{name}.yaml").train
        assert (train.batch_size, train.accumulate) == (size, "auto")
    with pytest.raises(UserError, match=r"train\.batch_size=auto, train\.accumulate=2: auto chooses train\.accumulate"):
        tiny.load(tmp_path, "train.batch_size=auto", "train.accumulate=2")
    for wrong in ("half", "2.5"):
        with pytest.raises(UserError, match=rf"accumulate='?{wrong}'?: expected int or auto, got"):
            tiny.load(tmp_path, f"train.accumulate={wrong}")
    with pytest.raises(UserError, match="expected at least 1"):
        tiny.load(tmp_path, "train.accumulate=0")
