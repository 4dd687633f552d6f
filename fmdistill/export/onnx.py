"""Write the files of the format `onnx` for either family: SAM's or CLIP's."""

from pathlib import Path

from fmdistill.export.onnx_precision import Precision
from fmdistill.export.source import FinishedRun, check_family
from fmdistill.registry import Entry, resolve

WRITERS: dict[str, Entry] = {"sam": "fmdistill.export.sam_onnx:onnx", "clip": "fmdistill.export.clip_onnx:onnx"}


def run(
    source: FinishedRun,
    out: Path,
    precision: Precision = "fp32",
    single: bool | None = None,
    min_miou: float | None = None,
    min_cosine: float | None = None,
) -> Path:
    """Write ONNX files and the JSON that describes them: SAM's encoder and decoder, or CLIP's two towers.

    `single` (one mask instead of four) and `min_miou` are SAM's, `min_cosine` is CLIP's. Raises UserError if a setting
    is the other family's.
    """
    settings = {"single": single, "min_miou": min_miou, "min_cosine": min_cosine}
    return dispatch("onnx", WRITERS, source, out, precision, settings)


def dispatch(
    name: str,
    writers: dict[str, Entry],
    source: FinishedRun,
    out: Path,
    precision: Precision,
    settings: dict[str, bool | float | None],
) -> Path:
    """Call the family's writer with the settings that are not None. Raises UserError as `check_family`."""
    family = check_family(source, name, settings)
    chosen = {setting: value for setting, value in settings.items() if value is not None}
    return resolve(family, writers, "family")(source, out, precision=precision, **chosen)
