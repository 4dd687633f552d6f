"""Inspect one shard of a cache: its content, whether it is intact, and the weights SRW would give its images."""

# Legend: C channels, g patches a side, N patches or samples, D a vector's width.

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmdistill.cache import manifest, sidecar
from fmdistill.cache.outputs import StoredOutput, codecs_of, from_json
from fmdistill.cache.reader import ShardReader
from fmdistill.cache.store import Folder
from fmdistill.cache.verification import damage
from fmdistill.distill.objective import effective_sample_size
from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings.srw import SRW
from fmdistill.files import file_hash, write_whole
from fmdistill.images import Shard, escape
from fmdistill.recipe import parse_overrides
from fmdistill.registry import UserError, suggest, typed
from fmdistill.report.plots import weights_figure
from fmdistill.teachers import family_of_cache
from fmdistill.teachers.family import Preprocess

SHOWN = 3  # keys to show at either end of a list, and failed images


@dataclass(frozen=True)
class InspectSettings:
    """Settings of `fmdistill inspect`: the image and the output to weigh, SRW's temperature, and the picture's file."""

    key: str | None = None  # null = the first
    output: str | None = None  # null = embedding, or the first
    temperature: float = 0.5
    relative: bool = False  # whether the temperature is in standard deviations of the similarities
    out: str | None = None  # null = SHARD.KEY.weights.png in the working folder

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature:g}: expected a number above 0")


