"""Two threads at most, here and in the processes that tests start, and one where two workers share the tests."""

import os

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

if THREADS == 1:
    os.environ["OMP_NUM_THREADS"] = "1"  # the process that started this worker has set its own
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "agg")

import torch  # noqa: E402  (OpenMP reads its variable when torch loads)

torch.set_num_threads(min(THREADS, torch.get_num_threads()))
