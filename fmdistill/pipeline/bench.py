"""Measure what a teacher pass is made of, each part by itself: the teacher, decoding, codecs, writing and reading."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image

from fmdistill import teachers
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.throughput import flops, matmul_flops
from fmdistill.cache import finished, store
from fmdistill.cache.codec import CODECS
from fmdistill.files import check_folder, write_whole
from fmdistill.images import DecodeError, Encoded, Images
from fmdistill.images import build as build_images
from fmdistill.logs import log
from fmdistill.pipeline.measurement import Measurement, rates
from fmdistill.pipeline.rehearsal import alone, device_name
from fmdistill.pipeline.shard_speed import CPU, of_codec, of_shards
from fmdistill.recipe import CodecName, Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.compute import Precision, computing, full_precision
from fmdistill.teachers.family import Reference, Teacher

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What bench.KEY=VALUE sets."""

    images: int = 8  # training images to measure on
    rounds: int = 3  # of each of which the least time counts
    megabytes: float = 16.0  # of float32 outputs in the shards that are written and read; the images' repeat for it
    weights: Literal["recipe", "random"] = "recipe"  # random: drawn, where the recipe's own are not at hand

    def __post_init__(self) -> None:
        for name in ("images", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}={getattr(self, name)}: expected 1 or more")
        if self.megabytes <= 0:
            raise UserError(f"bench.megabytes={self.megabytes}: expected more than 0")


@dataclass(frozen=True)
class Handful:
    """The images that are measured: as stored, decoded, and ready for the teacher."""

    encoded: list[Encoded]
    pictures: list[Image.Image]
    pixels: torch.Tensor  # uint8 (B, 3, S, S)
    sizes: torch.Tensor  # (B, 2)