def run(path: str, overrides: list[str]) -> Iterator[str]:
    """Yield lines about the shard at `path`, which names its tar, its sidecar, or CACHE/NAME.

    For maps, SRW's weights are also written as PNG. Raises UserError if it is no shard or, after the lines about its
    content, if it is damaged.
    """
    settings = InspectSettings(**typed(InspectSettings, parse_overrides(overrides), "inspect"))
    base = _base(path)
    stored_manifest = manifest.read(base.parent)
    teacher, outputs = dict(stored_manifest["teacher"]), from_json(stored_manifest["outputs"])
    fields = _sidecar(base.with_name(f"{base.name}.json"))
    yield from _about(base.name, teacher, fields, outputs)
    problem = _problem(base.with_name(f"{base.name}.tar"), fields, manifest.identity_hash(stored_manifest))
    yield f"tar and sidecar    {'DISAGREE' if problem else 'agree: every byte has the checksum of the sidecar'}"
    if problem:
        raise UserError(problem)
    try:
        finished = sidecar.Finished(base.with_name(f"{base.name}.tar"), fields)
        reader = ShardReader(Folder(base.parent), Shard(base.name, fields["split"]), finished, "", outputs)
        family = family_of_cache(stored_manifest["family"], None)
        yield from _weights(reader, family.preprocess.from_json(teacher["preprocess"]), settings)
    except UserError:
        raise
    except (StopIteration, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise UserError(
            f"{base}.json: not a sidecar of this version ({reason}); `fmdistill cache` rebuilds it"
        ) from None


def _base(path: str) -> Path:
    base = Path(path).expanduser()
    base = base.with_suffix("") if base.suffix in (".tar", ".json") else base
    if not any(base.with_name(base.name + end).is_file() for end in (".tar", ".json")):
        raise UserError(f"{path}: no such shard; give CACHE/NAME.tar, one of those that `ls CACHE` lists")
    if base.name in ("manifest", "head", "teacher", "teacher_score"):
        raise UserError(f"{path}: belongs to the whole cache; give one of its shards, CACHE/NAME.tar")
    return base


def _sidecar(path: Path) -> dict[str, Any]:
    fields = sidecar.read(path)
    if fields is None:
        problem = "not a sidecar, or damaged" if path.exists() else "missing, so the shard is not finished"
        raise UserError(f"{path}: {problem}; `fmdistill cache RECIPE` rebuilds the shard")
    return fields


def _problem(tar: Path, fields: Mapping[str, Any], identity: str) -> str | None:
    """Return the problem of a tar and its sidecar as an error message, or None if they agree."""
    remedy = "delete it and run `fmdistill cache` again"
    if not tar.is_file():
        return f"{tar}: missing, although its sidecar exists; `fmdistill cache` rebuilds it"
    if fields.get("identity") != identity:
        return f"{tar}: its sidecar belongs to another cache than the manifest beside it; {remedy}"
    if tar.stat().st_size != fields["bytes"]:
        return f"{tar}: has {tar.stat().st_size} bytes, but {fields['bytes']} in its sidecar; {remedy}"
    if file_hash(tar) != fields["sha256"]:
        return f"{tar}: {damage(tar, dict(fields))}; {remedy}"
    return None


def _about(
    name: str, teacher: Mapping[str, Any], fields: Mapping[str, Any], outputs: Mapping[str, StoredOutput]
) -> Iterator[str]:
    samples, failed = fields["samples"], fields["failed"]
    keys = [sample["key"] for sample in samples]
    ends = keys if len(keys) <= 2 * SHOWN + 1 else [*keys[:SHOWN], "...", *keys[-SHOWN:]]
    yield f"{name}: {len(keys)} images of {teacher.get('name')}, {fields['split']}, {len(failed)} failed"
    yield f"keys               {', '.join(ends) or 'none'}"
    for failure in failed[:SHOWN]:
        yield f"failed             {failure['key']}: {failure['problem']}"
    if len(failed) > SHOWN:
        yield f"failed             and {len(failed) - SHOWN} more"
    yield f"bytes              {fields['bytes']} in the tar, {fields['bytes'] / max(1, len(keys)):.0f} an image"
    codecs = codecs_of(outputs, fields["split"])
    for output, stored in outputs.items():
        sizes = sorted({sample["outputs"][output]["size"] for sample in samples if output in sample["outputs"]})
        spread = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else "".join(map(str, sizes))
        yield f"{output:18} {'x'.join(map(str, stored.shape))}, {codecs[output].label}, {spread} bytes an image"
        for kind, values in (fields["statistics"].get(output) or {}).items():
            yield f"  {kind:16} {_statistics(values)}"


def _statistics(values: Any) -> str:
    """Format the token count, mean, standard deviation over channels and tokens, and largest magnitude."""
    try:
        count, channels = int(values["count"]), len(values["sum"])
        if not count:
            return "no tokens"
        mean = math.fsum(values["sum"]) / (count * channels)
        deviation = math.sqrt(max(0.0, math.fsum(values["square"]) / (count * channels) - mean**2))
        largest = max(values["largest"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        return f"statistics that cannot be read ({type(error).__name__})"
    return f"{count} tokens, mean {mean:.4g}, deviation {deviation:.4g}, largest {largest:.4g}"


def _weights(reader: ShardReader, preprocess: Preprocess, settings: InspectSettings) -> Iterator[str]:
    """Yield lines about the weights of one image's tokens, which are written as PNG, or of the shard's vectors."""
    if not reader.samples:
        return
    output = settings.output or ("embedding" if "embedding" in reader.shapes else next(iter(reader.shapes)))
    if output not in reader.shapes:
        raise UserError(f"output={output}: this cache has none.{suggest(output, reader.shapes)}")
    key = settings.key or reader.keys[0]
    if key not in reader.keys:
        similar = suggest(key, reader.keys).partition(" Known: ")[0]  # without a list of thousands of keys
        way_out = similar or f" The first is '{reader.keys[0]}'"
        raise UserError(f"key={key}: none of the {len(reader.keys)} images in {reader.path}.{way_out}")
    srw = SRW(temperature=settings.temperature, relative=settings.relative)
    method = f"SRW at temperature {settings.temperature:g}{' (relative)' if settings.relative else ''}, {output}"
    if reader.outputs[output].is_vector:
        yield from _vector_weights(reader, output, srw, method)
        return
    index = reader.keys.index(key)
    map_CHW = torch.from_numpy(reader.read(index)[output])
    grid = tuple(map_CHW.shape[1:])
    valid = torch.ones(grid, dtype=torch.bool)
    if reader.outputs[output].tokens == "image":
        valid = preprocess.valid(torch.tensor([reader.samples[index]["resized"]]))[0]
    seen = Seen({output: map_CHW[None]}, valid.flatten()[None], output)
    weight_1N = srw(torch.zeros(1, valid.numel()), seen)
    weights = weight_1N.view(grid).numpy()
    path = Path(settings.out or f"{reader.name}.{escape(key)}.weights.png")
    write_whole(path, weights_figure(weights, valid.numpy(), f"{key}, {method}"))
    inside = weights[valid.numpy()]
    share = float(effective_sample_size(weight_1N, seen.valid))
    yield (
        f"weights of {key}: {method}, over {inside.size} of {weights.size} tokens: {_quantiles(inside)}; "
        f"effective sample size {share:.3f}"
    )
    yield f"picture            {path}"


def _vector_weights(reader: ShardReader, output: str, srw: SRW, method: str) -> Iterator[str]:
    """Yield lines about the weights of the shard's vectors as one batch, and the keys of the largest and smallest."""
    vectors_ND = torch.from_numpy(np.stack([reader.read(i)[output] for i in range(len(reader.samples))]))
    seen = Seen({output: vectors_ND}, None, output, whole={output: vectors_ND})
    weight_N = srw(torch.zeros(len(vectors_ND)), seen)
    yield (
        f"weights            {method}, the shard as one batch: {_quantiles(weight_N.numpy())}; effective sample size "
        f"{float(effective_sample_size(weight_N, None)):.3f}"
    )
    order = weight_N.argsort(descending=True).tolist()
    for name, indices in (("largest", order[:SHOWN]), ("smallest", order[::-1][:SHOWN])):
        yield f"  {name:16} {', '.join(f'{reader.keys[i]} {float(weight_N[i]):.3f}' for i in indices)}"


def _quantiles(values: np.ndarray) -> str:
    low, q05, median, q95, high = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return f"least {low:.3f}, 5 % {q05:.3f}, median {median:.3f}, 95 % {q95:.3f}, largest {high:.3f}"
