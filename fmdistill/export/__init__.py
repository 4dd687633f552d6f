"""The export stage: a run -> a file or folder that other software loads.

A format is a function of (source, out) that writes `out`, a file or a folder, whole or not at all, and returns it. Its
further parameters are settings of the command line. The settings LICENCES are of every format that writes a folder.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fmdistill.export.source import FinishedRun
from fmdistill.files import check_folder
from fmdistill.registry import UserError, bind

FORMATS: dict[str, Callable[..., Path] | str] = {
    "mobilesam": "fmdistill.export.mobilesam:run",
    "openclip": "fmdistill.export.openclip:run",
    "immich": "fmdistill.export.clip_onnx:immich",
    "half": "fmdistill.export.half:run",
    "timm": "fmdistill.export.timm_checkpoint:run",
    "onnx": "fmdistill.export.onnx:run",
    "anylabeling": "fmdistill.export.sam_onnx:anylabeling",
    "labelme": "fmdistill.export.sam_onnx:labelme",
    "openvino": "fmdistill.export.sam_onnx:openvino",
    "transformers": "fmdistill.export.transformers:run",
    "web": "fmdistill.export.web:run",
    "coreml": "fmdistill.export.coreml:run",
    "tflite": "fmdistill.export.tflite:run",
    "executorch": "fmdistill.export.executorch:run",
}
FILES = {  # example file names of the one-file formats
    "mobilesam": "mobile_sam.pt",
    "half": "student.safetensors",
    "timm": "model.safetensors",
}
LICENCES = ("license", "images_license")  # what the user states for the model card of a folder


def run(
    run_dir: str | Path, format: str, out: str | Path, trust: bool = False, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the student of the finished run `run_dir` to `out` in `format`; return the path.

    `settings` are those of the format, `trust` allows the run's recipe to name classes of other packages. Raises
    UserError if the format or a setting is unknown, the run is not finished, or `out` cannot be written.
    """
    own = dict(settings or {})
    licences = {name: _licence(name, own.pop(name), format) for name in LICENCES if name in own}
    write = bind({**own, "name": format}, FORMATS, "export", ("source", "out"))
    out = Path(out).expanduser()
    check_folder(out.parent, "the export")
    if format in FILES and out.is_dir():
        raise UserError(f"{out}: is a folder, but {format} is one file; name the file, such as {out / FILES[format]}")
    return write(source=FinishedRun.of(run_dir, trust, **licences), out=out)


def _licence(name: str, value: Any, format: str) -> str:
    if format in FILES:
        raise UserError(f"export.{name}={value}: for the model card of a folder, but {format} is one file; remove it")
    if not isinstance(value, str) or not value.strip() or "\n" in value:
        raise UserError(f"export.{name}={value!r}: expected a licence's name in one line, such as apache-2.0")
    if name == "license" and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value):
        raise UserError(
            f"export.license={value}: expected one of Hugging Face's identifiers, such as apache-2.0 or mit"
        )
    return value.strip()
