"""Wrapped, prefixed, ambiguous and hostile checkpoint files, read by every setting for weights."""

import pickle
from pathlib import Path

import pytest
import torch
from nondegenerate import randomize, tiny_sam
from safetensors.torch import save_file

from fmdistill.backbones import sam as sams
from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.sam import build_sam
from fmdistill.distill import student as students
from fmdistill.mini.clip import build_clip_mini, clip_mini_student
from fmdistill.mini.sam import build_sam_mini, sam_mini_student
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.registry import UserError
from fmdistill.teachers.classifier import classifier
from fmdistill.teachers.compute import state_hash
from fmdistill.teachers.sam import SamTeacher

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}
OTHER = {"c": torch.zeros(1)}


def prefixed(prefix: str, state: dict = STATE) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


def same(actual: dict, expected: dict = STATE) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (STATE, None),
        ({"model": STATE}, "weights taken from its 'model'"),
        ({"state_dict": STATE, "epoch": 3}, "weights taken from its 'state_dict', beside 'epoch'"),
        (
            {"model": STATE, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "epoch": 1},
            "weights taken from its 'model', beside 'optimizer', 'epoch'",
        ),
        ({"model": STATE, "model_ema": OTHER, "args": None}, "taken from its 'model', beside 'model_ema', 'args'"),
        ({"network": STATE, "step": 4}, "weights taken from its 'network', beside 'step'"),
        ({"state_dict": {"model": STATE}, "lr": 0.1}, "weights taken from its 'state_dict.model', beside 'lr'"),
        (prefixed("module."), "prefix 'module.' removed from all 2 names"),
        (prefixed("_orig_mod.module."), "prefix '_orig_mod.module.' removed from all 2 names"),
        (
            {"model": prefixed("module._orig_mod.")},
            "weights taken from its 'model'; prefix 'module._orig_mod.' removed from all 2 names",
        ),
    ],
)
def test_wrappers_and_shared_prefixes_are_removed_and_logged_in_one_line(tmp_path, caplog, stored, says):
    torch.save(stored, tmp_path / "w.pth")
    with caplog.at_level("INFO"):
        assert same(read_state(tmp_path / "w.pth", "teacher.weights=w.pth"))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (says is not None) and all("\n" not in line for line in lines)
    if says:
        assert lines[0].startswith("teacher.weights=w.pth: ") and lines[0].endswith(says)


def test_a_prefix_that_not_all_names_share_or_that_is_the_network_s_own_is_not_removed(tmp_path):
    mixed = {**prefixed("module."), "n_averaged": torch.ones(1)}
    torch.save(mixed, tmp_path / "mixed.pth")
    assert same(read_state(tmp_path / "mixed.pth", "x"), mixed)
    torch.save(prefixed("module."), tmp_path / "own.pth")
    own = prefixed("module.")
    assert same(read_state(tmp_path / "own.pth", "x", own.keys()), own)
    assert same(read_state(tmp_path / "own.pth", "x", STATE.keys()))


def test_safetensors_are_read_by_suffix_and_by_content(tmp_path):
    for name in ("w.safetensors", "w.bin"):
        save_file(prefixed("module."), tmp_path / name)
        assert same(read_state(tmp_path / name, "x"))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def itself() -> dict:
    wrapper: dict = {}
    wrapper["model"] = wrapper
    return wrapper


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ({"model": STATE, "state_dict": OTHER}, r"contains several state dicts \('state_dict', 'model'\)"),
        ({"student": STATE, "teacher": OTHER}, r"contains several state dicts \('student', 'teacher'\)"),
        ({}, "contains no state dict"),
        ({"model": {}}, "contains no state dict"),
        ({"model": [1, 2]}, "contains no state dict"),
        ({"a": STATE["a.weight"], "epoch": 3}, "contains no state dict"),
        ({3: STATE["a.weight"]}, "contains no state dict"),
        ({"model": {"model": {"model": {"model": {"model": STATE}}}}}, "contains no state dict"),
        (itself(), "contains no state dict"),
        ([STATE], "contains no state dict"),
        (STATE["a.weight"], "contains no state dict"),
        ({"model": Bomb}, "not a readable checkpoint of plain tensors"),
    ],
)
def test_a_file_without_exactly_one_state_dict_raises_one_line(tmp_path, stored, says):
    path = tmp_path / "w.pth"
    torch.save({"model": Bomb(tmp_path / "ran")} if stored == {"model": Bomb} else stored, path)
    with pytest.raises(UserError, match=f"^teacher.weights=w: {says}") as error:
        read_state(path, "teacher.weights=w")
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_the_bomb_is_live(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def both(folder: Path, state: dict) -> list[Path]:
    """Save `state` three times: plain, wrapped beside another entry, and with prefixes; return the paths."""
    stored = {"plain": state, "wrapped": {"model": state, "epoch": 1}, "prefixed": prefixed("module._orig_mod.", state)}
    for name, value in stored.items():
        torch.save(value, folder / f"{name}.pth")
    return [folder / f"{name}.pth" for name in stored]


def test_a_wrapped_and_a_prefixed_sam_are_the_same_teacher_as_the_plain_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sams, "sam_model_registry", {kind: lambda: tiny_sam(seed=1) for kind in sams.OFFICIAL})
    settings = {"device": "cpu", "dtype": "fp32", "batch": 1, "workers": 1}
    with caplog.at_level("INFO"):
        prints = [
            SamTeacher(build_sam("vit_b", path), name="sam_vit_b", **settings).fingerprint()
            for path in both(tmp_path, tiny_sam(seed=2).state_dict())
        ]
    assert prints[0] == prints[1] == prints[2]
    assert (
        prints[0]["weights"] == state_hash(tiny_sam(seed=2).state_dict()) != state_hash(tiny_sam(seed=1).state_dict())
    )
    assert [record.getMessage().split(": ")[1][:20] for record in caplog.records] == [
        "weights taken from i",
        "prefix 'module._orig",
    ]


def test_every_setting_for_weights_accepts_wrapped_and_prefixed_files(tmp_path):
    digits = {"name": "digits_resnet", "width": 2, "classes": 3}
    makers = {
        "sam_mini": (sam_mini_student(), lambda path: build_sam_mini(path).state_dict()),
        "clip_mini": (clip_mini_student(), lambda path: build_clip_mini(path).state_dict()),
        "tinyvit": (tinyvit_sam_mini(), lambda path: tinyvit_sam_mini(str(path)).state_dict()),
        "student": (
            students.build(digits),
            lambda path: students.build({**digits, "pretrained": str(path)}).state_dict(),
        ),
        "classifier": (
            students.build(digits),
            lambda path: classifier(digits, str(path), "digits", device="cpu").model.state_dict(),
        ),
    }
    for name, (network, load) in makers.items():
        (tmp_path / name).mkdir()
        plain, *others = both(tmp_path / name, randomize(network, 3).state_dict())
        fingerprint = state_hash(load(plain))
        assert [state_hash(load(path)) for path in others] == [fingerprint, fingerprint], name
        assert fingerprint != state_hash(load(both(tmp_path / name, randomize(network, 4).state_dict())[0])), name
