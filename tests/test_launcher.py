"""Tests of a launcher's variables: training needs all of them, and one line names the missing ones."""

import pytest
import tiny

from fmdistill import cache, distill, launcher, pipeline
from fmdistill.distill.train import Engine
from fmdistill.registry import UserError

COMPLETE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
TWO = {"RANK": "0", "WORLD_SIZE": "2"}
WITHOUT_ADDRESS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets these launcher's variables and no others."""

    def put(variables: dict[str, str]) -> None:
        for name in (*launcher.ADDRESS, *launcher.NUMBERS, *launcher.MPI):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    "variables",
    [
        {},
        COMPLETE,
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "-1"},
        {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1"},
        {**COMPLETE, "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_a_single_process_and_those_of_a_launcher_may_train(environment, variables):
    environment(variables)
    launcher.check_training()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TWO, "RANK=0, WORLD_SIZE=2 .*, but no LOCAL_RANK and no MASTER_ADDR and no MASTER_PORT: .*torchrun"),
        (WITHOUT_ADDRESS, "but no MASTER_ADDR and no MASTER_PORT"),
        ({**WITHOUT_ADDRESS, "MASTER_ADDR": "", "MASTER_PORT": "1"}, "but no MASTER_ADDR: "),
        ({"RANK": "0"}, "RANK=0 in the environment, but no WORLD_SIZE"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE=1 in the environment, but no RANK"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 in the environment, but no RANK and no WORLD_SIZE and no MASTER_ADDR"),
        ({**COMPLETE, "RANK": "2"}, "RANK=2, WORLD_SIZE=2 in the environment: expected this process's rank, counted"),
        ({**COMPLETE, "RANK": "first"}, "RANK='first' in the environment: expected a number"),
        ({**COMPLETE, "LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment: expected a number"),
        ({**COMPLETE, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, WORLD_SIZE=2 in the environment: expected at most 1"),
        ({**COMPLETE, "LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two'"),
        ({**COMPLETE, "MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({**COMPLETE, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 in the environment: MPI started several"),
        ({"PMI_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"}, "unset PMI_SIZE to train in one process"),
        ({"MV2_COMM_WORLD_SIZE": "many"}, "MV2_COMM_WORLD_SIZE='many'"),
    ],
)
def test_missing_variables_raise_one_line_before_any_work(tmp_path, environment, variables, message):
    environment(variables)
    settings = tiny.load(tmp_path)
    for work in (pipeline.run, distill.run):
        with pytest.raises(UserError, match=message) as caught:
            work(settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        Engine(settings.train)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_caching_needs_no_address(tmp_path, environment):
    environment(TWO)
    cache.run(tiny.load(tmp_path))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4


def test_a_finished_run_needs_no_launcher(tmp_path, environment):
    environment({})
    settings = tiny.load(tmp_path, "train.steps=1")
    out = pipeline.run(settings)
    environment(TWO)
    assert pipeline.run(settings) == out == {}


@pytest.mark.parametrize(("value", "expected"), [("", None), ("-1", None), ("3", 3)])
def test_the_local_rank_may_be_missing(environment, value, expected):
    environment({"LOCAL_RANK": value})
    assert launcher.local_rank() == expected
