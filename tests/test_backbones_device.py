from types import SimpleNamespace

import pytest
import torch

from fmdistill import teachers
from fmdistill.backbones.device import pick_device
from fmdistill.distill import engine
from fmdistill.recipe import Train
from fmdistill.registry import UserError
from fmdistill.teachers import sam


@pytest.mark.parametrize(("count", "says"), [(1, "1 CUDA device"), (2, "2 CUDA devices")])
def test_a_gpu_that_the_machine_does_not_have_raises(monkeypatch, count, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=f"teacher.device=cuda:7: PyTorch sees {says}"):
        pick_device("cuda:7", "teacher.device")
    with pytest.raises(UserError, match=f"cuda:{count}"):
        pick_device(f"cuda:{count}", "x")
    assert pick_device(f"cuda:{count - 1}", "x").index == count - 1
    assert pick_device("cuda", "x").index is None


@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "hpu", "fpga", "mps:1", "xla", "opengl"])
def test_a_device_without_a_backend_raises_one_line(name, monkeypatch):
    make = torch.zeros

    def without_backends(*size, device):  # also on a machine that has one
        if torch.device(device).type not in ("cpu", "meta"):
            raise NotImplementedError(f"Could not run on {device}.\nA long list of backends.")
        return make(*size, device=device)

    monkeypatch.setattr(torch, "zeros", without_backends)
    with pytest.raises(
        UserError, match=f"train.device={name}: this PyTorch cannot use the device .*auto or cpu"
    ) as error:
        pick_device(name, "train.device")
    assert "\n" not in str(error.value)


def test_a_device_is_tried_and_not_only_named():
    with pytest.raises(UserError, match="x=meta: this PyTorch cannot use the device"):
        pick_device("meta", "x")


def test_every_cpu_index_is_the_same_device():
    assert pick_device("cpu:1", "x") == torch.device("cpu")


def test_training_on_another_device_than_the_recipe_s_raises(monkeypatch):
    monkeypatch.setattr(engine, "pick_device", lambda name, where: torch.device("mps"))
    monkeypatch.setattr(engine, "Accelerator", lambda cpu, mixed_precision: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(UserError, match="train.device=mps: accelerate trains on cpu in this process; .*device=cpu"):
        engine.Engine(Train(steps=1, device="mps"))


def test_training_uses_bf16_only_if_the_device_multiplies_it(monkeypatch):
    for has, settings, expected in ((True, {}, True), (False, {}, False), (False, {"precision": "bf16"}, True)):
        monkeypatch.setattr(engine, "has_bf16", lambda device, has=has: has)
        with engine.Engine(Train(steps=1, device="cpu", **settings)).autocast():
            assert torch.is_autocast_enabled("cpu") is expected


def test_a_teacher_s_unusable_device_raises_before_its_weights_are_read(monkeypatch):
    monkeypatch.setattr(sam, "build_sam", lambda *a: pytest.fail("read the weights"))
    with pytest.raises(UserError, match="teacher.device=meta: this PyTorch cannot use the device"):
        teachers.build({"name": "sam_vit_b", "device": "meta"})
