"""Measure each part of a teacher pass separately: the teacher, decoding, codecs, writing and reading; and training."""

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
from fmdistill.cache import captions, finished, store
from fmdistill.cache.codec import CODECS
from fmdistill.files import check_folder, write_whole
from fmdistill.images import DecodeError, Encoded, Images
from fmdistill.images import build as build_images
from fmdistill.logs import log
from fmdistill.pipeline.measurement import Measurement, rates
from fmdistill.pipeline.rehearsal import check_single_process, device_name
from fmdistill.pipeline.shard_speed import CPU, measure_codec, measure_shards
from fmdistill.pipeline.training_speed import measure_training
from fmdistill.recipe import CodecName, Recipe
from fmdistill.registry import UserError
from fmdistill.stages import by_stage
from fmdistill.teachers.compute import Precision, computing, full_precision
from fmdistill.teachers.family import Reference, Teacher

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class BenchSettings:
    """The settings bench.KEY=VALUE."""

    images: int = 8  # training images to measure with
    rounds: int = 3  # of each measurement, of which the least time counts
    megabytes: float = 16.0  # of float32 outputs in the measured shards, in which the images repeat
    steps: int = 5  # of training, in each round of its measurement; 0 leaves training out
    weights: Literal["recipe", "random"] = "recipe"  # random: drawn, in case the recipe's are not available

    def __post_init__(self) -> None:
        for name in ("images", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"bench.{name}={getattr(self, name)}: expected 1 or more")
        if self.steps < 0:
            raise UserError(f"bench.steps={self.steps}: expected training steps to measure, or 0 for none")
        if self.megabytes <= 0:
            raise UserError(f"bench.megabytes={self.megabytes}: expected more than 0")


@dataclass(frozen=True)
class SampleImages:
    """The images to measure with: encoded, decoded, and prepared for the teacher."""

    encoded: list[Encoded]
    pictures: list[Image.Image]
    pixels: torch.Tensor  # uint8 (B, 3, S, S)
    sizes: torch.Tensor  # (B, 2)


def run(recipe: Recipe, settings: BenchSettings) -> dict[str, Any]:
    """Measure the parts of a recipe's teacher pass and its training; write and return `recipe.out`/bench.json.

    Of a recipe with stages, the training of the first one is measured. Temporary files are written to the disk of the
    cache. Raises UserError if the recipe has no cached teacher.
    """
    check_single_process("bench")
    stage, first = next(iter(by_stage(recipe).items()))
    if recipe.teacher is None or recipe.cache is None or finished.is_live(recipe.teacher):
        raise UserError(
            "bench: measures a teacher and its cache, but this recipe has no teacher or a live one; set `teacher` and "
            "`cache`"
        )
    check_folder(recipe.out, "bench.json")
    root = store.of(recipe.cache).folder.absolute()
    disk = next(folder for folder in (root, *root.parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".fmdistill-bench-", dir=disk.parent if disk == root else disk) as folder:
        chosen = with_random_weights(recipe.teacher, Path(folder)) if settings.weights == "random" else recipe.teacher
        log.info("bench: loading teacher %s", chosen["name"])
        model = teachers.build(chosen)
        images = build_images(recipe.images)
        few = _prepared(_first_images(images, settings.images), model)
        record = teachers.family_of(chosen)
        plain = record.reference(model) if record is not None else None
        log.info("bench: decoding %d images, %d rounds of each part", len(few.pictures), settings.rounds)
        rows = _decoding(images, few, model, plain, settings)
        log.info("bench: the teacher%s", f", compared with {plain.name}" if plain else "")
        rows += _teaching(recipe, few, model, plain, settings)
        outputs = {name: value.numpy() for name, value in _outputs(model, few).items()}
        valid = model.preprocess.valid(few.sizes).numpy()
        for name in CODECS:
            log.info("bench: codec %s, and its shards in %s", name, folder)
            rows += measure_codec(name, outputs, settings.rounds)
            rows += measure_shards(
                cast(CodecName, name), outputs, model.outputs, valid, Path(folder), settings.megabytes, settings.rounds
            )
        if settings.steps:
            log.info("bench: %d training steps%s", settings.steps, f" of the stage {stage}" if stage else "")
            rows += measure_training(first, model, Path(folder), settings.images, settings.steps)
    report = {
        "teacher": {"name": chosen["name"], "weights": settings.weights},
        "device": device_name(str(chosen.get("device", "auto")), "teacher.device"),
        "dtype": _dtype(model),
        "torch": torch.__version__,
        "images": len(few.pictures),
        "rounds": settings.rounds,
        "stage": stage,
        "rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows],
    }
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "bench.json", json.dumps(report, indent=1))
    return report


