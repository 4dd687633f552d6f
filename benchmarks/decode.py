"""Time the preparation of a JPEG for SAM, with PIL and with fmdistill: decode, longest side to 1024, pad.

    OMP_NUM_THREADS=1 python benchmarks/decode.py

Uses photographs that ship with scikit-image, enlarged to 2250x1500, q90 4:2:0. The methods alternate in this process;
prints a markdown table of the minimum CPU time over several rounds, which other load on the machine hardly changes.
"""

import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide

from fmdistill.backbones.sam import SamPreprocess
from fmdistill.images import decode
from fmdistill.mini.photos import photograph

NAMES, SIZE, SIDE, ROUNDS = ("astronaut", "coffee", "chelsea", "retina"), (2250, 1500), 1024, 15


def jpeg(name: str, **settings) -> bytes:
    """Return the photograph, enlarged, as a JPEG."""
    buffer = io.BytesIO()
    large = Image.fromarray(photograph(name)).resize(SIZE, Image.Resampling.BICUBIC)
    large.save(buffer, "JPEG", quality=90, subsampling="4:2:0", **settings)
    return buffer.getvalue()


def reference(data: bytes) -> torch.Tensor:
    """Return uint8 (3, S, S) by PIL and segment_anything's transform."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    resized = torch.from_numpy(ResizeLongestSide(SIDE).apply_image(pixels)).permute(2, 0, 1)
    return torch.nn.functional.pad(resized, (0, SIDE - resized.shape[2], 0, SIDE - resized.shape[1]))


def pil(data: bytes) -> torch.Tensor:
    """Return uint8 (3, S, S) by PIL's decoder and PIL's resize, without an intermediate array."""
    image = Image.open(io.BytesIO(data)).convert("RGB").convert("RGB")  # once by the decoder, once by the preparation
    h, w = SamPreprocess(SIDE).resized(image.height, image.width)
    padded = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    small = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
    padded[:, :h, :w] = torch.from_numpy(small.copy()).permute(2, 0, 1)
    return padded


def race(works: dict[str, Callable[[bytes], torch.Tensor]], images: list[bytes]) -> dict[str, float]:
    """Return the minimum CPU milliseconds per image over ROUNDS rounds by name; the works alternate at every image."""
    spent = {name: [[] for _ in images] for name in works}
    for _ in range(ROUNDS):
        for number, data in enumerate(images):
            for name, work in works.items():
                start = time.process_time()
                work(data)
                spent[name][number].append(1000 * (time.process_time() - start))
    return {name: float(np.mean([min(times) for times in each])) for name, each in spent.items()}


def main() -> None:
    """Print one row per method and kind of JPEG."""
    works = {
        "PIL, as SamPredictor": reference,
        "PIL": pil,
        "exact (simplejpeg, PIL resize)": lambda data: SamPreprocess(SIDE).prepare(decode(data))[0],
        "fast (simplejpeg, torch resize)": lambda data: SamPreprocess(SIDE, exact=False).prepare(decode(data))[0],
    }
    print(f"{torch.get_num_threads()} thread(s), kernels for {torch.backends.cpu.get_cpu_capability()}\n")
    print("| JPEG | way | CPU ms an image | ratio to PIL | mean difference | largest |\n|---|---|---|---|---|---|")
    for kind, settings in {"baseline": {}, "progressive": {"progressive": True}}.items():
        images = [jpeg(name, **settings) for name in NAMES]
        least = race(works, images)
        for name, work in works.items():
            off = torch.stack([(work(data).int() - reference(data).int()).abs() for data in images])
            ratio = least["PIL"] / least[name]
            print(f"| {kind} | {name} | {least[name]:.1f} | {ratio:.2f} | {off.float().mean():.5f} | {off.max()} |")


if __name__ == "__main__":
    main()
