"""Find one file of annotations for each image: a column beside it in its source, or a file of its key in a folder."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from fmdistill.evaluate.segmenters import SegmentedImage
from fmdistill.evaluate.truth.instances import ImageTruth, JoinedTruth, Skip
from fmdistill.registry import UserError

NOT_ANNOTATED = "image not annotated"
Read = Callable[[bytes, SegmentedImage], ImageTruth]


def check_folder(annotations: str, what: str) -> None:
    """Raise a UserError if `annotations` names a folder that does not exist; "" names none."""
    if annotations and not Path(annotations).expanduser().is_dir():
        raise UserError(f"annotations={annotations}: no such folder; name the folder of {what}")


def join_files(annotations: str, names: Sequence[str], suffix: str, column: str, read: Read) -> JoinedTruth:
    """Join the annotations of one file an image with the images, SHARD/KEY each; `read` takes a file's bytes.

    A file lies in the folder `annotations` and has the image's key, folders included, with `suffix` instead of its own.
    If `annotations` is "", it is the `column` beside the image in its source. Raises UserError if no image has a file.
    """
    if not annotations:
        return JoinedTruth(names, partial(_of_column, column, read))
    if not names:
        raise UserError(f"annotations={annotations}: there are no images to evaluate")
    keys = {name: PurePosixPath(name.partition("/")[2]) for name in names}
    folder = Path(annotations).expanduser()
    paths = {name: folder / (key.with_suffix(suffix) if key.suffix else f"{key}{suffix}") for name, key in keys.items()}
    files = {name: path for name, path in paths.items() if path.is_file()}
    if not files:
        raise UserError(
            f"annotations={annotations}: has a file for none of the {len(names)} images; a file is called KEY{suffix}, "
            f"such as {next(iter(paths.values()))}"
        )
    skipped = tuple(Skip(NOT_ANNOTATED, name) for name in names if name not in files)
    return JoinedTruth(list(files), partial(_of_file, files, read), skipped)


def _of_column(column: str, read: Read, image: SegmentedImage) -> ImageTruth:
    data = image.encoded.extra.get(column)
    return ImageTruth((), (Skip(NOT_ANNOTATED, image.name),)) if data is None else read(data, image)


def _of_file(files: Mapping[str, Path], read: Read, image: SegmentedImage) -> ImageTruth:
    path = files[image.name]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore or remove it") from None
    return read(data, image)
