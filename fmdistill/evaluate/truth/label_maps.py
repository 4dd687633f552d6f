"""Read instances from label maps: one PNG an image, one value an instance, 0 for none."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fmdistill.evaluate.masks import to_rle
from fmdistill.evaluate.segmenters import SegmentedImage
from fmdistill.evaluate.truth.files import check_folder, join_files
from fmdistill.evaluate.truth.instances import ImageTruth, JoinedTruth, Skip, of_mask

COLUMN = "labels.png"  # the column in which sources such as `scenes` state the object of each pixel
MODES = ("1", "L", "P", "I", "I;16")  # one channel; a palette's indices are the values


@dataclass(frozen=True)
class LabelMaps:
    """Instances of label maps: the pixels of one value above 0 are one instance.

    Without `annotations` a map is the column `labels.png` beside the image; else `annotations` is a folder with a file
    KEY.png for each image, of 8, 16 or 32 bits and one channel, or with a palette.
    """

    annotations: str = ""

    def check(self) -> None:
        """Raise a UserError if the folder is missing."""
        check_folder(self.annotations, "label maps, KEY.png")

    def join(self, names: Sequence[str]) -> JoinedTruth:
        """Join the maps with images, SHARD/KEY each. Raises UserError if a folder has a map for none of them."""
        self.check()
        return join_files(self.annotations, names, ".png", COLUMN, _read)


def _read(data: bytes, image: SegmentedImage) -> ImageTruth:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in MODES:
                raise ValueError(f"a label map of mode {picture.mode}, expected one channel")
            if (picture.height, picture.width) != image.original:
                text = f"{image.name} is of {list(image.original)}, its map of {[picture.height, picture.width]}"
                return ImageTruth((), (Skip("image of another size", text),))
            labels_HW = np.asarray(picture).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return ImageTruth((), (Skip("annotations malformed", f"{image.name}: {error}"[:200]),))
    values = [int(value) for value in np.unique(labels_HW) if value > 0]
    masks = ((value, labels_HW == value) for value in values)
    return ImageTruth(tuple(of_mask(value, mask_HW, to_rle(mask_HW)) for value, mask_HW in masks))
