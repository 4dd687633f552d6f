"""Classify pictures by clip_benchmark, with the folder of the export format `openclip`: SCRIPT FOLDER ASKED OUT."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import PIL.Image
import torch
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
from clip_benchmark.models import load_clip


def main(folder: str, given: Path, out: Path) -> None:
    """Write clip_benchmark's embeddings, and the place of the most probable label of each picture."""
    asked = json.loads(given.read_text())
    model, preprocess, tokenizer = load_clip("open_clip", f"local-dir:{folder}", "", None, device="cpu")
    model.eval()  # as its command does
    pixels = torch.stack([preprocess(PIL.Image.open(path)) for path in asked["pictures"]])
    templates = [asked["template"].replace("{}", "{c}")]
    with torch.inference_mode():
        classifier = zero_shot_classifier(model, tokenizer, asked["labels"], templates, "cpu", amp=False)
        batches = [(pixels, torch.zeros(len(pixels), dtype=torch.int64))]
        logits, _ = run_classification(model, classifier, batches, "cpu", amp=False)
        image, text = model.encode_image(pixels), model.encode_text(tokenizer(asked["texts"]))
    result = {"version": version("clip_benchmark"), "chosen": logits.argmax(1).tolist()}
    out.write_text(json.dumps({**result, "image": image.tolist(), "text": text.tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
