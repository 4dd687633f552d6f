"""Predict with a CLIP's exported ONNX files: both towers by ONNX Runtime, the tokenizer by open_clip."""

# Legend: B images or texts, S the image side, L the context length, D the embedding's width.

from collections.abc import Callable
from typing import Any

import numpy as np

from fmdistill.backbones.clip import ClipPreprocess, open_tokenizer
from fmdistill.predict.artefact import NAME, Artefact
from fmdistill.predict.clip import ClipPredictor
from fmdistill.predict.onnx_session import Session
from fmdistill.registry import UserError

NUMBERS = {"tensor(int32)": np.int32, "tensor(int64)": np.int64, "tensor(float)": np.float32}
KEYS = {"image", "text", "tokenizer_files", "context_length", "scale", "preprocess", "clip"}


def open_artefact(artefact: Artefact, device: str = "cpu") -> ClipPredictor:
    """Return the predictor of an exported folder, whose networks run on the CPU, whatever `device` is.

    Raises UserError if a file is missing or damaged, or ONNX Runtime is not installed.
    """
    model = artefact.model
    if artefact.kind != "clip" or not model.keys() >= KEYS:
        raise UserError(f"{artefact.folder / NAME}: describes no CLIP's ONNX files; export the run again")
    files = artefact.folder / model["tokenizer_files"]
    for name in artefact.files:
        if not name.endswith(".onnx"):
            artefact.path(name)  # a damaged tokenizer would misread texts
    tokenizer = open_tokenizer(model["clip"], files)
    image, text = (embed_batches(Session(artefact.path(model[tower]))) for tower in ("image", "text"))
    return ClipPredictor(
        image,
        lambda texts: text(tokenizer(texts, context_length=model["context_length"]).numpy()),
        ClipPreprocess.from_json(model["preprocess"]),
        float(model["scale"]),
    )


def embed_batches(session: Session) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of float images (B, 3, S, S), or of tokens (B, L), to the network's only output (B, D).

    A network of a fixed batch of one is run for each image or text. Raises UserError if it has several inputs.
    """
    if len(session.inputs) != 1 or len(session.outputs) != 1:
        raise UserError(f"an ONNX tower of a CLIP has one input and one output, not {list(session.inputs)}")
    ((name, (kind, shape)),) = session.inputs.items()
    dtype: Any = NUMBERS.get(kind, np.float32)

    def embed(batch: np.ndarray) -> np.ndarray:
        given = np.ascontiguousarray(batch, dtype)
        parts = [given] if shape[0] != 1 else [given[i : i + 1] for i in range(len(given))]
        return np.concatenate([session({name: part})[session.outputs[0]] for part in parts]).astype(np.float32)

    return embed
