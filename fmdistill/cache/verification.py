"""Check a finished cache: every checksum of every file, then a sample of its values against the teacher."""

from pathlib import Path

import numpy as np
import torch
from isal.isal_zlib import crc32  # zlib's, nine times as fast

from fmdistill import stop
from fmdistill.cache import sidecar
from fmdistill.cache.bucket import DamagedError
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.reader import Cache, ShardReader
from fmdistill.files import file_hash
from fmdistill.logs import progress
from fmdistill.registry import UserError
from fmdistill.teachers.compute import state_hash
from fmdistill.teachers.family import Head, Teacher

NAMED = 20  # damaged shards at most, before the others are counted
# Largest difference that arithmetic explains, relative to the largest value: another batch size or device.
ARITHMETIC = {"fp32": 1e-4, "bf16": 4e-2}


def verify_files(cache: Cache) -> int:
    """Return how many shards were read whole. UserError naming each whose bytes differ from its sidecar."""
    readers = [reader for split in cache.shards.values() for reader in split]
    shown = progress(readers, "verifying", unit="shard")
    found = [damaged for reader in stop.between(shown) if (damaged := _damaged(reader, cache.identity))]
    if found:
        more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
        which = "it" if len(found) == 1 else "these files"
        raise UserError(f"{'; '.join(found[:NAMED] + more)}; delete {which} and run `fmdistill cache` again")
    return len(readers)


def _damaged(reader: ShardReader, identity: str) -> str:
    """Return which file is damaged and how, "" where the shard is whole."""
    fields = sidecar.read(reader.path.with_suffix(".json"))
    try:
        tar = reader.fetch()
    except DamagedError as error:
        return str(error).rpartition("; ")[0]
    if fields is not None and fields["identity"] == identity and file_hash(tar) == fields["sha256"]:
        return ""
    return f"{tar}: {damage(tar, fields)}" + reader.store.note(tar.name)


def holds_head(root: Path, head: Head) -> bool:
    """Return whether `root` keeps this very head, readable."""
    try:
        kept = type(head).load(root)
    except UserError:
        return False
    return kept.config == head.config and state_hash(kept.state_dict()) == state_hash(head.state_dict())


def verify_values(cache: Cache, teacher: Teacher, samples: int, seed: int = 0) -> dict[str, float]:
    """Recompute `samples` images drawn by `seed`; return the largest and mean absolute error and the mean cosine.

    UserError where an error is larger than the codec's step and the teacher's arithmetic explain.
    """
    errors, cosines, count = [], [], 0
    for split in ("train", "validation"):
        data = CachedImages(cache, split)
        places = [(s, i) for s, shard in enumerate(data.shards) for i in range(len(shard.samples))]
        chosen = np.random.default_rng(seed).permutation(len(places))[: -(-samples // 2)]
        for number in stop.between(progress(sorted(chosen), f"recomputing {split}", unit="image")):
            shard, index = places[number]
            item = data.item(0, shard, index)
            fresh = teacher(item["pixels"][None], item["sizes"][None])
            for name, value in fresh.items():
                kept, new = item["outputs"][f"{cache.family}.{name}"], value[0]
                codec, member = data.shards[shard].codecs[name], data.shards[shard].samples[index]["outputs"][name]
                if "shape" in member:
                    _, height, width = member["shape"]
                    kept, new = kept[:, :height, :width], new[:, :height, :width]
                error = (kept - new).abs()
                allowed = float(new.abs().max()) * (codec.step + ARITHMETIC[cache.manifest["teacher"]["dtype"]])
                allowed += codec.least
                if float(error.max()) > allowed:
                    raise UserError(
                        f"{data.shards[shard].path}: {name} of '{item['keys']}' differs from the teacher's by "
                        f"{float(error.max()):.3g}, more than {allowed:.3g}; is this the teacher of the manifest?"
                    )
                errors.append(error.flatten())
                cosines.append(torch.nn.functional.cosine_similarity(kept.flatten(), new.flatten(), dim=0))
            count += 1
    if not errors:
        raise UserError(f"{cache.root}: holds no sample to recompute")
    every = torch.cat(errors)
    largest, mean = float(every.max()), float(every.mean())
    return {
        "samples": count,
        "largest_error": largest,
        "mean_error": mean,
        "mean_cosine": float(torch.stack(cosines).mean()),
    }


def damage(path: Path, fields: dict | None) -> str:
    """Return where the tar at `path` differs from its sidecar: the first member whose checksum is another."""
    if fields is None:
        return "its sidecar is missing, damaged or disagrees with the tar's size"
    with open(path, "rb") as file:
        for sample in fields["samples"]:
            for name, member in sample["outputs"].items():
                file.seek(member["offset"])
                if crc32(file.read(member["size"])) != member["crc32"]:
                    return f"the {name} of '{sample['key']}' is damaged (checksum)"
    return "bytes outside its members are damaged (checksum)"
