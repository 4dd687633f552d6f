"""Tests of the command line at toy size: every verb works, and any error is one line and exit code 2."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from fmdistill import stop
from fmdistill.cli import VERBS, failures, main, parser

TESTS = Path(__file__).parent
PROTOCOL = "name: grid_miou\ngrids: [2]\nimages: 3\n"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.delenv("FMDISTILL_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return a folder with the toy recipe, a protocol, and the finished cache and run."""
    folder = tmp_path_factory.mktemp("cli")
    path = tiny.write(folder)
    (folder / "grid.yaml").write_text(PROTOCOL)
    assert main(["run", str(path), f"protocols=[{folder}/grid.yaml]"]) == 0
    return folder


def error_line(capsys, *argv: object) -> str:
    """Run a command that must end with exit code 2 and an error in one line; return the line."""
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[-1].startswith("fmdistill: error: "), captured.err
    # Before it there are only progress and log lines, which begin with a time.
    assert not any("Traceback" in line or line.startswith(("fmdistill", " ")) for line in lines[:-1]), captured.err
    return lines[-1]


def succeeded(capsys, *argv: object) -> str:
    capsys.readouterr()
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_every_verb_works(done, capsys, tmp_path):
    recipe, run = done / "tiny.yaml", done / "run"
    assert (run / "evaluation/grid.json").is_file()
    succeeded(capsys, "cache", recipe)
    assert "largest_error" in succeeded(capsys, "verify", recipe)
    assert str(run) in succeeded(capsys, "distill", recipe)
    assert "student  miou, 2x2 " in succeeded(capsys, "evaluate", done / "grid.yaml", run, "trust=true", "images=1")
    assert "student  miou, 2x2 " in succeeded(capsys, "evaluate", recipe, f"protocols=[{done}/grid.yaml]")
    assert "index.html" in succeeded(capsys, "report", tmp_path / "page", run, "trust=true")
    assert "<table" in (tmp_path / "page/index.html").read_text()
    assert "ok" in succeeded(capsys, "check", recipe, done / "grid.yaml")
    output = succeeded(capsys, "check")
    assert "recipes/sam/mobilesam_srw.yaml: ok" in output and "eval/sam_grid_miou.yaml: ok" in output


def test_export_writes_a_file_that_opens(tmp_path, capsys):
    small = ["images.size=256", "images.train=8", "images.validation=2", "train.batch_size=2", "train.steps=1"]
    kind = ["teacher.name=sam_mini", "teacher.weights=none", "student.name=tinyvit_sam_mini"]
    recipe = tiny.write(tmp_path)
    succeeded(capsys, "cache", recipe, *small, *kind)
    succeeded(capsys, "distill", recipe, *small, *kind)
    succeeded(capsys, "export", tmp_path / "run", "mobilesam", tmp_path / "out.pt")  # no foreign code, so no trust
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert any(name.startswith("image_encoder.") for name in state)
    assert "unknown name 'onnxx'" in error_line(capsys, "export", tmp_path / "run", "onnxx", tmp_path / "x")
    protocol = tmp_path / "grid.yaml"
    protocol.write_text(PROTOCOL)
    judged = ["evaluate", protocol, tmp_path / "out.pt"]
    assert "recipe=RECIPE" in error_line(capsys, *judged)
    assert "student  miou, 2x2 " in succeeded(capsys, *judged, f"recipe={tmp_path}/run/recipe.yaml", "images=1")
    assert (tmp_path / "out.evaluation/grid.json").is_file()


def test_a_run_resumes_from_the_recipe_that_it_saved(done, capsys, tmp_path):
    """Every verb needs trust=true for a saved recipe that names code, and only then."""
    saved, run = done / "run/recipe.yaml", done / "run"
    assert str(run) in succeeded(capsys, "distill", saved, "trust=true")
    succeeded(capsys, "verify", done / "cache/recipe.yaml", "trust=true")
    for argv in (["distill", saved], ["evaluate", done / "grid.yaml", run], ["export", run, "mobilesam", "x.pt"]):
        line = error_line(capsys, *argv)
        assert "names code outside fmdistill (tiny:Student, tiny:teacher); add trust=true" in line
    assert "the student is a Student" in error_line(capsys, "export", run, "mobilesam", "x.pt", "trust=true")
    assert "setting of this verb is trust=true" in error_line(capsys, "export", run, "mobilesam", "x.pt", "trust=yes")
    succeeded(capsys, "report", tmp_path / "page", run)  # the tables need no code
    assert "add trust=true" in (tmp_path / "page/index.html").read_text()


