"""Write the files of the format `transformers` for either family: SAM's or CLIP's."""

from pathlib import Path

from fmdistill.export.onnx import dispatch
from fmdistill.export.onnx_precision import Precision
from fmdistill.export.source import FinishedRun
from fmdistill.registry import Entry

WRITERS: dict[str, Entry] = {
    "sam": "fmdistill.export.sam_onnx:transformers",
    "clip": "fmdistill.export.clip_onnx:transformers",
}


def run(
    source: FinishedRun,
    out: Path,
    precision: Precision = "fp32",
    min_miou: float | None = None,
    min_cosine: float | None = None,
) -> Path:
    """Write the folder that transformers.js and optimum load: onnx/, config.json and preprocessor_config.json.

    `min_miou` is SAM's and `min_cosine` CLIP's. Raises UserError if a setting is the other family's.
    """
    settings = {"min_miou": min_miou, "min_cosine": min_cosine}
    return dispatch("transformers", WRITERS, source, out, precision, settings)
