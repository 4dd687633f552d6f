"""What an evaluator looks at: cases made from a recipe's cache and images, and a student."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fmdistill import teachers
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.mini import MiniSam
from fmdistill.cache import Cache, open_cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill import student as students
from fmdistill.distill.labelled import COLUMN, check_size
from fmdistill.evaluate import grid_miou, scene_miou
from fmdistill.evaluate.kept import Partial
from fmdistill.images import build as build_images
from fmdistill.images.scenes import decode_labels
from fmdistill.logs import log, progress
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.family import Preprocess

Judged = tuple[dict[str, float], dict]

MEAN_OF = 512  # training images whose mean embedding is a floor


def judge_grid(
    protocol: grid_miou.GridMiou, recipe: Recipe, models: Mapping[str, nn.Module], partial: Partial | None = None
) -> Judged:
    """Score students, named apart, against their teacher on the validation images of the recipe's cache.

    Images whose result `partial` has are not looked at again.
    """
    check_grid(protocol, recipe)
    cache = open_cache(recipe)
    if cache.family != "sam":
        raise UserError(
            f"{cache.root}: its teacher is of the family '{cache.family}' and makes no masks; grid_miou judges a run "
            f"that was distilled from SAM"
        )
    device = pick_device(protocol.device, "device")
    models = {name: model.to(device) for name, model in models.items()}
    total = sum(len(shard.samples) for shard in cache.shards["validation"])
    done = partial.done if partial is not None else {}
    each, images = sum(k * k for k in protocol.grids), min(total, protocol.images or total)
    if done:
        log.info("grid_miou: %d of %d images were judged before the last stop", len(done), images)
    shown = {"description": f"grid_miou, {images} images", "total": images * each, "initial": len(done) * each}
    with progress(**shown, unit="prompt") as bar:
        cases = grid_cases(cache, recipe, models, protocol, done)
        return grid_miou.run(protocol, cache.head(), cases, partial, bar.update)


def check_grid(protocol: grid_miou.GridMiou, recipe: Recipe) -> None:
    """Raise a UserError for a teacher that makes no masks, and for floors from a trimmed cache.

    The mean embedding needs every token of training images.
    """
    if recipe.cache is None or not teachers.may_be(recipe.teacher, "sam"):
        raise UserError(
            f"grid_miou: judges a run that was distilled from SAM by its cache; this recipe's teacher is "
            f"{(recipe.teacher or {}).get('name', 'none')}{', not cached' if recipe.cache is None else ''}"
        )
    if protocol.floors and recipe.cache.trim:
        raise UserError(
            "floors=true: the mean embedding needs the padded tokens of the training images, and a cache with "
            "cache.trim=true keeps none; set cache.trim=false, or judge by a protocol with floors=false, such as "
            "protocols=[eval/sam_grid_tail.yaml]"
        )


def check_scenes(protocol: scene_miou.SceneMiou, recipe: Recipe) -> None:
    """Raise a UserError for a student that makes no masks."""
    name = recipe.student.get("name")
    if name in students.STUDENTS and name != "sam_mini":
        raise UserError(f"scene_miou judges a promptable model; student.name={name} makes no masks")


def grid_cases(
    cache: Cache,
    recipe: Recipe,
    students_by_name: Mapping[str, nn.Module],
    protocol: grid_miou.GridMiou,
    done: Collection[str] = (),
) -> Iterator[grid_miou.Case]:
    """Yield one case per validation image, every group in turn, with the protocol's floors among the students.

    Images that are `done`, by `Case.image`, are left out.
    """
    data = CachedImages(cache, "validation")
    models = dict(students_by_name)
    constant: dict[str, Tensor] = {}
    if protocol.floors:
        torch.manual_seed(recipe.seed)
        device = pick_device(protocol.device, "device")
        models["untrained"] = students.build_untrained(recipe.student).eval().to(device)
        constant["mean embedding"] = mean_embedding(cache)
    places = _in_turn(data)
    others = _others(data, places)
    for shard, index in places:
        reader = data.shards[shard]
        if f"{reader.name}/{reader.samples[index]['key']}" in done:
            continue
        item = data.item(0, shard, index)
        embeddings = {name: embed(model, cache.preprocess, item) for name, model in models.items()} | constant
        if protocol.floors:
            other, place = others[shard, index]
            embeddings["another image"] = torch.from_numpy(data.shards[other].read(place)["embedding"])
        wanted = item["outputs"][f"{cache.family}.embedding"]
        for name, embedding in embeddings.items():
            if embedding.shape != wanted.shape:
                raise UserError(
                    f"student.name={recipe.student['name']}: {name} gives an embedding of {tuple(embedding.shape)}, "
                    f"the cache holds {tuple(wanted.shape)}; judge it by the cache that it learned from"
                )
        yield grid_miou.Case(
            key=item["keys"],
            group=reader.group,
            shard=reader.name,
            teacher=wanted,
            students=embeddings,
            original=(int(item["originals"][0]), int(item["originals"][1])),
            resized=(int(item["sizes"][0]), int(item["sizes"][1])),
        )


@torch.inference_mode()
def embed(model: nn.Module, preprocess: Preprocess, item: dict) -> Tensor:
    """Return the model's embedding (C, g, g) of one item of the cache, on the model's device."""
    return outputs(model, preprocess, item)["embedding"][0].float()


def outputs(model: nn.Module, preprocess: Preprocess, item: dict) -> Mapping[str, Tensor]:
    """Return what the model makes of one item of the cache, on the model's device; UserError without an embedding."""
    device = next(model.parameters(), torch.empty(0)).device
    pixels, sizes = item["pixels"][None].to(device), item["sizes"][None].to(device)
    return forward(model, preprocess.normalize(pixels, sizes))


