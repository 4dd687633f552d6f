"""Two threads at most, here and in the processes that tests start, and one where two workers share the tests."""

import os

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2

os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("MPLBACKEND", "agg")

import torch  # noqa: E402  (OpenMP reads its variable when torch loads)

torch.set_num_threads(min(THREADS, torch.get_num_threads()))
