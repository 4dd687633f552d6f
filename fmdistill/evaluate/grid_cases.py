"""The images that grid_miou judges: the teacher's and the students' embeddings, and those of floors."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmdistill.cache import Cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill import student as students
from fmdistill.evaluate.subjects import embed, in_turn, mean_embedding
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One image: the teacher's exact full embedding and the students' by name, float32 (C, g, g); sizes as (H, W)."""

    key: str
    group: str
    teacher: Tensor
    students: Mapping[str, Tensor]
    original: Size
    resized: Size
    shard: str = ""

    @property
    def image(self) -> str:
        """What tells the image from those of other shards, whose keys may be the same."""
        return f"{self.shard}/{self.key}"


def cases(
    cache: Cache,
    recipe: Recipe,
    models: Mapping[str, nn.Module],
    floors: bool,
    device: torch.device,
    done: Collection[str] = (),
) -> Iterator[Case]:
    """Yield one case per validation image, every group in turn, with the floors, if wanted, among the students.

    Images that are `done`, by `Case.image`, are left out.
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
        item = data.item(0, shard, index)
        embeddings = {name: embed(model, cache.preprocess, item) for name, model in models.items()} | constant
        if floors:
            other, place = others[shard, index]
            embeddings["another image"] = torch.from_numpy(data.shards[other].read(place)["embedding"])
        wanted = item["outputs"][f"{cache.family}.embedding"]
        for name, embedding in embeddings.items():
            if embedding.shape != wanted.shape:
                raise UserError(
                    f"student.name={recipe.student['name']}: {name} gives an embedding of {tuple(embedding.shape)}, "
                    f"the cache holds {tuple(wanted.shape)}; judge it by the cache that it learned from"
                )
        yield Case(
            key=item["keys"],
            group=reader.group,
            shard=reader.name,
            teacher=wanted,
            students=embeddings,
            original=(int(item["originals"][0]), int(item["originals"][1])),
            resized=(int(item["sizes"][0]), int(item["sizes"][1])),
        )


def _others(data: CachedImages, places: list[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return for each place the next one of its group; of all if its group has no other."""
    following = {}
    for group in dict.fromkeys(data.shards[shard].group for shard, _ in places):
        members = [place for place in places if data.shards[place[0]].group == group]
        ring = members if len(members) > 1 else [*members, *(place for place in places if place not in members)]
        following.update(zip(members, [*ring[1:], ring[0]], strict=False))
    return following
