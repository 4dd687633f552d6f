"""Checkpoints: folders of safetensors and JSON, each written whole, from which training resumes exactly."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fmdistill.files import write_whole
from fmdistill.registry import UserError

KEEP = 2  # number of a run's newest checkpoints that are not deleted


def save(run: Path, step: int, task: nn.Module, optimizer: torch.optim.Optimizer, order: str) -> Path:
    """Write `run`/checkpoints/step-NNNNNNNN and delete all but the newest; return its path.

    `order` is the identity of the order of the training images.
    """
    folder = run / "checkpoints"
    final, part = folder / f"step-{step:08d}", folder / f".step-{step:08d}.{os.getpid()}.part"
    part.mkdir(parents=True)
    save_state(task.state_dict(), part / "task.safetensors")
    save_state(_flat(optimizer), part / "optimizer.safetensors")
    write_whole(part / "state.json", json.dumps({"step": step, "order": order}))
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in _folders(run)[:-KEEP]:
        shutil.rmtree(old)
    return final


def resume(run: Path, task: nn.Module, optimizer: torch.optim.Optimizer, order: str) -> int:
    """Load the newest checkpoint of `run` into task and optimizer; return its step, or 0 if the run has none.

    Raises UserError if it cannot be read, or if its `order` differs, since its step would then mean another batch.
    """
    for part in (run / "checkpoints").glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)  # another process of this run may be removing it too
    folders = _folders(run)
    if not folders:
        return 0
    folder = folders[-1]
    try:
        task.load_state_dict(load_file(folder / "task.safetensors"))
        _restore(optimizer, load_file(folder / "optimizer.safetensors"))
        state = json.loads((folder / "state.json").read_text())
        step, trained_on = int(state["step"]), state["order"]
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: cannot resume from this checkpoint ({reason}); delete this folder to use an earlier one"
        ) from None
    if trained_on != order:
        raise UserError(
            f"{folder}: the training images have changed since, so their order differs; "
            f"use the images that the run began with, or choose another out=FOLDER"
        )
    return step


def exists(run: Path) -> bool:
    """Return whether the run has a checkpoint."""
    return bool(_folders(run))


def newest(run: Path) -> Path:
    """Return the folder of the newest checkpoint. Raises UserError if the run has none."""
    folders = _folders(run)
    if not folders:
        raise UserError(f"{run}: has no checkpoint, which stores the objective's state; train it again")
    return folders[-1]


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors to `path` as safetensors, whole or not at all."""
    # Not save_file, which raises no OSError if the disk is full.
    write_whole(path, to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}))


def _folders(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "state.json").is_file())


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}


def _restore(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