def forward(model: nn.Module, image: Tensor) -> Mapping[str, Tensor]:
    """Return what the model makes of normalised images (B, 3, S, S); UserError without an embedding."""
    found = model(image)
    if not isinstance(found, Mapping) or "embedding" not in found:
        raise UserError(
            f"{type(model).__name__}: a student's forward returns {{'embedding': (B, C, g, g) or (B, D)}}, "
            f"this one a {type(found).__name__} without it"
        )
    return found


def mean_embedding(cache: Cache) -> Tensor:
    """Return the mean embedding (C, g, g) of training images, every group in turn, position by position."""
    data = CachedImages(cache, "train")
    chosen = _in_turn(data)[:MEAN_OF]
    total = torch.zeros(cache.shapes["embedding"])
    for shard, index in chosen:
        total += torch.from_numpy(data.shards[shard].read(index)["embedding"])
    return total / max(len(chosen), 1)


def judge_scenes(protocol: scene_miou.SceneMiou, recipe: Recipe, models: Mapping[str, nn.Module]) -> Judged:
    """Score a promptable student on the exact masks of the recipe's validation images."""
    ((name, student),) = models.items()
    if not isinstance(student, MiniSam):
        raise UserError(f"scene_miou judges a promptable model; student.name={recipe.student['name']} makes no masks")
    student.to(pick_device(protocol.device, "device"))
    images = build_images(recipe.images)

    def cases() -> Iterator[scene_miou.SceneCase]:
        for shard in (s for s in images.shards() if s.split == "validation"):
            for encoded in images.read(shard):
                if COLUMN not in encoded.extra:
                    raise UserError(
                        f"{shard.name}: image '{encoded.key}' has no {COLUMN}; scene_miou needs exact masks"
                    )
                labels: np.ndarray = decode_labels(encoded.extra[COLUMN])
                image = images.decode(encoded, shard.name)
                check_size(shard.name, encoded.key, (labels.shape[0], labels.shape[1]), image)
                pixels, size = student.preprocess.prepare(image)
                item = {"pixels": pixels, "sizes": torch.tensor(size)}
                yield scene_miou.SceneCase(encoded.key, embed(student, student.preprocess, item), labels, size)

    shown = progress(cases(), "scene_miou", total=protocol.images, unit="image")
    metrics, details = scene_miou.run(protocol, student.head, shown)
    return {f"{name}/{key}": value for key, value in metrics.items()}, details


def _others(data: CachedImages, places: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return for each place the next one of its group; of all where its group has no other."""
    found = {}
    for group in dict.fromkeys(data.shards[shard].group for shard, _ in places):
        ours = [place for place in places if data.shards[place[0]].group == group]
        ring = ours if len(ours) > 1 else [*ours, *(place for place in places if place not in ours)]
        found.update(zip(ours, [*ring[1:], ring[0]], strict=False))
    return found


def _in_turn(data: CachedImages) -> list[tuple[int, int]]:
    """Return (shard, index) of every sample, the groups alternating, so that the first N hold some of each."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for number, shard in enumerate(data.shards):
        groups.setdefault(shard.group, []).extend((number, index) for index in range(len(shard.samples)))
    longest = max(map(len, groups.values()), default=0)
    return [rows[i] for i in range(longest) for rows in groups.values() if i < len(rows)]
