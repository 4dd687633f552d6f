"""Measure each codec on sam_mini: the bytes of an embedding, and the mIoU of the masks decoded from it.

    OMP_NUM_THREADS=1 python benchmarks/codecs.py

Uses validation images of the generated scenes and of the packaged photographs, cropped to 3:2, with 8x8 points per
image; masks are selected and compared as in eval/sam_grid_miou.yaml, with those of the exact embedding as reference.
Prints a markdown table. "trimmed" sets the padded tokens to zero, as a reader does. sam_mini's rows have 16 tokens, so
their 16-bit scales add 12 % to the values; the bytes shown are for SAM's rows of 64.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from fmdistill import teachers
from fmdistill.cache.codec import CODECS, named, padded
from fmdistill.evaluate.grid_miou import GridMiou, image_iou
from fmdistill.images import build, decode

SOURCES = {
    "photographs": {"name": "photos", "train": 8, "validation": 12},
    "scenes": {"name": "scenes", "train": 8, "validation": 12, "seed": 1000},
}
FULL, PROTOCOL = (256, 64, 64), GridMiou(grids=(8,))


def pictures(settings: dict) -> Iterator[Image.Image]:
    """Yield the source's validation images, cropped to the upper left 3:2."""
    images = build(settings)
    for shard in (s for s in images.shards() if s.split == "validation"):
        for encoded in images.read(shard):
            whole = Image.fromarray(decode(encoded.data))
            width = min(whole.width, round(whole.height * 1.5))
            yield whole.crop((0, 0, width, round(width / 1.5)))


@torch.inference_mode()
def main() -> None:
    """Print one row per codec, full and trimmed."""
    model = teachers.build({"name": "sam_mini"})
    head, cases = model.head(), []
    for kind, settings in SOURCES.items():
        for picture in pictures(settings):
            pixels, size = model.preprocess.prepare(picture)
            sizes = torch.tensor([size])
            exact = model(pixels[None], sizes)["embedding"][0]
            valid = model.preprocess.valid(sizes)[0].numpy()
            cases.append((kind, exact, valid, (picture.height, picture.width), size))
    print(f"{len(cases)} images, {PROTOCOL.grids[0]}x{PROTOCOL.grids[0]} points\n")
    print("| codec | MB, 64x64x256 at 3:2 | relative L2, valid tokens | mIoU photographs | mIoU scenes |")
    print("|---|---|---|---|---|")
    for label in [name + end for end in ("", "-trimmed") for name in CODECS]:
        codec, scores, errors = named(label), {kind: [] for kind in SOURCES}, []
        for kind, exact, valid, original, size in cases:
            rows, columns = int(valid.any(1).sum()), int(valid.any(0).sum())
            if not codec.trim:
                rows, columns = valid.shape
            stored = exact.numpy()[:, :rows, :columns]
            decoded = padded(torch.from_numpy(codec.decode(codec.pack(stored), stored.shape)), tuple(exact.shape))
            error, real = (decoded - exact)[:, torch.from_numpy(valid)], exact[:, torch.from_numpy(valid)]
            errors.append(float(error.norm() / real.norm()))
            scores[kind].append(image_iou(head, exact, decoded, original, size, PROTOCOL.grids[0], PROTOCOL).mean())
        megabytes = codec.size((FULL[0], 43, 64) if codec.trim else FULL) / 1e6
        means = " | ".join(f"{100 * np.mean(ious):.2f}" for ious in scores.values())
        print(f"| {label} | {megabytes:.2f} | {np.mean(errors):.1e} | {means} |", flush=True)


if __name__ == "__main__":
    main()
