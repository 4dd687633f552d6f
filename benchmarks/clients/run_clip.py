"""Let other programs classify pictures with a CLIP's exported folders, and compare them with fmdistill.

    python benchmarks/clients/run_clip.py [CLIENT ...] [folder=build/clients] [run=RUN] [pictures=PICTURES] [labels=A,B]

Without names every client of CLIENTS runs. Each gets an environment of its own in the folder, made at its first run;
those with PyTorch take 7 GB each. RUN is a finished run of a CLIP; without it the packaged clip_mini is exported, and
the labels are its 256 classes. PICTURES is a folder of JPEG and PNG files; without it two photographs of scikit-image
are classified. Each picture is given as it is, and cut to a square of the network's side. Prints a table, and exits
with 1 if a label of a picture of that size differs, or a cosine is below LIMIT.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.ImageOps
from environments import call, npm, photos, python

import fmdistill
from fmdistill import export
from fmdistill import recipe as recipes
from fmdistill.distill import checkpoint
from fmdistill.distill.student import WEIGHTS
from fmdistill.mini.captioned import class_names
from fmdistill.mini.clip import clip_mini_student

HERE = Path(__file__).parent
TEMPLATE = "a photo of a {}."
TEXTS = ["a photo of a cat", "two cups of coffee; one's empty!", "un café à Noël", "word " * 100, ""]
LIMIT = 0.9999
COLUMNS = ["client", "version", "export", "same labels", "lowest cosine", "of texts", "same labels, resized", "cosine"]


@dataclass(frozen=True)
class ClipClient:
    """A program: pip's or npm's packages, the export format that it opens, and the script that runs it."""

    packages: tuple[str, ...]
    format: str
    script: str


CLIENTS = {
    "open_clip": ClipClient(("open_clip_torch",), "openclip", "open_clip_labels.py"),
    "clip_benchmark": ClipClient(("clip_benchmark", "numpy<2.4"), "openclip", "clip_benchmark_labels.py"),
    "transformers.js": ClipClient(("@huggingface/transformers",), "transformers", "transformers_clip.mjs"),
}


def main(names: list[str], folder: Path, settings: dict[str, str]) -> bool:
    """Run the clients and print their table; return whether labels and embeddings are fmdistill's."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Path(settings["run"]) if "run" in settings else packaged(folder)
    labels = settings["labels"].split(",") if "labels" in settings else class_names()
    passed = True
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in names or CLIENTS:
        client = CLIENTS[name]
        exported = export.run(run, client.format, folder / "exports" / f"clip-{client.format}")
        clip = fmdistill.load(exported)
        small, whole = asked(folder / name, clip.preprocess.image_size, settings.get("pictures"))
        given = {"pictures": [*small, *whole], "labels": labels, "template": TEMPLATE, "texts": TEXTS}
        read = answers(name, client, folder, exported, given)
        same = np.array(read["chosen"]) == clip.classify(given["pictures"], labels, TEMPLATE).argmax(1)
        image = cosine(read["image"], clip.encode_image(given["pictures"]))
        text = cosine(read["text"], clip.encode_text(TEXTS))
        cells = [name, read["version"], f"`{client.format}`"]
        for part in (slice(0, len(small)), slice(len(small), None)):
            cells += [f"{same[part].sum()} of {len(same[part])}", f"{image[part].min():.6f}"]
        cells.insert(5, f"{text.min():.6f}")
        print(f"| {' | '.join(cells)} |", flush=True)
        passed = passed and bool(same[: len(small)].all()) and min(image[: len(small)].min(), text.min()) >= LIMIT
    return passed


def packaged(folder: Path) -> Path:
    """Store the packaged clip_mini as a finished run; return it."""
    run = folder / "clip_mini"
    recipe = recipes.load(HERE.parents[1] / "recipes/mini/clip_mini.yaml", [f"out={run}"])
    recipes.save(recipe, recipe.out)
    checkpoint.save_state(clip_mini_student("packaged").state_dict(), run / WEIGHTS)
    return run


def asked(folder: Path, side: int, pictures: str | None) -> tuple[list[str], list[str]]:
    """Write the pictures; return the paths of squares of `side` pixels cut from them, and of the whole pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    small, whole = [], []
    for name, picture in photos(pictures).items():
        for paths, path, shown in (
            (small, folder / f"{name}_{side}.png", PIL.ImageOps.fit(picture, (side, side))),
            (whole, folder / f"{name}.png", picture),
        ):
            shown.save(path)
            paths.append(str(path.absolute()))
    return small, whole


def answers(name: str, client: ClipClient, folder: Path, exported: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run the client in its environment; return its version, embeddings, and the label's place of each picture."""
    environment = folder / "environments" / (name if client.format == "openclip" else "transformers.js")
    questions, out = ((folder / name / f"{part}.json").absolute() for part in ("classify", "chosen"))
    questions.write_text(json.dumps(given))
    if client.script.endswith(".mjs"):
        command: list[Any] = ["node", HERE / client.script, npm(environment, client.packages)]
    else:
        command = [python(environment, (client.packages,)), HERE / client.script]
    call([*command, exported.absolute(), questions, out])
    return json.loads(out.read_text())


def cosine(own: list, expected_ND: np.ndarray) -> np.ndarray:
    """Return the cosine of each row."""
    own_ND = np.asarray(own, np.float64)
    return (own_ND * expected_ND).sum(1) / np.linalg.norm(own_ND, axis=1) / np.linalg.norm(expected_ND, axis=1)


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    chosen = [argument for argument in sys.argv[1:] if "=" not in argument]
    if set(chosen) - set(CLIENTS) or set(options) - {"folder", "run", "pictures", "labels"}:
        sys.exit(f"{__doc__}\nClients: {', '.join(CLIENTS)}")
    sys.exit(not main(chosen, Path(options.get("folder", "build/clients")), options))