@pytest.mark.parametrize(
    ("verb", "settings", "message"),
    [
        ("distill", "train.stepps=3", "train.stepps: no such setting.*Did you mean 'steps'"),
        ("distill", "train.steps=many", "train.steps='many': expected int"),
        ("cache", "images.root=x", r"images\.root: no such setting"),
        ("cache", "images.name=photos images.root=x", r"images\.root: no such setting"),
        ("cache", "images.name=folder images.root=/nowhere/at/all", "/nowhere/at/all"),
        ("cache", "images.name=tar images.train=x.tar images.root=/nowhere", "/nowhere/x.tar: no such tar"),
        ("cache", "steps", "'steps': expected key=value"),
        ("cache", "teacher.name=sam_vit_b", "teacher.weights is not set.*dl.fbaipublicfiles.com"),
        ("cache", "teacher.name=sam_vit_b teacher.weights=no.pth cache.root={0}/o", "no.pth: no such file.*published?"),
        ("distill", "student.name=tinyvit_sam_mini student.pretrained=no.pt out={0}/o", "no.pt: no such file"),
        ("distill", "out={0}/grid.yaml", "grid.yaml.*expected a folder"),
        ("cache", "cache.root={0}/grid.yaml", "grid.yaml.*expected a folder"),
        ("distill", "optimizer.lr=1", r"holds a run of another recipe: optimizer\.lr.*out=FOLDER"),
        ("evaluate", "optimizer.lr=1 protocols=[grid.yaml]", r"holds a run of another recipe: optimizer\.lr"),
        ("evaluate", "", "protocols: this recipe has none; name one"),
        ("evaluate", "out={0}/none protocols=[{0}/grid.yaml]", "not a run, it contains no recipe.yaml"),
    ],
)
def test_a_wrong_setting_is_one_line(done, capsys, verb, settings, message):
    line = error_line(capsys, verb, done / "tiny.yaml", *settings.format(done).split())
    assert re.search(message, line, re.IGNORECASE), line


def test_a_wrong_subject_or_protocol_is_one_line(done, capsys, tmp_path):
    protocol, run = done / "grid.yaml", done / "run"
    assert "no such file in the working folder or in the package" in error_line(capsys, "run", "no.yaml")
    assert "not a run" in error_line(capsys, "evaluate", protocol, tmp_path)
    assert "not a run" in error_line(capsys, "evaluate", protocol, tmp_path / "nowhere")
    assert "a protocol needs a run to evaluate" in error_line(capsys, "evaluate", protocol)
    assert "not a run" in error_line(capsys, "report", tmp_path / "page", tmp_path)
    for text, message in (
        ("name: [grid", "not YAML"),
        ("- a list", "expected a mapping of settings"),
        ("grids: [2]", "needs a `name`"),
        ("name: grid_iou", "Did you mean 'grid_miou'"),
        ("name: grid_miou\ngrid: [2]", "Did you mean 'grids'"),
        ("name: grid_miou\ngrids: two", "expected"),
        ("name: grid_miou\ngrids: []", "at least one grid"),
    ):
        broken = tmp_path / "broken.yaml"
        broken.write_text(text)
        for argv in (["evaluate", broken, run, "trust=true"], ["check", broken]):
            line = error_line(capsys, *argv)
            assert message in line and str(broken) in line


def test_another_components_name_removes_the_old_settings(tmp_path, capsys):
    path = tiny.write(tmp_path)
    text = path.read_text().replace('teacher: {name: "tiny:teacher"}', "teacher: {name: sam_vit_b, weights: no.pth}")
    path.write_text(text)
    assert "no.pth: no such file" in error_line(capsys, "cache", path)
    succeeded(capsys, "cache", path, "teacher.name=tiny:teacher", "images.limit=2")


def start(*argv: object) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fmdistill", *map(str, argv)]
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
    )


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_preemption_stop_with_one_line_that_says_how_to_continue(done, tmp_path, number, code):
    settings = [f"out={tmp_path}/run", "train.steps=100000", "train.checkpoint_every=5", "train.workers=2"]
    process = start("distill", done / "tiny.yaml", *settings)
    until(lambda: list(tmp_path.glob("run/checkpoints/step-*")))
    os.killpg(process.pid, number)  # like a terminal or Slurm: image-loading processes get it too
    _, output = process.communicate(timeout=900)
    assert process.returncode == code and "Traceback" not in output, output
    assert output.splitlines()[-1] == "fmdistill: stopped; the same command continues where it stopped"


