"""Put an exported ONNX encoder in the place of a PyTorch student, so that any protocol judges it as it does a run."""

# Legend: B images, S the square's side, C channels, g tokens a side, D a vector's width.

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill.predict.artefact import Artefact
from fmdistill.predict.clip_onnx import embed_batches
from fmdistill.predict.onnx_session import Session
from fmdistill.predict.sam_layouts import SamLayout
from fmdistill.registry import UserError


class OnnxStudent(nn.Module):
    """The image encoder of an exported folder, run by ONNX Runtime on the CPU."""

    def __init__(self, embed: Callable[[np.ndarray], np.ndarray], artefact: Artefact) -> None:
        super().__init__()
        self.artefact = artefact
        self.embed = embed
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # by whose device callers choose the images'

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, C, g, g) or (B, D)} of normalised images, on their device."""
        embedding = self.embed(image_B3SS.cpu().numpy())
        return {"embedding": torch.from_numpy(embedding).to(image_B3SS.device)}


def open_student(artefact: Artefact, threads: int = 0) -> OnnxStudent:
    """Return the encoder of an exported folder, which runs on `threads` threads, 0 for one a core.

    Raises UserError if it is damaged, or takes no normalised images.
    """
    model = artefact.model
    if model.get("runtime") != "onnx":
        raise UserError(
            f"{artefact.folder}: was exported as {artefact.format}, whose weights are the run's; evaluate the run"
        )
    if artefact.kind == "clip":
        return OnnxStudent(embed_batches(Session(artefact.path(model["image"]), threads)), artefact)
    layout = SamLayout.from_json(model["layout"])
    if layout.raw:
        raise UserError(
            f"{artefact.folder}: the encoder of {artefact.format} prepares the image itself, so no protocol gives it "
            f"the teacher's pixels; export the run as onnx, with the same precision, and evaluate that folder"
        )
    session = Session(artefact.path(model["encoder"]), threads)

    def embed(images: np.ndarray) -> np.ndarray:
        parts = [session({layout.image: images[i : i + 1]})["image_embeddings"] for i in range(len(images))]
        return np.concatenate(parts)

    return OnnxStudent(embed, artefact)
