"""The export stage: a run -> a file or folder that other software loads."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from fmdistill import recipe as recipes
from fmdistill.backbones.clip import ClipPreprocess, TextHead, WholeClip
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import manifest
from fmdistill.cache.store import opened
from fmdistill.distill.student import load_student
from fmdistill.export import half, mobilesam, openclip
from fmdistill.files import check_folder
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, resolve
from fmdistill.teachers import family_of_cache


def run(run_dir: str | Path, format: str, out: str | Path, trust: bool = False) -> Path:
    """Write the student of the finished run `run_dir` to `out` in `format`; return the path.

    `trust` allows the run's recipe to name classes of other packages. Raises UserError if the format is unknown, the
    run is not finished, or `out` cannot be written.
    """
    write, out = resolve(format, FORMATS, "export format"), Path(out).expanduser()
    check_folder(out.parent, "the export")
    if format in FILES and out.is_dir():
        raise UserError(f"{out}: is a folder, but {format} is one file; name the file, such as {out / FILES[format]}")
    if format == "openclip":
        openclip.check_place(out)
    recipe = recipes.load_saved(run_dir, ["trust=true"] if trust else [])
    return write(recipe, load_student(run_dir, trust), out)


def _mobilesam(recipe: Recipe, student: nn.Module, out: Path) -> Path:
    """A SAM of the student and the teacher's decoder, in the format of MobileSAM's checkpoint."""
    if recipe.cache is None:
        raise UserError(f"{recipe.out}: its recipe has no `cache`, so there is no decoder to export; set cache.root")
    head = PromptHead.load(opened(recipe.cache).folder)  # not by the cache's reader, which needs the images
    return mobilesam.export(student, head, out)


def _openclip(recipe: Recipe, student: nn.Module, out: Path) -> Path:
    """A folder of the student and the teacher's text tower, which open_clip loads by local-dir:FOLDER."""
    if isinstance(student, WholeClip):
        return openclip.export_whole(student, out)
    if recipe.cache is None:
        raise UserError(f"{recipe.out}: its recipe has no `cache`, so there is no text tower to export; set cache.root")
    stored = manifest.read(opened(recipe.cache).folder)
    preprocess = family_of_cache(stored["family"], recipe.teacher).preprocess.from_json(stored["teacher"]["preprocess"])
    if stored["family"] != "clip" or not isinstance(preprocess, ClipPreprocess):
        raise UserError(
            f"{recipe.cache.root}: its teacher is of the family '{stored['family']}' and has no text tower; openclip "
            f"exports runs that were distilled from CLIP"
        )
    return openclip.export(student, TextHead.load(opened(recipe.cache).folder), preprocess, out)


def _half(recipe: Recipe, student: nn.Module, out: Path) -> Path:
    """The student's weights in float16, as a safetensors file."""
    return half.export(student, out)


FORMATS: dict[str, Callable[[Recipe, nn.Module, Path], Path] | str] = {
    "mobilesam": _mobilesam,
    "openclip": _openclip,
    "half": _half,
    "timm": "fmdistill.export.timm_checkpoint:run",
}
FILES = {  # example file names of the one-file formats
    "mobilesam": "mobile_sam.pt",
    "half": "student.safetensors",
    "timm": "model.safetensors",
}
