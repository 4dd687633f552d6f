"""Segment by segment_anything's SamPredictor on the network that `fmdistill.load(RUN).as_sam()` returns.

SamAutomaticMaskGenerator runs on it too, on the pictures that are not resized: each of its masks must be one of the
three that SamPredictor gives for its point.
"""

from typing import Any

import numpy as np
import PIL.Image
from exchange import answer, folder
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

import fmdistill


def main() -> None:
    """Answer the prompts."""
    network = fmdistill.load(folder()).as_sam()
    predictor = SamPredictor(network)
    everything = SamAutomaticMaskGenerator(network, points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    compared: set[str] = set()

    def segment(prompt: dict[str, Any]) -> np.ndarray:
        image = np.asarray(PIL.Image.open(prompt["picture"]).convert("RGB"))
        predictor.set_image(image)
        if prompt["fits"] and prompt["picture"] not in compared:
            compared.add(prompt["picture"])
            compare(everything.generate(image), predictor)
        points = {"point_coords": np.array(prompt["points"]), "point_labels": np.array(prompt["labels"])}
        box = None if prompt["box"] is None else np.array(prompt["box"])
        masks, scores, _ = predictor.predict(**(points if prompt["points"] else {}), box=box)
        return masks[int(np.argmax(scores))]

    answer("segment-anything", segment)


def compare(generated: list[dict[str, Any]], predictor: SamPredictor) -> None:
    """Stop unless every generated mask is one of its point's."""
    assert generated, "no mask was generated"
    for record in generated:
        masks, _, _ = predictor.predict(np.array(record["point_coords"]), np.ones(1))
        mask = record["segmentation"]
        overlaps = [(mask & other).sum() / max(1, (mask | other).sum()) for other in masks]
        assert max(overlaps) > 0.999, f"a generated mask has an IoU of {max(overlaps)} with its point's"


if __name__ == "__main__":
    main()
