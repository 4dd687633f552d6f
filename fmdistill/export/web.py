"""Write a student with its teacher's decoder as a web page: static files, on which a person points and sees masks."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from fmdistill.backbones.sam import PIXEL_MEAN, PIXEL_STD
from fmdistill.export import sam_onnx
from fmdistill.export.onnx_precision import Precision
from fmdistill.export.source import FinishedRun
from fmdistill.images.picture import DecodeError, decode
from fmdistill.predict.sam_layouts import LAYOUTS
from fmdistill.registry import UserError, resolve

PAGE = Path(__file__).parent / "page"
RUNTIME_VERSION = "1.30.0"  # of onnxruntime-web, with which the page is tested
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"
MODULE = "ort.wasm.min.mjs"
RUNTIME_FILES = (MODULE, "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PHOTOGRAPHS = ("chelsea", "coffee", "coins")  # of the packaged ones, those in the public domain
READER = {"photograph": "fmdistill.mini.photos:photograph"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # what every browser decodes


def run(
    source: FinishedRun,
    out: Path,
    precision: Precision = "fp32",
    runtime: str = "cdn",
    samples: str = "packaged",
    min_miou: float | None = None,
) -> Path:
    """Write a page for any static web server: drop a picture, point at it, see the mask.

    `runtime` is "cdn", the address from which browsers load onnxruntime-web, or the folder of a local copy, its npm
    package or that one's dist, of which the files needed are copied. `samples` are the pictures to start with:
    "packaged", "none", or a folder of JPEG, PNG and WebP files. Raises UserError like the export "onnx", whose encoder
    and decoder the page runs, and if a file is missing.
    """
    export = sam_onnx.export_of(source, out, "web", LAYOUTS["onnx"])
    files, pictures = _runtime_files(runtime), _samples(samples)

    def further(folder: Path) -> dict[str, Any]:
        return {"page": write_page(folder, files, pictures)}

    return sam_onnx.write(replace(export, further=further), out, precision, min_miou)


def write_page(folder: Path, runtime: list[Path], pictures: list[str | Path]) -> dict[str, Any]:
    """Put the page beside the networks in `folder`; return what the page must know, for the folder's JSON.

    `runtime` are the files of onnxruntime-web, none for the CDN, `pictures` names of packaged photographs, or paths.
    """
    for path in PAGE.iterdir():
        shutil.copyfile(path, folder / path.name)
    if runtime:
        (folder / "ort").mkdir()
    for path in runtime:
        shutil.copyfile(path, folder / "ort" / path.name)
    layout = LAYOUTS["onnx"]
    return {
        "runtime": "ort/" if runtime else CDN,
        "module": MODULE,
        "bytes": {name: (folder / name).stat().st_size for name in (layout.encoder, layout.decoder)},
        "samples": [_copy_sample(picture, folder) for picture in pictures],
        "mean": list(PIXEL_MEAN),
        "std": list(PIXEL_STD),
    }


def _runtime_files(runtime: str) -> list[Path]:
    """Return the files of a local copy of onnxruntime-web, none for the CDN. Raises UserError if one is missing."""
    if runtime == "cdn":
        return []
    root = Path(runtime).expanduser()
    folder = root / "dist" if (root / "dist").is_dir() else root
    missing = [name for name in RUNTIME_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"runtime={runtime}: has no {missing[0]}; `npm pack onnxruntime-web@{RUNTIME_VERSION}` downloads the "
            f"package, unpack it and name its folder, or set runtime=cdn"
        )
    return [folder / name for name in RUNTIME_FILES]


def _samples(samples: str) -> list[str | Path]:
    """Return names of packaged photographs, or paths. Raises UserError if the folder has no pictures."""
    if samples == "none":
        return []
    if samples == "packaged":
        return list(PHOTOGRAPHS)
    folder = Path(samples).expanduser()
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise UserError(f"samples={samples}: no folder with pictures ({', '.join(SUFFIXES)}); samples=none takes none")
    for path in paths:
        _pixels(path)
    return list(paths)


def _copy_sample(picture: str | Path, folder: Path) -> str:
    """Put a picture into the page's folder and return its path there."""
    (folder / "samples").mkdir(exist_ok=True)
    name = picture.name if isinstance(picture, Path) else f"{picture}.jpg"
    if isinstance(picture, Path):
        shutil.copyfile(picture, folder / "samples" / name)
    else:
        PIL.Image.fromarray(_pixels(picture)).save(folder / "samples" / name, quality=92)
    return f"samples/{name}"


def _pixels(picture: str | Path) -> np.ndarray:
    if isinstance(picture, str):
        return resolve("photograph", READER, "samples")(picture)
    try:
        return decode(picture.read_bytes())
    except DecodeError as error:
        raise UserError(f"samples: {picture} cannot be decoded ({error}); remove it from the folder") from None
