"""Two threads at most, here and in the processes that tests start, and one where two workers share the tests."""

import os

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

if THREADS == 1:
    os.environ["OMP_NUM_THREADS"] = "1"  # the process that started this worker has set its own
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402
import torch  # noqa: E402  (OpenMP reads its variable when torch loads)

torch.set_num_threads(min(THREADS, torch.get_num_threads()))


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory):
    """The folder of the toy recipe's cache, which no test changes."""
    import tiny

    from fmdistill import cache

    folder = tmp_path_factory.mktemp("toy")
    cache.run(tiny.load(folder))
    return folder / "cache"


@pytest.fixture
def cached(tmp_path, toy_cache):
    """A folder in which the toy recipe is cached."""
    (tmp_path / "cache").symlink_to(toy_cache)
    return tmp_path
