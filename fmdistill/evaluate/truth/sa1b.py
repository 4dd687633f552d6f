"""Read the instances of SA-1B's JSON, one file an image: a column of its tar, or a file in a folder."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmdistill.evaluate.segmenters import SegmentedImage
from fmdistill.evaluate.truth.files import check_folder, join_files
from fmdistill.evaluate.truth.instances import MALFORMED, ImageTruth, Instance, JoinedTruth, Skip, instance, problem

COLUMN = "json"  # the column of SA-1B's tars that holds an image's annotations


@dataclass(frozen=True)
class Sa1bTruth:
    """Instances of SA-1B's JSON, {"image": {...}, "annotations": [...]}, with their `point_coords`.

    Without `annotations` it is the column `json` beside the image in its tar; else `annotations` is a folder with a
    file KEY.json for each image, which may be the folder of the images.
    """

    annotations: str = ""

    def check(self) -> None:
        """Raise a UserError if the folder is missing."""
        check_folder(self.annotations, "SA-1B's JSON files")

    def join(self, names: Sequence[str]) -> JoinedTruth:
        """Join the files with images, SHARD/KEY each. Raises UserError if a folder has a file for none of them."""
        self.check()
        return join_files(self.annotations, names, ".json", COLUMN, _read)


def _read(data: bytes, image: SegmentedImage) -> ImageTruth:
    skipped: list[Skip] = []
    try:
        annotations = json.loads(data)["annotations"]
        if not isinstance(annotations, list):
            raise ValueError(f"its annotations are {type(annotations).__name__}, expected a list")
    except MALFORMED as error:
        return ImageTruth((), (Skip("annotations malformed", f"{image.name}: {problem(error)}"),))
    instances = tuple(_instances(annotations, image.name, skipped))
    return ImageTruth(instances, tuple(skipped))


def _instances(annotations: list, name: str, skipped: list[Skip]) -> Iterator[Instance]:
    for number, annotation in enumerate(annotations):
        try:
            yield instance(annotation, number)
        except (*MALFORMED, AttributeError) as error:
            skipped.append(Skip("annotation malformed", f"{name}, annotation {number}: {problem(error)}"))
