"""Find one file of annotations for each image: a column beside it in its source, or a file of its key in a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from fmdistill.evaluate.segmenters import SegmentedImage
from fmdistill.evaluate.truth.instances import Skip
from fmdistill.registry import UserError


def check_folder(annotations: str, what: str) -> None:
    """Raise a UserError if `annotations` names a folder that does not exist; "" names none."""
    if annotations and not Path(annotations).expanduser().is_dir():
        raise UserError(f"annotations={annotations}: no such folder; name the folder of {what}")


def beside(annotations: str, names: Sequence[str], suffixes: Sequence[str]) -> tuple[dict[str, Path], dict[str, Skip]]:
    """Return the file of each image by its name, SHARD/KEY, and a skip for each that has none.

    A file has the image's key, folders included, with one of the `suffixes` instead of its own. Both are empty if
    `annotations` is "": the annotations are then in the images' source. Raises UserError if no image has a file.
    """
    files: dict[str, Path] = {}
    skipped: dict[str, Skip] = {}
    if not annotations:
        return files, skipped
    folder = Path(annotations).expanduser()
    for name in names:
        key = PurePosixPath(name.partition("/")[2])
        paths = [folder / (key.with_suffix(suffix) if key.suffix else f"{key}{suffix}") for suffix in suffixes]
        if path := next((path for path in paths if path.is_file()), None):
            files[name] = path
        else:
            skipped[name] = Skip("image not annotated", name)
    if not files:
        raise UserError(
            f"annotations={annotations}: has a file for none of the {len(names)} images; a file is called KEY"
            f"{suffixes[0]}, such as {next(iter(paths), '')}"
            if names
            else "there are no images to evaluate"
        )
    return files, skipped


def column_or_file(files: Mapping[str, Path], image: SegmentedImage, column: str) -> bytes | None:
    """Return an image's annotations as bytes: of its file if there are files, else of its `column`; None without."""
    if not files:
        return image.encoded.extra.get(column)
    path = files[image.name]
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore or remove it") from None
