import pytest
import torch

from fmdistill.backbones.device import pick_device
from fmdistill.registry import UserError


@pytest.mark.parametrize(("count", "says"), [(1, "1 CUDA device here"), (2, "2 CUDA devices here")])
def test_a_gpu_that_the_machine_does_not_have_is_said(monkeypatch, count, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=f"teacher.device=cuda:7: PyTorch sees {says}"):
        pick_device("cuda:7", "teacher.device")
    with pytest.raises(UserError, match=f"cuda:{count}"):
        pick_device(f"cuda:{count}", "x")
    assert pick_device(f"cuda:{count - 1}", "x").index == count - 1
    assert pick_device("cuda", "x").index is None
