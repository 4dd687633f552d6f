"""Verify a finished cache: every checksum of every file, then the values of some images against the teacher."""

from pathlib import Path

import numpy as np
import torch
from isal.isal_zlib import crc32  # zlib's, nine times as fast
from torch import Tensor

from fmdistill import stop
from fmdistill.cache import captions, sidecar
from fmdistill.cache.bucket import DamagedError
from fmdistill.cache.dataset import CachedImages
from fmdistill.cache.reader import Cache, ShardReader
from fmdistill.files import file_hash
from fmdistill.logs import progress
from fmdistill.registry import UserError
from fmdistill.teachers.compute import state_hash
from fmdistill.teachers.family import Head, Teacher

NAMED = 20  # damaged shards that an error names; the others are counted
# Largest difference that another batch size or device explains, relative to the largest value.
ARITHMETIC = {"fp32": 1e-4, "bf16": 4e-2}


def verify_files(cache: Cache) -> int:
    """Read all shards and return their number; UserError that names each whose bytes differ from its sidecar."""
    readers = [reader for split in cache.shards.values() for reader in split]
    shown = progress(readers, "verifying", unit="shard")
    damaged = [text for reader in stop.between(shown) if (text := _describe_damage(reader, cache.identity))]
    if damaged:
        more = [f"and {len(damaged) - NAMED} more"] if len(damaged) > NAMED else []
        which = "it" if len(damaged) == 1 else "these files"
        raise UserError(f"{'; '.join(damaged[:NAMED] + more)}; delete {which} and run `fmdistill cache` again")
    return len(readers)


def _describe_damage(reader: ShardReader, identity: str) -> str:
    """Return which file of the shard is damaged and how; "" if none is."""
    fields = sidecar.read(reader.path.with_suffix(".json"))
    try:
        tar = reader.fetch()
    except DamagedError as error:
        return str(error).rpartition("; ")[0]
    if fields is not None and fields["identity"] == identity and file_hash(tar) == fields["sha256"]:
        return ""
    return f"{tar}: {damage(tar, fields)}" + reader.store.note(tar.name)


def holds_head(root: Path, head: Head) -> bool:
    """Return whether `root` holds exactly this head, undamaged."""
    try:
        stored = type(head).load(root)
    except UserError:
        return False
    return stored.config == head.config and state_hash(stored.state_dict()) == state_hash(head.state_dict())


def verify_values(cache: Cache, teacher: Teacher, samples: int, seed: int = 0) -> dict[str, float]:
    """Recompute `samples` images drawn by `seed`; return the largest and mean absolute error and the mean cosine.

    UserError if an error is larger than the codec's step and the teacher's arithmetic explain.
    """
    errors, cosines, count = [], [], 0
    for split in ("train", "validation"):
        data = CachedImages(cache, split)
        places = [(s, i) for s, shard in enumerate(data.shards) for i in range(len(shard.samples))]
        chosen = np.random.default_rng(seed).permutation(len(places))[: -(-samples // 2)]
        for number in stop.between(progress(sorted(chosen), f"recomputing {split}", unit="image")):
            shard, index = places[number]
            batch = data.batch([(shard, index)])
            made = teacher(batch["pixels"], batch["sizes"]) | _captions(data, shard, index, teacher)
            for name, values in made.items():
                stored, new = batch["outputs"][f"{cache.family}.{name}"][0], values[0]
                codec, member = data.shards[shard].codecs[name], data.shards[shard].samples[index]["outputs"][name]
                if "shape" in member:
                    _, height, width = member["shape"]
                    stored, new = stored[:, :height, :width], new[:, :height, :width]
                error = (stored - new).abs()
                allowed = float(new.abs().max()) * (codec.step + ARITHMETIC[cache.manifest["teacher"]["dtype"]])
                allowed += codec.least
                if float(error.max()) > allowed:
                    raise UserError(
                        f"{data.shards[shard].path}: {name} of '{batch['keys'][0]}' differs from the teacher's by "
                        f"{float(error.max()):.3g}, more than {allowed:.3g}; is this the teacher of the manifest?"
                    )
                errors.append(error.flatten())
                cosines.append(torch.nn.functional.cosine_similarity(stored.flatten(), new.flatten(), dim=0))
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


def _captions(data: CachedImages, shard: int, index: int, teacher: Teacher) -> dict[str, Tensor]:
    """Return the embeddings of an image's captions by output. Raises UserError if it has none any more."""
    if not (count := captions.count_of(teacher)):
        return {}
    reader = data.shards[shard]
    texts = captions.chosen(reader.name, data.encoded(shard, index), count)
    if not texts:
        raise UserError(
            f"{reader.path}: image '{reader.keys[index]}' has no caption any more, but one was cached; restore it, or "
            f"cache anew without teacher.captions"
        )
    return captions.embedded(teacher, [texts])


def damage(path: Path, fields: dict | None) -> str:
    """Describe how the tar at `path` differs from its sidecar, by the first member with a wrong checksum."""
    if fields is None:
        return "its sidecar is missing, damaged or disagrees with the tar's size"
    with open(path, "rb") as file:
        for sample in fields["samples"]:
            for name, member in sample["outputs"].items():
                file.seek(member["offset"])
                if crc32(file.read(member["size"])) != member["crc32"]:
                    return f"the {name} of '{sample['key']}' is damaged (checksum)"
    return "bytes outside its members are damaged (checksum)"
