import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file
from timm.optim.muon import Muon
from torch import nn

from fmdistill import cache, distill
from fmdistill.distill import optim
from fmdistill.distill.student import WEIGHTS
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.registry import UserError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def names(net, group):
    return {name for name, p in net.named_parameters() if any(p is q for q in group["params"])}


def test_muon_trains_linear_weights_and_adamw_the_others_with_decay_above_one_dimension():
    net = Net()
    matrices, kernels, vectors = optim.muon(net, lr=0.01, weight_decay=0.1, other_lr=0.002).param_groups
    assert names(net, matrices) == {"linear.weight"} and not matrices.get("use_fallback")
    assert names(net, kernels) == {"conv.weight"} and names(net, vectors) == {
        "linear.bias",
        "conv.bias",
        "norm.weight",
        "norm.bias",
    }
    assert [g["lr"] for g in (matrices, kernels, vectors)] == [0.01, 0.002, 0.002]
    assert [g["weight_decay"] for g in (matrices, kernels, vectors)] == [0.1, 0.1, 0.0]
    assert kernels["use_fallback"] and vectors["use_fallback"]
    assert {g["lr"] for g in optim.muon(Net(), lr=0.01).param_groups} == {0.01}


def test_muon_trains_ungrouped_kernels_if_requested():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    matrices, kernels, _ = optim.muon(net, lr=0.01, convolutions=True).param_groups
    assert names(net, matrices) == {"0.weight", "2.weight"} and names(net, kernels) == {"1.weight"}


def test_muons_first_step_is_orthogonal_and_of_adamws_size():
    torch.manual_seed(0)
    net = nn.Linear(64, 32, bias=False)
    before = net.weight.detach().clone()
    net.weight.grad = torch.randn(32, 64) @ torch.diag(torch.logspace(0, -2, 64))  # badly conditioned
    optim.muon(net, lr=0.01, weight_decay=0.0).step()
    update = (net.weight - before).detach()
    spread = torch.linalg.svdvals(update)
    assert spread.max() / spread.min() < 3  # the gradient's is far more; Newton-Schulz leaves 0.7 to 1.2
    assert update.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.2)  # AdamW's is about 0.2 lr


def test_muon_raises_if_timm_does_not_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim.muon", None)
    with pytest.raises(UserError, match="pip install -U timm"):
        optim.muon(Net(), lr=0.01)


def test_a_run_with_muon_resumes_to_the_same_weights(tmp_path, monkeypatch):
    muon = ["optimizer={name: muon, lr: 0.01, other_lr: 0.003}", "train.checkpoint_every=4"]
    cache.run(tiny.load(tmp_path))
    whole = distill.run(tiny.load(tmp_path, f"out={tmp_path}/whole", *muon))
    original, calls = Muon.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Muon, "step", step)
    stopped = tiny.load(tmp_path, f"out={tmp_path}/stopped", *muon)
    with pytest.raises(KeyError):
        distill.run(stopped)
    monkeypatch.setattr(Muon, "step", original)
    uninterrupted, resumed = (load_file(run / WEIGHTS) for run in (whole, distill.run(stopped)))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_a_run_that_stops_early_has_the_rates_of_its_horizon():
    whole, early = optim.CosineSchedule(0.1, 0.2), optim.CosineSchedule(0.1, 0.2, horizon=50)
    assert [early(step, 20) for step in range(20)] == [whole(step, 50) for step in range(20)]
    with pytest.raises(UserError, match=r"schedule\.horizon=50: the run has 51 steps"):
        early(0, 51)


def test_steps_fall_by_the_factor_at_each_milestone():
    schedule = optim.StepSchedule()  # CIFAR-100's 240 epochs
    rates = [schedule(step, 240) for step in range(240)]
    expected = [1.0] * 150 + [0.1] * 30 + [0.01] * 30 + [0.001] * 30
    assert rates == pytest.approx(expected)
    with pytest.raises(UserError, match=r"milestones=\[0.5, 1.0\]"):
        optim.StepSchedule((0.5, 1.0))


def test_sgd_is_pytorch_s_with_momentum_and_decay_of_all():
    def trained(make):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        optimizer, images = make(model), torch.randn(8, 4)
        for _ in range(3):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    actual = trained(lambda model: optim.sgd(model, 0.1))
    expected = trained(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4))
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def test_muon_multiplies_bf16_only_if_the_processor_does(monkeypatch):
    from timm.optim import muon as module

    dtypes, original = [], module.zeropower_via_newtonschulz

    def recorded(*arguments, dtype, **settings):
        dtypes.append(dtype)
        return original(*arguments, dtype=dtype, **settings)

    monkeypatch.setattr(module, "zeropower_via_newtonschulz", recorded)
    for has in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(8, 4)
        layer(torch.randn(16, 8)).square().sum().backward()  # of full rank, so that no direction is noise
        before = layer.weight.detach().clone()
        monkeypatch.setattr(optim, "has_bf16", lambda device, has=has: has)
        optim.muon(layer, lr=0.1, weight_decay=0.0).step()
        update = before - layer.weight.detach()
        if has:
            rough = update
    assert dtypes == [torch.bfloat16, torch.float32] and module.zeropower_via_newtonschulz is recorded
    assert 0 < (update - rough).abs().max() < 0.05 * update.abs().max()


def test_layer_decay_gives_each_stage_of_a_backbone_its_rate_and_the_neck_the_whole():
    student = tinyvit_sam_mini()
    groups = optim.adamw(student, lr=0.1, weight_decay=0.05, layer_decay=0.5).param_groups
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rate) == len(list(student.parameters()))
    expected = {"neck.": 0.1, "trunk.stages.3.": 0.05, "trunk.stages.2.": 0.025, "trunk.stages.1.": 0.0125}
    expected |= {"trunk.stages.0.": 0.00625, "trunk.patch_embed.": 0.003125}
    for name, parameter in student.named_parameters():
        (full,) = [value for prefix, value in expected.items() if name.startswith(prefix)]
        assert rate[id(parameter)] == (pytest.approx(full), 0.05 if parameter.dim() > 1 else 0.0), name
    assert groups[0]["lr"] == 0.1  # the rate that is logged


def test_layer_decay_is_refused_without_a_backbone_and_outside_of_its_range():
    with pytest.raises(UserError, match="no backbone of timm"):
        optim.adamw(nn.Linear(2, 2), lr=0.1, layer_decay=0.9)
    with pytest.raises(UserError, match="layer_decay=0: expected a factor above 0"):
        optim.adamw(nn.Linear(2, 2), lr=0.1, layer_decay=0)
