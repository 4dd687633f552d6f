"""Classify pictures by open_clip, with the folder of the export format `openclip`: SCRIPT FOLDER ASKED OUT."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import open_clip
import PIL.Image
import torch


def main(folder: str, given: Path, out: Path) -> None:
    """Write open_clip's embeddings, and the place of the most probable label of each picture."""
    asked = json.loads(given.read_text())
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        image = model.encode_image(torch.stack([preprocess(PIL.Image.open(path)) for path in asked["pictures"]]))
        classifier = open_clip.build_zero_shot_classifier(
            model, tokenizer, asked["labels"], [lambda label: asked["template"].replace("{}", label)]
        )
        chosen = (torch.nn.functional.normalize(image, dim=-1) @ classifier).argmax(1)
        text = model.encode_text(tokenizer(asked["texts"]))
    result = {"version": version("open_clip_torch"), "chosen": chosen.tolist()}
    out.write_text(json.dumps({**result, "image": image.tolist(), "text": text.tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
