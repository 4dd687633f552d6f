"""Two threads at most, here and in the processes that tests start: the suite shares small machines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "agg")

import torch  # noqa: E402  (OpenMP reads its variable when torch loads)

torch.set_num_threads(min(2, torch.get_num_threads()))
