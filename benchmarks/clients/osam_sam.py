"""Segment by osam, the library by which labelme runs models, with the folder of the export format `labelme`.

osam has no list of custom models: its SAM class is given the folder's two files in place of those it downloads.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from exchange import answer, folder
from osam import types
from osam._models.sam import Sam100m


class Local(types.Blob):
    """A file that is here already."""

    @property
    def path(self) -> str:
        """Return its path, instead of one in osam's cache."""
        return self.url


def blob(path: Path) -> Local:
    """Return the file as osam describes one."""
    return Local(url=str(path), hash=f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}")


class Exported(Sam100m):
    """osam's SAM on the exported files."""

    name = "fmdistill"
    _blobs = {name: blob(folder() / f"{name}.onnx") for name in ("encoder", "decoder")}


def main() -> None:
    """Answer the prompts."""
    model = Exported()

    def segment(prompt: dict[str, Any]) -> np.ndarray:
        image = np.asarray(PIL.Image.open(prompt["picture"]).convert("RGB"))
        corners = [] if prompt["box"] is None else [prompt["box"][:2], prompt["box"][2:]]
        points = np.array([*prompt["points"], *corners], np.float32)
        labels = np.array([*prompt["labels"], *(2, 3)[: len(corners)]], np.int32)
        request = types.GenerateRequest(
            model="fmdistill", image=image, prompt=types.Prompt(points=points, point_labels=labels)
        )
        annotation = model.generate(request).annotations[0]
        box, mask = annotation.bounding_box, np.zeros(image.shape[:2], bool)
        mask[box.ymin : box.ymax + 1, box.xmin : box.xmax + 1] = annotation.mask
        return mask

    answer("osam", segment)


if __name__ == "__main__":
    main()
