"""Compare transformers.js in Node with fmdistill on a CLIP's folder of the export format `transformers`.

    python benchmarks/clients/transformers_clip.py FOLDER MODULES

MODULES is a node_modules folder, made by `npm install --ignore-scripts @huggingface/transformers`; its scripts would
download CUDA. Prints the version and the cosine of each embedding: of a picture that each program resizes, of a picture
that has the network's size already, and of each text.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image

import fmdistill
from fmdistill.mini.photos import photograph

TEXTS = ["a photo of a cat", "two cups of coffee; one's empty!", "un café à Noël", "word " * 100, ""]


def main(folder: Path, modules: Path) -> None:
    """Run both and print the comparison."""
    described = json.loads((folder / "fmdistill.json").read_text())
    predictor, side = fmdistill.load(folder), described["model"]["image_size"]
    picture = PIL.Image.fromarray(photograph("chelsea"))
    with tempfile.TemporaryDirectory() as temporary:
        files = {"resized by each": Path(temporary, "whole.png"), "already small": Path(temporary, "small.png")}
        picture.save(files["resized by each"])
        picture.crop((100, 0, 400, 300)).resize((side, side)).save(files["already small"])
        for name, path in files.items():
            result = node(folder, modules, path, described["precision"])
            print(f"picture {name}: cosine {cosine(result['image'], predictor.encode_image(path))[0]:.6f}")
        expected = predictor.encode_text(TEXTS)
    print(f"transformers.js {result['version']}")
    for text, value in zip(TEXTS, cosine(result["text"], expected), strict=True):
        print(f"text {text[:32]!r}: cosine {value:.6f}")


def node(folder: Path, modules: Path, picture: Path, precision: str) -> dict:
    """Return what transformers.js computes."""
    script = Path(__file__).with_suffix(".mjs")
    command = ["node", script, modules, folder, picture, *TEXTS]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, "DTYPE": precision}
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def cosine(own: list, expected: np.ndarray) -> np.ndarray:
    """Return the cosine of each row."""
    own_ND = np.asarray(own, np.float64)
    return (own_ND * expected).sum(1) / np.linalg.norm(own_ND, axis=1) / np.linalg.norm(expected, axis=1)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
