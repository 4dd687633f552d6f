"""Segment by samexporter's inference with the folder of the export format `anylabeling`."""

from typing import Any

import cv2
import numpy as np
from exchange import answer, folder, marks
from samexporter.sam_onnx import SegmentAnythingONNX


def main() -> None:
    """Answer the prompts."""
    model = SegmentAnythingONNX(str(folder() / "encoder.onnx"), str(folder() / "decoder.onnx"))

    def segment(prompt: dict[str, Any]) -> np.ndarray:
        masks = model.predict_masks(model.encode(cv2.imread(prompt["picture"])), marks(prompt))
        return masks[0, 0] > 0

    answer("samexporter", segment)


if __name__ == "__main__":
    main()
