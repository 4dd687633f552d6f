"""Mean, variance and covariance of a teacher's output over a cache's training images.

Means and variances come from the sidecars and cost nothing. A covariance matrix takes one pass over the stored outputs;
it is written beside the shards, as covariance-OUTPUT-PADDING-HASH.safetensors, and read the next time. HASH and the
file's metadata name the cache and the shards that it describes, so it is never used for others.
"""

# Legend: B images of a batch, T their tokens, C channels of a map or dimensions of a vector.

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fmdistill import stop
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.reader import Cache
from fmdistill.files import write_whole
from fmdistill.launcher import processes
from fmdistill.logs import log, progress
from fmdistill.registry import UserError, suggest

Padding = Literal["include", "exclude"]
ROUNDING = 2e-6  # a variance below this share of the mean square is rounding of the sidecars' sums
CHUNK = 16  # images whose outputs are read at once


@dataclass(frozen=True)
class ChannelMoments:
    """The number of tokens or vectors, and of each of their channels the mean and the standard deviation, float64."""

    count: int
    mean_C: np.ndarray
    deviation_C: np.ndarray


@dataclass(frozen=True)
class Covariance:
    """The number of tokens or vectors, their mean and their covariance matrix, float64."""

    count: int
    mean_C: np.ndarray
    covariance_CC: np.ndarray


def channel_moments(cache: Cache, output: str, padding: Padding) -> ChannelMoments:
    """Return mean and deviation of each channel of `output` over the training shards, from their sidecars.

    They are of what the teacher made, before any codec, and of all images of the shards. A deviation that is too small
    for the sums is raised to what they resolve, 0.14 % of the root mean square. Raises UserError if a sidecar has no
    such statistics, or no token counts.
    """
    name, shards = _stored(cache, output), cache.shards["train"]
    kinds = ("valid",) if padding == "exclude" else ("valid", "padded")
    count, total_C, square_C = 0, 0.0, 0.0
    for shard in shards:
        try:
            of_kinds = [shard.statistics[name][kind] for kind in kinds]
            count += sum(int(values["count"]) for values in of_kinds)
            total_C = total_C + np.sum([values["sum"] for values in of_kinds], axis=0, dtype=np.float64)
            square_C = square_C + np.sum([values["square"] for values in of_kinds], axis=0, dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{shard.path}: its sidecar has no statistics of {name} ({type(error).__name__}); delete both and run "
                f"`fmdistill cache` again"
            ) from None
    mean_C, mean_square_C = np.asarray(total_C) / max(count, 1), np.asarray(square_C) / max(count, 1)
    variance_C = np.maximum(mean_square_C - mean_C**2, ROUNDING * mean_square_C)
    _check(cache, name, count, variance_C)
    return ChannelMoments(count, mean_C, np.sqrt(variance_C))


def covariance(cache: Cache, output: str, padding: Padding, gpu: bool = False) -> Covariance:
    """Return the covariance of `output` over the training images, read from beside the cache or computed in a pass.

    The values are those that training reads, decoded. The pass adds in double precision, with `gpu` on this process's
    GPU; several processes of a launcher share it. Without permission to write the file, it is computed each time.
    """
    name = _stored(cache, output)
    described = _description(cache, name, padding)
    path = cache.root / f"covariance-{name}-{padding}-{described['shards'][:12]}.safetensors"
    stored = read(path, described)
    rank, world = processes()
    if world > 1 and not all(gather_object([stored is not None])):
        stored = None  # all compute it, or none
    if stored is None:
        stored = _computed(cache, name, padding, torch.device("cuda" if gpu else "cpu"))
        if rank == 0:
            _write(path, stored, described)
    _check(cache, name, stored.count, np.diag(stored.covariance_CC))
    return stored


