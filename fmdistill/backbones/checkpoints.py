"""Read state dicts from checkpoint files of other programs, without wrappers and shared name prefixes."""

import logging
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fmdistill.registry import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model")  # entries under which training programs save the weights
# of DistributedDataParallel, of torch.compile, and of a run's checkpoints whose objective has nothing to store
PREFIXES = ("module.", "_orig_mod.", "student.")
DEPTH = 4  # wrappers inside wrappers; a hostile file may contain itself

_log = logging.getLogger(__name__)


def read_state(path: Path, where: str, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors, .pth, .pt or .bin file; nothing in the file is executed.

    Wrappers such as {"model": ...} and prefixes that all names share are removed and logged. A prefix is not removed if
    the network's own `names` have it. Raises UserError, which begins with `where`, unless the file has exactly one
    state dict.
    """
    stored = _read(path, where)
    state, entries = _unwrapped(stored, where)
    prefix = _shared_prefix(state, names)
    changes = [f"weights taken from its {'.'.join(entries)!r}{_beside(stored, entries)}"] if entries else []
    changes += [f"prefix {prefix!r} removed from all {len(state)} names"] if prefix else []
    if changes:
        _log.info("%s: %s", where, "; ".join(changes))
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _read(path: Path, where: str) -> Any:
    try:
        with path.open("rb") as file:
            is_safetensors = path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
        if is_safetensors:
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; the error below is clearer
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error}); check the path and its rights") from None
    except Exception as error:  # zip, unpickling, EOF and runtime errors, depending on the file's damage
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0][:160]}".removesuffix(": ")
        raise UserError(
            f"{where}: not a readable checkpoint of plain tensors ({reason}; the file has {path.stat().st_size} "
            f"bytes); nothing in it was executed; use a complete file of `model.state_dict()`"
        ) from error


def _unwrapped(stored: Any, where: str) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return the state dict in `stored` and the path of entry names to it, outermost first."""
    entries: list[str] = []
    while not _is_state(stored) and isinstance(stored, Mapping) and len(entries) < DEPTH:
        states = [key for key, value in stored.items() if isinstance(key, str) and _is_state(value)]
        known = [key for key in WRAPPERS if isinstance(stored.get(key), Mapping)]
        candidates = [key for key in known if key in states] or states or known
        if len(candidates) > 1:
            shown = ", ".join(map(repr, candidates[:4]))
            raise UserError(f"{where}: contains several state dicts ({shown}); save the intended one alone")
        if not candidates:
            break
        entries.append(candidates[0])
        stored = stored[candidates[0]]
    if not _is_state(stored):
        raise UserError(f"{where}: contains no state dict (names to tensors); save `model.state_dict()`")
    return stored, entries


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _shared_prefix(state: Mapping[str, Tensor], names: Collection[str]) -> str:
    shared = ""
    while True:
        longer = next((p for p in PREFIXES if all(name.startswith(shared + p) for name in state)), None)
        if longer is None or any(name.startswith(shared + longer) for name in names):
            return shared
        shared += longer


def _beside(stored: Any, entries: list[str]) -> str:
    others = [repr(key)[:40] for key in stored if key != entries[0]]
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return f", beside {', '.join(others[:4])}{more}" if others else ""
