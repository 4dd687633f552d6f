"""One shard of a cache, opened alone: what it holds, whether it is whole, and how SRW would weigh an image of it."""

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
from fmdistill.teachers import of_cache
from fmdistill.teachers.family import Preprocess

SHOWN = 3  # keys at either end of a list, and failed images


@dataclass(frozen=True)
class InspectSettings:
    """What KEY=VALUE sets: the image and the output that are weighed, SRW's temperature, and the picture's file."""

    key: str | None = None  # null = the first
    output: str | None = None  # null = embedding, or the first
    temperature: float = 0.5
    relative: bool = False  # the temperature in standard deviations of the similarities
    out: str | None = None  # null = SHARD.KEY.weights.png, here

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature:g}: expected a number above 0")


def run(path: str, overrides: list[str]) -> Iterator[str]:
    """Yield lines about the shard at `path`: its tar, its sidecar, or CACHE/NAME; of maps, write SRW's weights as PNG.

    UserError where it is no shard, or, after all that can be told, where it is damaged.
    """
    settings = InspectSettings(**typed(InspectSettings, parse_overrides(overrides), "inspect"))
    base = _base(path)
    found = manifest.read(base.parent)
    teacher, outputs = dict(found["teacher"]), from_json(found["outputs"])
    fields = _sidecar(base.with_name(f"{base.name}.json"))
    yield from _about(base.name, teacher, fields, outputs)
    problem = _problem(base.with_name(f"{base.name}.tar"), fields, manifest.identity_hash(found))
    yield f"tar and sidecar    {'DISAGREE' if problem else 'agree: every byte has the checksum of the sidecar'}"
    if problem:
        raise UserError(problem)
    try:
        finished = sidecar.Finished(base.with_name(f"{base.name}.tar"), fields)
        reader = ShardReader(Folder(base.parent), Shard(base.name, fields["split"]), finished, "", outputs)
        yield from _weights(
            reader, of_cache(found["family"], None).preprocess.from_json(teacher["preprocess"]), settings
        )
    except UserError:
        raise
    except (StopIteration, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise UserError(f"{base}.json: not a sidecar of this version ({reason}); `fmdistill cache` redoes it") from None


def _base(path: str) -> Path:
    base = Path(path).expanduser()
    base = base.with_suffix("") if base.suffix in (".tar", ".json") else base
    if not any(base.with_name(base.name + end).is_file() for end in (".tar", ".json")):
        raise UserError(f"{path}: no such shard; give CACHE/NAME.tar, such as one that `ls CACHE` lists")
    if base.name in ("manifest", "head", "teacher", "teacher_score"):
        raise UserError(f"{path}: belongs to the whole cache; give one of its shards, CACHE/NAME.tar")
    return base


def _sidecar(path: Path) -> dict[str, Any]:
    found = sidecar.read(path)
    if found is None:
        problem = "not a sidecar, or damaged" if path.exists() else "missing, so the shard is not finished"
        raise UserError(f"{path}: {problem}; `fmdistill cache RECIPE` makes the shard anew")
    return found


def _problem(tar: Path, fields: Mapping[str, Any], identity: str) -> str | None:
    """Return what is wrong with the pair, None where nothing is."""
    redo = "delete it and run `fmdistill cache` again"
    if not tar.is_file():
        return f"{tar}: missing, though its sidecar is there; `fmdistill cache` makes it anew"
    if fields.get("identity") != identity:
        return f"{tar}: its sidecar belongs to another cache than the manifest beside it; {redo}"
    if tar.stat().st_size != fields["bytes"]:
        return f"{tar}: {tar.stat().st_size} bytes, its sidecar says {fields['bytes']}; {redo}"
    if file_hash(tar) != fields["sha256"]:
        return f"{tar}: {damage(tar, dict(fields))}; {redo}"
    return None


def _about(
    name: str, teacher: Mapping[str, Any], fields: Mapping[str, Any], outputs: Mapping[str, StoredOutput]
) -> Iterator[str]:
    samples, failed = fields["samples"], fields["failed"]
    keys = [sample["key"] for sample in samples]
    ends = keys if len(keys) <= 2 * SHOWN + 1 else [*keys[:SHOWN], "...", *keys[-SHOWN:]]
    yield f"{name}: {len(keys)} images of {teacher.get('name')}, {fields['split']}, {len(failed)} failed"
    yield f"keys               {', '.join(ends) or 'none'}"
    for one in failed[:SHOWN]:
        yield f"failed             {one['key']}: {one['problem']}"
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
    """Return count, mean and deviation over channels and tokens, and the largest magnitude."""
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
    if not reader.samples:
        return
    output = settings.output or ("embedding" if "embedding" in reader.shapes else next(iter(reader.shapes)))
    if output not in reader.shapes:
        raise UserError(f"output={output}: this cache has none.{suggest(output, reader.shapes)}")
    key = settings.key or reader.keys[0]
    if key not in reader.keys:
        close = suggest(key, reader.keys).partition(" Known: ")[0]  # a shard holds thousands
        way_out = close or f" The first is '{reader.keys[0]}'"
        raise UserError(f"key={key}: none of the {len(reader.keys)} images in {reader.path}.{way_out}")
    srw = SRW(temperature=settings.temperature, relative=settings.relative)
    how = f"SRW at temperature {settings.temperature:g}{' (relative)' if settings.relative else ''}, {output}"
    if reader.outputs[output].is_vector:
        yield from _spread(reader, output, srw, how)
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
    write_whole(path, weights_figure(weights, valid.numpy(), f"{key}, {how}"))
    inside = weights[valid.numpy()]
    share = float(effective_sample_size(weight_1N, seen.valid))
    yield (
        f"weights of {key}: {how}, over {inside.size} of {weights.size} tokens: {_five(inside)}; "
        f"effective sample size {share:.3f}"
    )
    yield f"picture            {path}"


def _spread(reader: ShardReader, output: str, srw: SRW, how: str) -> Iterator[str]:
    """Yield how the weights of the shard's vectors, taken as one batch, are spread, and the keys at either end."""
    vectors_ND = torch.from_numpy(np.stack([reader.read(i)[output] for i in range(len(reader.samples))]))
    seen = Seen({output: vectors_ND}, None, output, whole={output: vectors_ND})
    weight_N = srw(torch.zeros(len(vectors_ND)), seen)
    yield (
        f"weights            {how}, the shard as one batch: {_five(weight_N.numpy())}; effective sample size "
        f"{float(effective_sample_size(weight_N, None)):.3f}"
    )
    order = weight_N.argsort(descending=True).tolist()
    for name, some in (("largest", order[:SHOWN]), ("smallest", order[::-1][:SHOWN])):
        yield f"  {name:16} {', '.join(f'{reader.keys[i]} {float(weight_N[i]):.3f}' for i in some)}"


def _five(values: np.ndarray) -> str:
    low, fifth, middle, high, top = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return f"least {low:.3f}, 5 % {fifth:.3f}, median {middle:.3f}, 95 % {high:.3f}, largest {top:.3f}"
