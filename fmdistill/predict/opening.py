"""Open anything that predicts: a run, an exported folder or a checkpoint, by what it says of itself."""

import importlib
import os
from pathlib import Path
from typing import Any

from fmdistill.backbones.device import pick_device
from fmdistill.cache import manifest
from fmdistill.distill.student import WEIGHTS
from fmdistill.predict import artefact
from fmdistill.predict.checkpoint_file import open_file
from fmdistill.predict.clip import open_folder
from fmdistill.predict.run import open_run
from fmdistill.recipe import SAVED, STAGES
from fmdistill.registry import UserError

OPENERS = {  # function (artefact, device) -> predictor, by the artefact's kind and its model's runtime
    ("sam", "onnx"): "fmdistill.predict.sam_onnx:open_artefact",
    ("clip", "onnx"): "fmdistill.predict.clip_onnx:open_artefact",
    ("clip", "torch"): "fmdistill.predict.clip:open_artefact",
}
OPEN_CLIP = "open_clip_config.json"
EXPECTED = "a finished run, a folder that `fmdistill export` or open_clip wrote, or a checkpoint of MobileSAM or SAM"


def load(path: str | os.PathLike[str], device: str = "auto", trust: bool = False) -> Any:
    """Return the predictor of a run, an exported folder or a checkpoint file, as `fmdistill.load` describes."""
    torch_device = pick_device(device, "device")
    path = Path(path).expanduser()
    if path.is_file():
        _check_alone(path)
        return open_file(path, torch_device)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; name {EXPECTED}")
    if (path / artefact.NAME).is_file():
        return _open_artefact(artefact.read(path), device)
    if (path / OPEN_CLIP).is_file():
        return open_folder(path, torch_device)
    if (path / manifest.NAME).is_file():
        raise UserError(f"{path}: is a cache of teacher outputs; load a run that was trained from it")
    if any((path / name).is_file() for name in (SAVED, STAGES)):
        return open_run(path, torch_device, trust)
    content = "is empty" if not any(path.iterdir()) else f"has no {artefact.NAME}, {SAVED} or {OPEN_CLIP}"
    raise UserError(f"{path}: {content}; name {EXPECTED}")


def _open_artefact(exported: artefact.Artefact, device: str) -> Any:
    runtime = exported.model.get("runtime")
    opener = OPENERS.get((exported.kind, str(runtime)))
    if opener is None:
        raise UserError(
            f"{exported.folder}: its format '{exported.format}' runs in {runtime}, which load does not open; load the "
            f"run, or export it as onnx"
        )
    module, _, function = opener.partition(":")
    return getattr(importlib.import_module(module), function)(exported, device)


def _check_alone(path: Path) -> None:
    """Raise a UserError if the file is a part of a run or of an exported folder, which describes it."""
    folder = path.parent
    parts = {artefact.NAME: ".onnx", OPEN_CLIP: "open_clip_model.safetensors", SAVED: WEIGHTS}
    for name, part in parts.items():
        if path.name.endswith(part) and (folder / name).is_file():
            raise UserError(f"{path}: is a part of {folder}, whose {name} describes it; load the folder")