def text(report: dict[str, Any]) -> str:
    """Format the result of `run` as a sentence and a markdown table."""
    weights = "WEIGHTS DRAWN AT RANDOM" if report["teacher"]["weights"] == "random" else "the recipe's weights"
    trained = f" Training is that of the stage {report['stage']}." if report.get("stage") else ""
    head = (
        f"{report['teacher']['name']} ({weights}), {report['dtype']} on {report['device']}, torch {report['torch']}; "
        f"{report['images']} images, least of {report['rounds']} rounds, both sides of a row in turns. The files that "
        f"are read are in the system's page cache.{trained}"
    )
    lines = [head, "", "| what | figure | unit | against | its figure | ratio |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        other, ratio = ("" if row[key] is None else f"{row[key]:.3g}" for key in ("other", "ratio"))
        lines.append(f"| {row['what']} | {row['figure']:.4g} | {row['unit']} | {row['against']} | {other} | {ratio} |")
    return "\n".join(lines)


def _device(settings: Any) -> torch.device:
    return pick_device(str(settings.get("device", "auto")), "teacher.device")


def _outputs(model: Teacher, few: SampleImages) -> dict[str, torch.Tensor]:
    """Return the teacher's outputs of the images, the captions' too. Raises UserError if an image has no caption."""
    texts = [captions.chosen("bench", encoded, captions.count_of(model)) for encoded in few.encoded]
    if captions.count_of(model) and not all(texts):
        raise UserError("teacher.captions: one of the first images has no caption; measure with teacher.captions=0")
    return model(few.pixels, few.sizes) | captions.embedded(model, texts)


def _dtype(model: Teacher) -> Precision:
    """Return the precision in which the teacher computes, also if the settings let it choose."""
    return model.fingerprint().get("dtype", "fp32")


def with_random_weights(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Draw random weights for a teacher, save them in `folder` if needed, and return its settings with these weights.

    Raises UserError if the teacher's family cannot draw weights.
    """
    record = teachers.family_of(settings)
    if record is None or record.random_weights is None:
        raise UserError(
            f"bench.weights=random: the weights of teacher {settings['name']} cannot be drawn; set its own weights"
        )
    return record.random_weights(settings, folder)


def _in_precision(work: Callable[[], Any], dtype: Precision, device: torch.device) -> Callable[[], Any]:
    def converted() -> None:
        with computing(dtype, device):
            work()

    return converted


def _first_images(images: Images, count: int) -> list[tuple[Encoded, Image.Image]]:
    """Return the first `count` training images that can be decoded. Raises UserError if none can be."""
    decoded = []
    stored = chain.from_iterable(images.read(shard) for shard in images.shards() if shard.split == "train")
    for encoded in islice(stored, 2 * count):
        try:
            decoded.append((encoded, Image.fromarray(images.picture(encoded).pixels)))
        except DecodeError:
            continue
        if len(decoded) == count:
            break
    if not decoded:
        raise UserError(f"images: none of the first {2 * count} training images can be decoded; repair or remove them")
    return decoded


def _prepared(decoded: list[tuple[Encoded, Image.Image]], model: Teacher) -> SampleImages:
    encoded, pictures = zip(*decoded, strict=True)
    pixels, sizes = zip(*(model.preprocess.prepare(picture) for picture in pictures), strict=True)
    return SampleImages(list(encoded), list(pictures), torch.stack(pixels), torch.tensor(sizes))


def _decoding(
    images: Images, few: SampleImages, model: Teacher, plain: Reference | None, settings: BenchSettings
) -> list[Measurement]:
    works = {"fmdistill": lambda: [model.preprocess.prepare(images.picture(item).pixels) for item in few.encoded]}
    if plain:
        works["plain"] = lambda: [plain.pixels(item.data) for item in few.encoded]
    speeds = rates(works, CPU, settings.rounds, len(few.encoded))
    against = f"PIL and the transform of {plain.name.split()[0].split('.')[0]}" if plain else ""
    return [Measurement("decode and resize, a thread", speeds["fmdistill"], "images/s", against, speeds.get("plain"))]


def _teaching(
    recipe: Recipe, few: SampleImages, model: Teacher, plain: Reference | None, settings: BenchSettings
) -> list[Measurement]:
    assert recipe.teacher is not None
    device = _device(recipe.teacher)
    dtype = _dtype(model)

    def run_teacher() -> None:
        for start in range(0, len(few.pictures), model.batch):
            ready = [model.preprocess.prepare(picture) for picture in few.pictures[start : start + model.batch]]
            model(torch.stack([pixels for pixels, _ in ready]), torch.tensor([size for _, size in ready]))

    works: dict[str, Any] = {"fmdistill": run_teacher}
    operations = plain.flops() if plain else flops(model, few.pixels[:1], few.sizes[:1])
    if plain:
        works[f"{plain.name}, fp32"] = lambda: plain.embed(few.pictures)
        if dtype != "fp32":
            works[f"{plain.name}, {dtype}"] = _in_precision(lambda: plain.embed(few.pictures), dtype, device)
    if device.type != "cpu":  # on a GPU, the first calls choose or compile kernels
        for work in works.values():
            work()
    speeds = rates(works, device, settings.rounds, len(few.pictures))
    speed = speeds.pop("fmdistill")
    with full_precision():
        best = matmul_flops(
            device, TORCH.get(dtype, torch.float32), 1.0 if device.type != "cpu" else 0.3 * settings.rounds
        )
    rows = [Measurement("teacher, resize included", speed, "images/s", name, rate) for name, rate in speeds.items()]
    rows = rows or [Measurement("teacher, resize included", speed, "images/s")]
    per_image = f"{operations / 1e9:.4g} GFLOP an image of {'the plain network' if plain else 'the teacher'}"
    achieved, product = speed * operations / 1e9, f"{dtype} matrix product"
    return [*rows, Measurement(f"arithmetic: {per_image}", achieved, "GFLOP/s", product, best / 1e9)]
