"""Let other programs segment pictures with exported folders, and compare their masks with fmdistill's.

    python benchmarks/clients/run.py [CLIENT ...] [folder=build/clients] [run=RUN] [pictures=PICTURES]

Without names every client of CLIENTS runs. Each gets an environment of its own in the folder, made at its first run.
RUN is a finished run of a SAM; without it the packaged sam_mini is exported. PICTURES is a folder of JPEG and PNG
files; without it two photographs of scikit-image are segmented. Prints a table, and exits with 1 if a mean IoU is below
its client's limit.
"""

import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from environments import call, npm, photos, python

import fmdistill
from fmdistill import export
from fmdistill import recipe as recipes
from fmdistill.distill import checkpoint
from fmdistill.distill.student import WEIGHTS
from fmdistill.mini.sam import sam_mini_student

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Client:
    """A program: pip's arguments for it, the export format that it opens, the script that runs it, and its limits.

    `reference` is the format with which fmdistill's masks are computed, if the program prepares an image otherwise than
    `fmdistill.load` does for this format. `boxes` tells whether a prompt may be a box, and `most` is the number of
    points that it may have. `side` is the longest side of a picture that the program does not resize, None if it is the
    student's; `mean` and `fitting` are the least mean IoU of all prompts, and of those on pictures that it does not
    resize. Without a format the program opens the run itself, and without packages the script runs in this environment.
    A script that ends in .mjs is for Node.
    """

    packages: tuple[tuple[str, ...], ...]
    format: str
    script: str
    reference: str = ""
    boxes: bool = True
    most: int = 2
    side: int | None = None
    mean: float = 0.97
    fitting: float = 0.999


CLIENTS = {
    "segment_anything": Client((), "", "segment_anything_sam.py", reference="onnx"),
    "osam": Client((("osam",),), "labelme", "osam_sam.py"),
    "samexporter": Client(  # without its torch, which only its exporter needs
        (
            ("--no-deps", "samexporter"),
            ("onnxruntime==1.24.2", "opencv-python-headless==4.11.0.86", "pillow", "numpy"),
        ),
        "anylabeling",
        "samexporter_sam.py",
        reference="labelme",
        side=1024,
        mean=0.95,
        fitting=0.99,  # the graph does not round the pixels that it resizes
    ),
    "anylabeling": Client((("anylabeling",),), "anylabeling", "anylabeling_sam.py", side=1024, mean=0.95),
    "x-anylabeling": Client(
        (("x-anylabeling-cvhub[cpu]",),), "anylabeling", "anylabeling_sam.py", side=1024, mean=0.95
    ),
    "openvino": Client((("openvino", "openvino-model-api[onnx]"),), "openvino", "openvino_sam.py", most=1),
    "transformers.js": Client(
        (("@huggingface/transformers",),), "transformers", "transformers_sam.mjs", boxes=False, mean=0.9
    ),
}


def main(names: list[str], folder: Path, run: Path | None, pictures: str | None) -> bool:
    """Run the clients and print their table; return whether every one reached its limits."""
    folder.mkdir(parents=True, exist_ok=True)
    run = run or packaged(folder)
    passed = True
    print("| client | version | export | prompts | mean IoU | lowest | mean IoU of pictures that it does not resize |")
    print("|---|---|---|---|---|---|---|")
    for name in names or CLIENTS:
        client = CLIENTS[name]
        exported = made(folder, run, client.format) if client.format else run
        reference = made(folder, run, client.reference or client.format)
        model = json.loads((reference / "fmdistill.json").read_text())["model"]
        prompts = asked(folder / name, client, model, pictures)
        version, masks = answers(name, client, folder, exported, prompts)
        right = expected(reference, prompts)
        overlaps = np.array([iou(*pair) for pair in zip(masks, right, strict=True)])
        fitting = overlaps[[prompt["fits"] for prompt in prompts]].mean()
        figures = f"{overlaps.mean():.4f} | {overlaps.min():.4f} | {fitting:.4f}"
        print(f"| {name} | {version} | {client.format or 'as_sam()'} | {len(masks)} | {figures} |", flush=True)
        passed = passed and overlaps.mean() >= client.mean and fitting >= client.fitting
    return passed


def packaged(folder: Path) -> Path:
    """Store the packaged sam_mini as a finished run; return it."""
    run = folder / "sam_mini"
    recipe = recipes.load(HERE.parents[1] / "recipes/mini/sam_mini.yaml", [f"out={run}"])
    recipes.save(recipe, recipe.out)
    checkpoint.save_state(sam_mini_student("packaged").state_dict(), run / WEIGHTS)
    return run