def run(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """Measure, write the figures to `recipe.out`/bench.json, and return them; temporary files lie where the cache will.

    UserError where the recipe has no cached teacher.
    """
    alone("bench")
    if recipe.teacher is None or recipe.cache is None or finished.is_live(recipe.teacher):
        raise UserError("bench: measures a teacher and its cache; this recipe has none, or a live one: set both")
    check_folder(recipe.out, "bench.json")
    root = store.of(recipe.cache).folder.absolute()
    disk = next(folder for folder in (root, *root.parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".fmdistill-bench-", dir=disk.parent if disk == root else disk) as folder:
        chosen = with_random_weights(recipe.teacher, Path(folder)) if settings.weights == "random" else recipe.teacher
        log.info("bench: loading teacher %s", chosen["name"])
        model = teachers.build(chosen)
        images = build_images(recipe.images)
        few = _prepared(_handful(images, settings.images), model)
        record = teachers.family_of(chosen)
        plain = record.reference(model) if record is not None else None
        log.info("bench: decoding %d images, %d rounds of each part", len(few.pictures), settings.rounds)
        rows = _decoding(images, few, model, plain, settings)
        log.info("bench: the teacher%s", f", beside {plain.name}" if plain else "")
        rows += _teaching(recipe, few, model, plain, settings)
        outputs = {name: value.numpy() for name, value in model(few.pixels, few.sizes).items()}
        valid = model.preprocess.valid(few.sizes).numpy()
        for name in CODECS:
            log.info("bench: codec %s, and its shards in %s", name, folder)
            rows += of_codec(name, outputs, settings.rounds)
            rows += of_shards(
                cast(CodecName, name), outputs, model.outputs, valid, Path(folder), settings.megabytes, settings.rounds
            )
    found = {
        "teacher": {"name": chosen["name"], "weights": settings.weights},
        "device": device_name(str(chosen.get("device", "auto")), "teacher.device"),
        "dtype": _dtype(model),
        "torch": torch.__version__,
        "images": len(few.pictures),
        "rounds": settings.rounds,
        "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows],
    }
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "bench.json", json.dumps(found, indent=1))
    return found


def text(found: dict[str, Any]) -> str:
    """Return what `run` returned as a sentence and a markdown table."""
    which = "WEIGHTS DRAWN AT RANDOM" if found["teacher"]["weights"] == "random" else "the recipe's weights"
    head = (
        f"{found['teacher']['name']} ({which}), {found['dtype']} on {found['device']}, torch {found['torch']}; "
        f"{found['images']} images, least of {found['rounds']} rounds, both sides of a row in turns. The disk's "
        f"figures are of files that the system keeps in memory."
    )
    lines = [head, "", "| what | figure | unit | against | its figure | ratio |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        other, ratio = ("" if row[key] is None else f"{row[key]:.3g}" for key in ("other", "ratio"))
        lines.append(f"| {row['what']} | {row['figure']:.4g} | {row['unit']} | {row['against']} | {other} | {ratio} |")
    return "\n".join(lines)


def _device(settings: Any) -> torch.device:
    return pick_device(str(settings.get("device", "auto")), "teacher.device")


def _dtype(model: Teacher) -> Precision:
    """Return the precision that the teacher itself computes in, whatever the settings leave to it."""
    return model.fingerprint().get("dtype", "fp32")


def with_random_weights(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a teacher's settings with weights that are drawn, and saved in `folder`. UserError if they cannot be."""
    record = teachers.family_of(settings)
    if record is None or record.random_weights is None:
        raise UserError(
            f"bench.weights=random: the weights of teacher {settings['name']} cannot be drawn; give it its own"
        )
    return record.random_weights(settings, folder)


def _in_precision(work: Callable[[], Any], dtype: Precision, device: torch.device) -> Callable[[], Any]:
    def same() -> None:
        with computing(dtype, device):
            work()

    return same


def _handful(images: Images, count: int) -> list[tuple[Encoded, Image.Image]]:
    """Return the first training images that can be decoded."""
    found = []
    stored = chain.from_iterable(images.read(shard) for shard in images.shards() if shard.split == "train")
    for encoded in islice(stored, 2 * count):
        try:
            found.append((encoded, Image.fromarray(images.picture(encoded).pixels)))
        except DecodeError:
            continue
        if len(found) == count:
            break
    if not found:
        raise UserError("images: no training image of the first can be decoded")
    return found


def _prepared(found: list[tuple[Encoded, Image.Image]], model: Teacher) -> Handful:
    pixels, sizes = zip(*(model.preprocess.prepare(picture) for _, picture in found), strict=True)
    return Handful([one for one, _ in found], [two for _, two in found], torch.stack(pixels), torch.tensor(sizes))


def _decoding(
    images: Images, few: Handful, model: Teacher, plain: Reference | None, settings: Settings
) -> list[Measurement]:
    works = {"ours": lambda: [model.preprocess.prepare(images.picture(each).pixels) for each in few.encoded]}
    if plain:
        works["plain"] = lambda: [plain.pixels(one.data) for one in few.encoded]
    found = rates(works, CPU, settings.rounds, len(few.encoded))
    against = f"PIL and the transform of {plain.name.split()[0].split('.')[0]}" if plain else ""
    return [Measurement("decode and resize, a thread", found["ours"], "images/s", against, found.get("plain"))]


def _teaching(
    recipe: Recipe, few: Handful, model: Teacher, plain: Reference | None, settings: Settings
) -> list[Measurement]:
    assert recipe.teacher is not None
    device = _device(recipe.teacher)
    dtype = _dtype(model)

    def ours() -> None:
        for start in range(0, len(few.pictures), model.batch):
            ready = [model.preprocess.prepare(picture) for picture in few.pictures[start : start + model.batch]]
            model(torch.stack([pixels for pixels, _ in ready]), torch.tensor([size for _, size in ready]))

    works: dict[str, Any] = {"ours": ours}
    counted = plain.flops() if plain else flops(model, few.pixels[:1], few.sizes[:1])
    if plain:
        works[f"{plain.name}, fp32"] = lambda: plain.embed(few.pictures)
        if dtype != "fp32":
            works[f"{plain.name}, {dtype}"] = _in_precision(lambda: plain.embed(few.pictures), dtype, device)
    if device.type != "cpu":  # the first calls of a GPU choose kernels, or compile them
        for work in works.values():
            work()
    found = rates(works, device, settings.rounds, len(few.pictures))
    mine = found.pop("ours")
    with full_precision():
        best = matmul_flops(
            device, TORCH.get(dtype, torch.float32), 1.0 if device.type != "cpu" else 0.3 * settings.rounds
        )
    rows = [Measurement("teacher, resize included", mine, "images/s", name, rate) for name, rate in found.items()]
    rows = rows or [Measurement("teacher, resize included", mine, "images/s")]
    whose = f"{counted / 1e9:.4g} GFLOP an image of {'the plain network' if plain else 'its own'}"
    return [
        *rows,
        Measurement(f"arithmetic: {whose}", mine * counted / 1e9, "GFLOP/s", f"{dtype} matrix product", best / 1e9),
    ]
