"""Collect what grid_miou compares for each image: the embeddings of teacher, students and floors."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmdistill.cache import Cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill import student as students
from fmdistill.evaluate.segmentation import Size
from fmdistill.evaluate.subjects import embed, in_turn, mean_embedding
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError


@dataclass(frozen=True)
class Case:
    """One image: the teacher's exact embedding and the students' by name, float32 (C, g, g); sizes are (H, W)."""

    key: str
    group: str
    teacher: Tensor
    students: Mapping[str, Tensor]
    original: Size
    resized: Size
    shard: str = ""

    @property
    def image(self) -> str:
        """Return SHARD/KEY, since images of different shards may have the same key."""
        return f"{self.shard}/{self.key}"


def cases(
    cache: Cache,
    recipe: Recipe,
    models: Mapping[str, nn.Module],
    floors: bool,
    device: torch.device,
    done: Collection[str] = (),
) -> Iterator[Case]:
    """Yield one case per validation image, the groups of a mix in turn; with `floors`, these are among the students.

    Images in `done`, by `Case.image`, are skipped.
    """
    data = CachedImages(cache, "validation")
    models = dict(models)
    constant: dict[str, Tensor] = {}
    if floors:
        torch.manual_seed(recipe.seed)
        models["untrained"] = students.build_untrained(recipe.student).eval().to(device)
        constant["mean embedding"] = mean_embedding(cache)
    places = in_turn(data)
    others = _others(data, places)
    for shard, index in places:
        reader = data.shards[shard]
        if f"{reader.name}/{reader.samples[index]['key']}" in done:
            continue
        batch = data.batch([(shard, index)])
        pixels, sizes = batch["pixels"], batch["sizes"]
        embeddings = {name: embed(model, cache.preprocess, pixels, sizes)[0] for name, model in models.items()}
        embeddings |= constant
        if floors:
            embeddings["another image"] = data.outputs([others[shard, index]])["embedding"][0]
        teacher = batch["outputs"][f"{cache.family}.embedding"][0]
        for name, embedding in embeddings.items():
            if embedding.shape != teacher.shape:
                raise UserError(
                    f"student.name={recipe.student['name']}: {name} gives an embedding of {tuple(embedding.shape)}, "
                    f"the cache holds {tuple(teacher.shape)}; judge it by the cache that it learned from"
                )
        yield Case(
            key=batch["keys"][0],
            group=reader.group,
            shard=reader.name,
            teacher=teacher,
            students=embeddings,
            original=_size(batch["originals"]),
            resized=_size(sizes),
        )


def _size(sizes_12: Tensor) -> Size:
    height, width = sizes_12[0].tolist()
    return height, width


def _others(data: CachedImages, places: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return for each image the next one of its group, or the next of all if its group has no other."""
    following = {}
    for group in dict.fromkeys(data.shards[shard].group for shard, _ in places):
        members = [place for place in places if data.shards[place[0]].group == group]
        ring = members if len(members) > 1 else [*members, *(place for place in places if place not in members)]
        following.update(zip(members, [*ring[1:], ring[0]], strict=False))
    return following
