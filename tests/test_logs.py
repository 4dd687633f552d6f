import json
import logging
import sys

import pytest

from fmdistill import logs
from fmdistill.registry import UserError


@pytest.fixture(autouse=True)
def restored_logger():
    handlers, level = list(logs.log.handlers), logs.log.level
    yield
    logs.log.handlers[:], logs.log.level = handlers, level


def test_rows_are_read_in_order(tmp_path):
    rows = logs.JsonLines(tmp_path / "run" / "metrics.jsonl")
    for step in range(3):
        rows.write({"step": step, "loss": step / 7})
    assert logs.read_json_lines(rows.path) == [{"step": step, "loss": step / 7} for step in range(3)]
    assert logs.read_json_lines(tmp_path / "absent.jsonl") == []


def test_each_row_is_on_disk_at_once(tmp_path):
    rows = logs.JsonLines(tmp_path / "metrics.jsonl")
    rows.write({"step": 1})
    assert rows.path.read_text() == '{"step": 1}\n'


def test_resuming_removes_later_rows_and_an_incomplete_one(tmp_path):
    rows = logs.JsonLines(tmp_path / "metrics.jsonl")
    rows.write({"note": "no step"})
    for step in (1, 2, 3, 4):
        rows.write({"step": step})
    with rows.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert len(logs.read_json_lines(rows.path)) == 5
    rows.truncate_after(2)
    rows.write({"step": 3})
    written = [json.loads(line) for line in rows.path.read_text().splitlines()]
    assert written == [{"note": "no step"}, {"step": 1}, {"step": 2}, {"step": 3}]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_row_without_newline_is_preserved(tmp_path):
    rows = logs.JsonLines(tmp_path / "metrics.jsonl")
    rows.path.write_text('{"step": 1}')
    rows.truncate_after(1)
    rows.write({"step": 2})
    assert rows.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_broken_row_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        logs.read_json_lines(path)


def test_progress_prints_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(logs, "QUIET_INTERVAL", 0.0)
    assert list(logs.progress(range(3), "caching")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and "\r" not in "".join(lines)
    assert all(line.startswith("caching:") for line in lines)
    assert "3/3" in lines[-1]


def test_progress_is_sparse_but_always_shows_its_end(capsys):
    bar = logs.progress(total=1000, description="training")
    for _ in range(1000):
        bar.update(1)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 3 and "1000/1000" in lines[-1]


def test_only_the_first_process_logs(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    logs.setup()
    list(logs.progress(range(3), "training"))
    logs.log.info("quiet")
    logs.log.warning("loud")
    assert capsys.readouterr().err.endswith("W loud\n")


def test_setup_twice_prints_once(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    logs.setup()
    logs.setup(logging.INFO)
    logs.log.info("hello")
    assert capsys.readouterr().err.count("hello") == 1


def test_a_notebook_gets_a_widget_and_a_terminal_a_bar(monkeypatch):
    from tqdm import notebook, tqdm

    class Widget(tqdm):
        pass

    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(notebook, "IProgress", object())
    monkeypatch.setattr(notebook, "tqdm_notebook", Widget)
    with logs.progress(total=1) as bar:
        assert type(bar) is tqdm
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with logs.progress([1, 2], "title") as bar:
        assert isinstance(bar, Widget) and list(bar) == [1, 2]
    monkeypatch.setattr(notebook, "IProgress", None)  # without ipywidgets
    with logs.progress(total=1) as bar:
        assert type(bar) is tqdm
