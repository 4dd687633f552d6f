"""Segment by OpenVINO and its model_api, with the folder of the export format `openvino`.

model_api takes one point or one box for a mask.
"""

from typing import Any

import cv2
import numpy as np
from exchange import answer, folder
from model_api.models import Model, Prompt, SAMVisualPrompter


def main() -> None:
    """Answer the prompts."""
    encoder, decoder = (
        Model.create_model(str(folder() / f"{name}.onnx"), device="CPU") for name in ("encoder", "decoder")
    )
    prompter = SAMVisualPrompter(encoder, decoder)

    def segment(prompt: dict[str, Any]) -> np.ndarray:
        image = cv2.cvtColor(cv2.imread(prompt["picture"]), cv2.COLOR_BGR2RGB)
        points = [Prompt(np.array(point), 1) for point in prompt["points"]]
        boxes = [] if prompt["box"] is None else [Prompt(np.array(prompt["box"]), 1)]
        return prompter(image, boxes=boxes or None, points=points or None).processed_mask[0].astype(bool)

    answer("openvino-model-api", segment)


if __name__ == "__main__":
    main()