@cache
def made(folder: Path, run: Path, format: str) -> Path:
    """Export the run in a format; return the folder."""
    return export.run(run, format, folder / "exports" / format)


def asked(folder: Path, client: Client, model: dict[str, Any], pictures: str | None) -> list[dict[str, Any]]:
    """Write the pictures, each as it is, and as large as it may be without being resized by the program.

    Return a click, two clicks and a box on each; `fits` tells whether the program leaves its picture's size. Its sides
    are multiples of 4: an encoder for 1024 px with a network for 256 px resizes other sides to parts of a pixel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    canvas, side = model["layout"]["canvas"] or (0, 0), client.side or model["image_size"]
    prompts = []
    for name, whole in photos(pictures).items():
        for fits in (False, True):
            picture = whole
            if fits:
                scale = min(side / max(picture.size), (canvas[0] or side) / picture.height)
                picture = picture.resize((4 * round(picture.width * scale / 4), 4 * round(picture.height * scale / 4)))
            path = folder / f"{name}{'_fitting' * fits}.png"
            picture.save(path)
            w, h = picture.size
            clicks = [[0.45 * w, 0.5 * h], [0.9 * w, 0.1 * h]]
            made = [(clicks[:1], [1], None), (clicks, [1, 0], None), ([], [], [0.2 * w, 0.15 * h, 0.8 * w, 0.9 * h])]
            prompts += [
                {"picture": str(path.absolute()), "points": points, "labels": labels, "box": box, "fits": fits}
                for points, labels, box in made
                if len(points) <= client.most and (client.boxes or box is None)
            ]
    return prompts


def answers(
    name: str, client: Client, folder: Path, exported: Path, prompts: list[dict[str, Any]]
) -> tuple[str, list[np.ndarray]]:
    """Run the client in its environment; return its version and its mask (H, W) of each prompt."""
    environment, given = folder / "environments" / name, folder / name / "prompts.json"
    given.write_text(json.dumps(prompts))
    script, arguments = HERE / client.script, [exported.absolute(), given.absolute()]
    if client.script.endswith(".mjs"):
        out = (folder / name / "masks.json").absolute()
        call(["node", script, npm(environment, client.packages[0]), *arguments, out])
        read = json.loads(out.read_text())
        return read["version"], [drawn(mask) for mask in read["masks"]]
    out = (folder / name / "masks.npz").absolute()
    if client.packages:
        call([python(environment, client.packages), script, *arguments, out])
    else:
        call([sys.executable, script, *arguments, out], dict(os.environ))
    with np.load(out) as read:
        return str(read["version"]), [read[f"mask{number}"] for number in range(len(prompts))]


def drawn(mask: dict[str, Any]) -> np.ndarray:
    """Return the mask (H, W) of lengths of runs."""
    values = np.arange(len(mask["runs"])) % 2 == 1
    return np.repeat(values, mask["runs"]).reshape(mask["height"], mask["width"])


def expected(exported: Path, prompts: list[dict[str, Any]]) -> list[np.ndarray]:
    """Return fmdistill's mask of each prompt: of several, the one whose predicted IoU is highest."""
    predictor = fmdistill.load(exported)
    masks = []
    for prompt in prompts:
        predictor.set_image(prompt["picture"])
        points = {"point_coords": prompt["points"], "point_labels": prompt["labels"]} if prompt["points"] else {}
        several, scores, _ = predictor.predict(**points, box=prompt["box"])
        masks.append(several[int(np.argmax(scores))])
    return masks


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two bool masks of the same size; 1 if both are empty."""
    assert a.shape == b.shape, f"a mask of {a.shape}, expected {b.shape}"
    either = (a | b).sum()
    return float((a & b).sum() / either) if either else 1.0


if __name__ == "__main__":
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    chosen = [argument for argument in sys.argv[1:] if "=" not in argument]
    if set(chosen) - set(CLIENTS) or set(settings) - {"folder", "run", "pictures"}:
        sys.exit(f"{__doc__}\nClients: {', '.join(CLIENTS)}")
    where = Path(settings.get("folder", "build/clients"))
    own = Path(settings["run"]) if "run" in settings else None
    sys.exit(not main(chosen, where, own, settings.get("pictures")))
