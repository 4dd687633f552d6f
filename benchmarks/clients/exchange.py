"""Read the prompts that run.py sends to another program, and write the program's masks for it; needs NumPy alone.

A client's script is started as `SCRIPT FOLDER PROMPTS OUT`: an exported folder, a JSON list of prompts (a picture's
path, points, labels, and a box or null, all in the picture's pixels) and the .npz to write.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def folder() -> Path:
    """Return the exported folder."""
    return Path(sys.argv[1])


def answer(package: str, segment: Callable[[dict[str, Any]], np.ndarray]) -> None:
    """Write the bool mask (H, W) that `segment` returns for each prompt, and the version of `package`."""
    prompts = json.loads(Path(sys.argv[2]).read_text())
    masks = {f"mask{number}": segment(prompt) for number, prompt in enumerate(prompts)}
    np.savez_compressed(sys.argv[3], version=version(package), **masks)


def marks(prompt: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a prompt as the list of marks that samexporter, anylabeling and X-AnyLabeling take."""
    made = [
        {"type": "point", "data": point, "label": label}
        for point, label in zip(prompt["points"], prompt["labels"], strict=True)
    ]
    return made if prompt["box"] is None else [*made, {"type": "rectangle", "data": prompt["box"]}]
