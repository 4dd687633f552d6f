"""Tests of list, explain, show, init and --version on the command line."""

import io
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import yaml

import fmdistill
from fmdistill import recipe
from fmdistill.cli import describe, main


def printed(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def error(capsys, *argv: object) -> str:
    assert main([str(argument) for argument in argv]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code and capsys.readouterr().out == f"fmdistill {fmdistill.__version__}\n"


def test_list_and_version_import_no_torch():
    script = (
        "import sys\nfrom fmdistill.cli import main\nassert main(['list']) == 0\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_list_prints_a_line_for_each_name_and_filters_by_kind(capsys):
    everything = printed(capsys, "list")
    for name in ("recipes/sam/mobilesam.yaml", "recipes/studies/digits", "eval/cosine.yaml", "sam_vit_h", "srw"):
        assert f"  {name} " in everything
    recipes = printed(capsys, "list", "recipes")
    assert "  recipes/sam/mobilesam.yaml " in recipes and "eval/" not in recipes.split("`fmdistill")[0]
    components = printed(capsys, "list", "components")
    assert "weightings (objective.TERM.weighting.name)" in components and "recipes/sam" not in components
    assert "Did you mean 'teachers'" in error(capsys, "list", "teacher")


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "teacher.sam_vit_h",
            ["teacher.name=sam_vit_h", "SAM ViT-H, 1024 px", "weights  text or null", "batch    integer"],
        ),
        ("teacher", ["teacher.name=NAME", "  sam_mini "]),
        ("train", ["train.steps ", "integer or null", "optimizer steps"]),
        ("train.batch_size", ["16 ", "images of an optimizer step"]),
        ("objective.*.weighting.srw", ["temperature  number", "1.0", "image, batch, global_batch"]),
        ("weighting.srw", ["Yu et al."]),
        ("cache.executor.ray", ["actors"]),
        ("seed", ["integer", "order of the images"]),
        ("objective", ["terms of the loss"]),
        ("distance.kd", ["temperature"]),
        ("recipes/studies/digits", ["Methods: kd, label", "fmdistill show recipes/studies/digits:kd"]),
        ("eval/cosine.yaml", ["What this protocol states", "All settings: cat "]),
        ("recipes/demo/sam_mse.yaml", ["fmdistill show recipes/demo/sam_mse.yaml"]),
    ],
)
def test_explain_says_what_a_name_is(capsys, name, texts):
    output = printed(capsys, "explain", name)
    assert [text for text in texts if text not in output] == [], output


def test_explain_suggests_a_name(capsys):
    assert "Did you mean 'steps'" in error(capsys, "explain", "train.step")
    assert "Did you mean 'teacher.sam_mini'" in error(capsys, "explain", "sam_minn")
    assert "no such file" in error(capsys, "explain", "recipes/none.yaml")


def test_show_prints_the_resolved_recipe(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: recipes/demo/sam_srw.yaml\nout: runs/x\n")
    output = printed(capsys, "show", path, "train.steps=7")
    assert recipe.freeze(yaml.safe_load(output), "shown") == recipe.load(path, ["train.steps=7"])


def test_init_writes_a_recipe_that_check_accepts_and_prints_the_next_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        PIL.Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
    output = printed(capsys, "init", "mine.yaml", "sam", "images.root=.", "teacher.name=sam_mini")
    assert "8 images (.png)" in output and "6 to train on, 2 held out" in output
    assert "  fmdistill run mine.yaml " in output and "  fmdistill export runs/mine mobilesam " in output
    assert printed(capsys, "check", "mine.yaml") == "mine.yaml: ok\n"
    before = Path("mine.yaml").read_text()
    assert "exists already" in error(capsys, "init", "mine.yaml", "sam", "images.root=.", "teacher.name=sam_mini")
    assert Path("mine.yaml").read_text() == before


def test_init_without_a_terminal_says_what_to_write(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "init: needs a file and a kind (sam, clip or timm)" in error(capsys, "init")
    assert "init: needs images.root=FOLDER, such as `fmdistill init" in error(capsys, "init", "mine.yaml", "sam")


def test_a_reader_that_ends_early_is_no_error():
    command = [sys.executable, "-m", "fmdistill", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(timeout=900) == 0 and process.stderr.read() == b""
    assert callable(describe.show)
