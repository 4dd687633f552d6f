"""Checkpoints: folders of safetensors and JSON, each written whole, from which training resumes exactly."""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from fmdistill.files import write_whole
from fmdistill.logs import log
from fmdistill.registry import UserError

TASK, OPTIMIZER, AVERAGE = "task", "optimizer", "average"  # files, the last only with `train.ema`
ASIDE = "damaged-"  # begins the name of a folder that is not used


class Contents(NamedTuple):
    """What a checkpoint holds: tensors by file and name, and values of JSON."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(run: Path, step: int, contents: Contents) -> Path:
    """Write `run`/checkpoints/step-NNNNNNNN and return its path; an error leaves the other checkpoints as they are."""
    folder = run / "checkpoints"
    final, part = folder / f"step-{step:08d}", folder / f".step-{step:08d}.{os.getpid()}.part"
    part.mkdir(parents=True)
    try:
        sums = {}
        for name, tensors in contents.tensors.items():
            data = _bytes(tensors)
            sums[name] = zlib.crc32(data)
            write_whole(part / f"{name}.safetensors", data)
        write_whole(part / "state.json", json.dumps({"step": step, **contents.state, "crc32": sums}))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def read(folder: Path) -> Contents:
    """Read a checkpoint. Raises UserError if a file is missing, or damaged by its checksum."""
    try:
        state = json.loads((folder / "state.json").read_text())
        sums = state.get("crc32", {TASK: None, OPTIMIZER: None})  # older checkpoints have none
        files = {name: (folder / f"{name}.safetensors").read_bytes() for name in sums}
        int(state["step"])
        damaged = [name for name, crc in sums.items() if crc not in (None, zlib.crc32(files[name]))]
        if damaged:
            raise ValueError(f"{damaged[0]}.safetensors has another checksum")
        return Contents({name: from_bytes(data) for name, data in files.items()}, state)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: this checkpoint is damaged ({reason})") from None


def newest_whole(run: Path) -> Path | None:
    """Return the folder of the newest checkpoint that can be read, or None if the run has no checkpoint.

    Damaged ones are moved aside, with a warning. Raises UserError if all are damaged.
    """
    for part in (run / "checkpoints").glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)
    folders = _folders(run)
    for folder in reversed(folders):
        try:
            read(folder)
            return folder
        except UserError as error:
            aside = folder.with_name(f"{ASIDE}{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            log.warning("%s; it is now %s, and the one before is used", error, aside.name)
    if folders:
        raise UserError(
            f"{run}/checkpoints: all {len(folders)} checkpoints are damaged, and are now called {ASIDE}...; the same "
            f"command trains from the beginning"
        )
    return None


def remove_old(run: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the `keep` newest and the one of step `best`."""
    for old in _folders(run)[:-keep]:
        if step_of(old) != best:
            shutil.rmtree(old)


def steps(run: Path) -> list[int]:
    """Return the steps of the run's checkpoints, in ascending order."""
    return [step_of(folder) for folder in _folders(run)]


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def exists(run: Path) -> bool:
    """Return whether the run has a checkpoint."""
    return bool(_folders(run))


def learned(run: Path) -> Path:
    """Return the file of the newest checkpoint with all that the task learned, its moving average if it has one.

    Raises UserError if the run has no checkpoint.
    """
    folders = _folders(run)
    if not folders:
        raise UserError(f"{run}: has no checkpoint, which stores the objective's state; train it again")
    average = folders[-1] / f"{AVERAGE}.safetensors"
    return average if average.is_file() else folders[-1] / f"{TASK}.safetensors"


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to `path` as safetensors, whole or not at all."""
    write_whole(path, _bytes(state))  # not save_file, which raises no OSError if the disk is full


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by names such as "3.exp_avg"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()}


def restore(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    """Load a `flat_state` into the optimizer."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _folders(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "state.json").is_file())