def test_a_stop_is_recognized_by_its_signal(monkeypatch):
    assert failures.stopped(KeyboardInterrupt()) == signal.SIGINT
    assert failures.stopped(stop.Stopped(signal.SIGTERM)) == signal.SIGTERM
    peer = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40000")
    assert failures.stopped(peer) is None and failures.stopped(OSError()) is None
    monkeypatch.setattr(stop._request, "number", signal.SIGTERM)
    assert failures.stopped(peer) == signal.SIGTERM and failures.stopped(RuntimeError("other")) is None


@pytest.mark.slow
def test_a_preempted_bench_leaves_no_file(tmp_path):
    process = start("bench", tiny.write(tmp_path), "bench.rounds=100000")
    until(lambda: list(tmp_path.glob(".fmdistill-bench-*")))
    process.terminate()
    _, output = process.communicate(timeout=900)
    assert process.returncode == 143 and "Traceback" not in output, output
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)


class Small(tiny.Student):
    """A student that raises `error`, as on a machine that is too small for it."""

    error: BaseException

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        raise self.error


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 1 GiB")
KILLED = (
    "DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
)
EXITED = "DataLoader worker (pid(s) 77, 78) exited unexpectedly"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FULL, r"CUDA out of memory: the GPU's memory is full; while training, change train\.accumulate"),
        (RuntimeError(KILLED), r"\(pid 77\) is killed by signal: Bus error: .*train\.workers.*--ipc=host"),
        (RuntimeError(EXITED), r"\(pid\(s\) 77, 78\) exited unexpectedly: .*train\.workers.*--ipc=host"),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(done, capsys, tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(Small, "error", error, raising=False)
    argv = ["distill", done / "tiny.yaml", "student.name=test_cli:Small", f"out={tmp_path}/run"]
    assert re.search(message, error_line(capsys, *argv))
    monkeypatch.setenv("FMDISTILL_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main([str(argument) for argument in argv])


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("cache", ["teacher.batch"]),
        ("verify", ["teacher.batch"]),
        ("evaluate", ["points_per_batch"]),
        ("run", ["teacher.batch", "train.accumulate", "points_per_batch"]),
    ],
)
def test_a_full_gpu_names_the_setting_of_the_verb(capsys, monkeypatch, verb, names):
    def full(**_: object) -> None:
        raise FULL

    monkeypatch.setitem(VERBS, verb, full)
    line = error_line(capsys, verb, "x.yaml")
    every = ["teacher.batch", "train.accumulate", "points_per_batch"]
    assert [name for name in every if name in line] == names


def test_any_other_runtime_error_has_its_traceback(done, tmp_path, monkeypatch):
    message = "the DataLoader worker (pid 7) of a sentence"
    monkeypatch.setattr(Small, "error", RuntimeError(message), raising=False)
    with pytest.raises(RuntimeError, match="of a sentence"):
        main(["distill", str(done / "tiny.yaml"), "student.name=test_cli:Small", f"out={tmp_path}/run"])


@pytest.mark.slow
def test_the_console_script_imports_code_from_the_working_folder(done, tmp_path):
    """The path of a console script contains its own folder, not the working folder."""
    (tmp_path / "losses.py").write_text("from tiny import Student as Hard\n")
    script = tmp_path / "bin" / "fmdistill"
    script.parent.mkdir()
    script.write_text("import sys\nfrom fmdistill.cli import main\nsys.exit(main())\n")
    shutil.copy(TESTS / "tiny.py", tmp_path)
    shutil.copy(TESTS / "nondegenerate.py", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "distill", str(done / "tiny.yaml"), "student.name=losses:Hard"]
    command += [f"out={tmp_path}/run", "train.steps=1", "train.workers=1"]
    process = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run/student.safetensors").is_file()


def test_help_names_the_variable_for_tracebacks():
    assert "FMDISTILL_TRACEBACK=1" in " ".join(parser().format_help().split())


@pytest.mark.slow
def test_an_unknown_verb_or_file_ends_with_2_and_no_traceback():
    for argv, message in (
        (["destill", "x"], "invalid choice: 'destill'"),
        (["run", "no.yaml"], "no.yaml: no such file"),
    ):
        process = start(*argv)
        _, output = process.communicate(timeout=900)
        assert process.returncode == 2 and message in output and "Traceback" not in output
