"""The export stage: a run -> a file or folder that other software loads.

A format is a function of (source, out) that writes `out`, a file or a folder, whole or not at all, and returns it. Its
further parameters are settings of the command line.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fmdistill.export.source import Source
from fmdistill.files import check_folder
from fmdistill.registry import UserError, bind

FORMATS: dict[str, Callable[..., Path] | str] = {
    "mobilesam": "fmdistill.export.mobilesam:run",
    "openclip": "fmdistill.export.openclip:run",
    "half": "fmdistill.export.half:run",
    "timm": "fmdistill.export.timm_checkpoint:run",
    "onnx": "fmdistill.export.onnx:run",
    "anylabeling": "fmdistill.export.sam_onnx:anylabeling",
    "labelme": "fmdistill.export.sam_onnx:labelme",
    "openvino": "fmdistill.export.sam_onnx:openvino",
    "transformers": "fmdistill.export.transformers:run",
    "web": "fmdistill.export.web:run",
}
FILES = {  # example file names of the one-file formats
    "mobilesam": "mobile_sam.pt",
    "half": "student.safetensors",
    "timm": "model.safetensors",
}


def run(
    run_dir: str | Path, format: str, out: str | Path, trust: bool = False, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the student of the finished run `run_dir` to `out` in `format`; return the path.

    `settings` are those of the format, `trust` allows the run's recipe to name classes of other packages. Raises
    UserError if the format or a setting is unknown, the run is not finished, or `out` cannot be written.
    """
    write = bind({**(settings or {}), "name": format}, FORMATS, "export", ("source", "out"))
    out = Path(out).expanduser()
    check_folder(out.parent, "the export")
    if format in FILES and out.is_dir():
        raise UserError(f"{out}: is a folder, but {format} is one file; name the file, such as {out / FILES[format]}")
    return write(source=Source.of(run_dir, trust), out=out)
