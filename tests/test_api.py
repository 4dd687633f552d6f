"""Tests of the Python API: its functions at toy size, the page that describes it, and how it is imported."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import clip_run
import PIL.Image
import pytest
import tiny

import fmdistill
from fmdistill import recipe
from fmdistill.mini.clip import clip_mini_student
from fmdistill.registry import UserError
from fmdistill.settings import as_overrides, nested

ROOT = Path(__file__).parent.parent


def in_python(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_neither_torch_nor_omegaconf():
    in_python(
        "import sys, fmdistill\n"
        "assert not {'torch', 'omegaconf', 'numpy', 'yaml', 'tqdm'} & set(sys.modules)\n"
        "assert {'run', 'cache', 'evaluate', 'compare', 'init', 'export', 'load', 'plan'} <= set(dir(fmdistill))\n"
        "assert fmdistill.run.__module__ == fmdistill.init.__module__ == 'fmdistill.api'\n"
        "assert 'torch' not in sys.modules\n"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import fmdistill\nfmdistill.cache\nfrom fmdistill.cache import finished, order",
        "from fmdistill.cache import finished\nimport fmdistill",
        "import fmdistill.cache.store as store\nimport fmdistill",
        "from fmdistill import cache\nimport fmdistill\nassert cache is fmdistill.cache",
        "import fmdistill\nfmdistill.run\nimport fmdistill.cache as cache\nassert cache is fmdistill.cache",
    ],
)
def test_a_stage_is_a_function_and_a_package_in_any_order_of_imports(imports):
    in_python(
        f"{imports}\nimport inspect, types\n"
        "import fmdistill.cache.finished\n"
        "assert callable(fmdistill.cache) and isinstance(fmdistill.cache, types.ModuleType)\n"
        "assert fmdistill.cache.finished.is_live(None) is False\n"
        "assert list(inspect.signature(fmdistill.cache).parameters) == ['recipe', 'overrides', 'settings']\n"
        "import fmdistill.api\n"
        "try:\n    fmdistill.cache('nowhere.yaml')\nexcept ValueError as error:\n    assert 'nowhere' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )


def test_every_stage_s_function_has_the_package_s_names_beside_it():
    from fmdistill import api, evaluate, export

    assert evaluate is fmdistill.evaluate and evaluate.EVALUATORS and export.FORMATS
    for name in fmdistill.__all__:
        assert inspect.signature(getattr(fmdistill, name)) == inspect.signature(getattr(api, name))
        assert inspect.getdoc(getattr(api, name))
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        fmdistill.evaluat  # noqa: B018


def test_settings_may_be_a_list_a_flat_or_a_nested_mapping(tmp_path):
    path = tiny.write(tmp_path)
    loaded = recipe.load(path, ["train.steps=7", "seed=2", "images.limit=3"])
    assert recipe.load(path, {"train.steps": 7, "seed": 2, "images.limit": "3"}).train == loaded.train
    assert recipe.load(path, {"train": {"steps": 7}, "seed": 2, "images": {"limit": "3"}}) == loaded
    assert recipe.load(path, {"out": tmp_path / "a"}).out == str(tmp_path / "a")
    with pytest.raises(UserError, match="train.stepps: no such setting.*Did you mean 'steps'"):
        fmdistill.run(path, {"train.stepps": 7})


def test_settings_become_arguments_of_the_command_line():
    settings = {"train.steps": 7, "train": {"clip": None}, "protocols": ["a.yaml"], "out": Path("x"), "trust": True}
    texts = ["train.steps=7", "train.clip=null", 'protocols=["a.yaml"]', "out=x", "trust=true"]
    assert as_overrides(settings) == texts


def test_dotted_and_nested_settings_of_one_component_belong_together():
    assert nested({"a.b": 1, "a": {"c.d": 2}}) == {"a": {"b": 1, "c": {"d": 2}}}
    assert nested({"a.root": 1, "a.name": "x"}, {"a.root": 2}) == {"a": {"root": 2, "name": "x"}}
    assert nested({"a": 1, "a.b": 2}) == {"a": {"b": 2}} and nested({"a.b": 2, "a": 1}) == {"a": 1}


def test_a_run_returns_its_folder_and_its_rows(tmp_path):
    protocol = tmp_path / "cosine.yaml"
    protocol.write_text("name: cosine\nworkers: 0\n")
    path = tiny.write(tmp_path)
    result = fmdistill.run(path, {"train.steps": 2}, protocols=[str(protocol)])
    assert result.out == tmp_path / "run" and (result.out / "student.safetensors").is_file()
    (rows,) = result.rows.values()
    assert {row["subject"] for row in rows} == {"student", "mean embedding"} and "cosine" in str(result)
    assert fmdistill.evaluate(protocol, result, trust=True) == rows
    changed = fmdistill.evaluate(protocol, result, {"floor": False}, trust=True)
    assert {row["subject"] for row in changed} == {"student"}
    loaded = recipe.load(path, {"train.steps": 2, "protocols": [str(protocol)]})
    assert fmdistill.run(loaded) == result
    other = fmdistill.run(loaded, seed=1, out=tmp_path / "other", protocols=[])
    assert (other.out, other.rows) == (tmp_path / "other", {})


def test_caching_returns_the_opened_cache_and_repeats_nothing(tmp_path):
    path = tiny.write(tmp_path)
    cached = fmdistill.cache(path, {"images.limit": 8})
    before = {file.name: file.stat().st_mtime_ns for file in cached.root.iterdir()}
    assert cached.root == tmp_path / "cache" and cached.manifest["family"] == "sam"
    fmdistill.cache(path, images={"limit": 8})
    assert {file.name: file.stat().st_mtime_ns for file in cached.root.iterdir()} == before


@pytest.mark.slow
def test_the_page_s_examples_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs/python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 7
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        PIL.Image.new("RGB", (64, 48), (20 * number, 90, 9)).save(tmp_path / f"photos/{number}.png")
    clip = recipe.load("recipes/mini/clip_mini.yaml", ["out=runs/clip"])
    clip_run.finish(clip, clip_mini_student("packaged"))
    namespace: dict = {}
    for block in blocks:
        small = block.replace("/data/mine", f"{tmp_path}/photos").replace("100", "1")  # steps
        small = small.replace('"plan.images": 8', '"plan.images": 1, "plan.steps": 1')
        exec(small, namespace)
        if "init(" in block:  # masks take long
            path = tmp_path / "mine.yaml"
            path.write_text(path.read_text().replace("eval/sam_grid_quick.yaml", "eval/cosine.yaml"))
    output = capsys.readouterr().out
    assert "12 images (.png)" in output and "Did you mean 'steps'" in output
    assert (tmp_path / "mobile_sam.pt").is_file() and (tmp_path / "runs/second").is_dir()
    assert namespace["masks"].shape == (3, 48, 64) and namespace["refined"].shape == (1, 48, 64)
    assert namespace["two"].shape == (2, 3, 48, 64) and isinstance(namespace["segments"], list)
    assert namespace["similarities"].shape == (2, 2) and namespace["probabilities"].shape == (1, 2)
    assert "weighting=srw" in output and os.path.isfile("runs/compared/comparison.md")