def read(path: Path, described: dict[str, str]) -> Covariance | None:
    """Return the covariance in the file `path`, None if it is missing, damaged, or of other images than `described`."""
    try:
        with safe_open(path, "numpy") as file:
            if file.metadata() != described:
                return None
            count, mean_C, covariance_CC = (file.get_tensor(key) for key in ("count", "mean", "covariance"))
    except (OSError, SafetensorError):
        return None
    return Covariance(int(count[0]), mean_C, covariance_CC)


def _write(path: Path, values: Covariance, described: dict[str, str]) -> None:
    if not os.access(path.parent, os.W_OK):
        log.info("%s: cannot be written, so the next run computes the covariance again", path)
        return
    tensors = {"count": np.array([values.count]), "mean": values.mean_C, "covariance": values.covariance_CC}
    write_whole(path, save(tensors, described))
    log.info("%s: covariance of %d tokens, %d channels", path, values.count, len(values.mean_C))


def _description(cache: Cache, name: str, padding: Padding) -> dict[str, str]:
    """Return what the values depend on, as the metadata of the file."""
    shards = [[shard.name, shard.sha256, len(shard.samples)] for shard in cache.shards["train"]]
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    return {"format": "1", "cache": cache.identity, "output": name, "padding": padding, "shards": digest}


def _computed(cache: Cache, name: str, padding: Padding, device: torch.device) -> Covariance:
    data, (rank, world) = CachedImages(cache, "train"), processes()
    places = [(shard, index) for shard, count in enumerate(data.counts) for index in range(count)]
    chunks = [places[start : start + CHUNK] for start in range(0, len(places), CHUNK)][rank::world]
    width, count = cache.shapes[name][0], 0
    total_C = torch.zeros(width, dtype=torch.float64, device=device)
    square_CC = torch.zeros(width, width, dtype=torch.float64, device=device)
    for chunk in stop.between(progress(chunks, f"covariance of {name}", total=len(chunks))):
        token_TC = _tokens(data, name, padding, chunk).to(device).double()
        count += len(token_TC)
        total_C += token_TC.sum(0)
        square_CC += token_TC.T @ token_TC
    own: Any = (count, total_C.cpu().numpy(), square_CC.cpu().numpy())
    parts = gather_object([own]) if world > 1 else [own]
    total = sum(part[0] for part in parts)
    mean_C = np.sum([part[1] for part in parts], axis=0) / max(total, 1)
    mean_square_CC = np.sum([part[2] for part in parts], axis=0) / max(total, 1)
    return Covariance(total, mean_C, mean_square_CC - np.outer(mean_C, mean_C))


def _tokens(data: CachedImages, name: str, padding: Padding, places: Sequence[tuple[int, int]]) -> Tensor:
    """Return the vectors (B, C), or the maps' tokens (T, C) without padding if it is excluded."""
    values = data.outputs(places)[name]
    if values.dim() == 2:
        return values
    token_BNC = values.flatten(2).transpose(1, 2)
    if padding == "include" or data.cache.outputs[name].tokens != "image":
        return token_BNC.flatten(0, 1)
    sizes_B2 = torch.tensor([data.shards[shard].samples[index]["resized"] for shard, index in places])
    return token_BNC[data.cache.preprocess.valid(sizes_B2).flatten(1)]


def _stored(cache: Cache, output: str) -> str:
    """Return the cache's own name of an output, which may have the family's prefix."""
    name = output.removeprefix(f"{cache.family}.")
    own = [known for known, described in cache.outputs.items() if described.of is None]
    if name not in own:
        raise UserError(f"output={output}: {cache.root} has no such output.{suggest(name, own)}")
    return name


def _check(cache: Cache, name: str, count: int, variance_C: np.ndarray) -> None:
    if count == 0 or not np.isfinite(variance_C).all() or not variance_C.max() > 0:
        raise UserError(
            f"{cache.root}: {name} has {count} tokens in the training images and the same value in all of them, so it "
            f"cannot be standardised; set standardize=none, or cache more images"
        )
