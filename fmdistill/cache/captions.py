"""Cache the text tower's embeddings of the images' captions, as further outputs of a teacher.

With `teacher.captions=N` the outputs "caption", "caption_2" ... "caption_N" lie beside the embedding of each image.
They are the embeddings of its first N captions, not normalised; an image with fewer repeats its own in turn. Training
sees one of them as "caption", drawn for each image from (seed, epoch, key), so that its losses stay those of pairs of
one image and one text.
"""

# Legend: B images, D the embedding's width.

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fmdistill.images import Images, Shard, captions
from fmdistill.registry import UserError, convert
from fmdistill.teachers.output import CAPTION, Output, caption_names

if TYPE_CHECKING:  # loading torch takes seconds, and whether a cache is finished is known without it
    from torch import Tensor

MISSING = "has no caption, and teacher.captions needs one"
LOOKED_AT = 100  # first images of a source, one of which must have a caption


@runtime_checkable
class TextTeacher(Protocol):
    """A teacher that embeds captions too: its `outputs` name them, and `encode_captions` makes them."""

    captions: int  # how many of each image; 0 for none

    def encode_captions(self, texts: Sequence[str]) -> "Tensor":
        """Return the texts' embeddings (N, D), float32 on the CPU, not normalised."""
        ...


def count_of(teacher: object) -> int:
    """Return how many captions of each image a teacher embeds."""
    return teacher.captions if isinstance(teacher, TextTeacher) else 0


def requested(settings: Mapping[str, Any] | None) -> int | None:
    """Return how many captions of each image a recipe's teacher settings request; None if only the teacher knows."""
    settings = settings or {}
    if "captions" in settings:
        return convert(settings["captions"], int, "teacher.captions")
    is_custom = ":" in str(settings.get("name")) or "family" in settings  # a builder that fmdistill does not know
    return None if is_custom else 0


def stored(names: Iterable[str]) -> int:
    """Return how many captions of each image are among the outputs of these names."""
    return sum(name == CAPTION or name.startswith(f"{CAPTION}_") for name in names)


def with_captions(outputs: Mapping[str, Output], count: int) -> dict[str, Output]:
    """Return the outputs of a manifest with `count` captions instead of those that it has."""
    own = {name: output for name, output in outputs.items() if not stored([name])}
    return {**own, **dict.fromkeys(caption_names(count), Output(own["embedding"].shape))} if count else own


def check_source(images: Images, shards: Sequence[Shard], count: int) -> None:
    """Raise a UserError if none of the first images of a source has a caption, before a teacher is loaded.

    Of a mix, each source is looked at.
    """
    if not count:
        return
    first: dict[str, Shard] = {}
    for shard in shards:
        first.setdefault(images.group(shard.name), shard)
    for shard in first.values():
        looked_at = list(islice(images.read(shard), LOOKED_AT))
        if looked_at and not any(encoded.caption_column in encoded.extra for encoded in looked_at):
            raise UserError(
                f"teacher.captions={count}: image '{looked_at[0].key}' of {shard.name} has no caption, nor have the "
                f"{len(looked_at) - 1} after it; captions are the column txt of a tar (images.columns), such as "
                f"KEY.txt beside KEY.jpg: choose a source that has them, or set teacher.captions=0"
            )


def chosen(shard: str, encoded: Any, count: int) -> list[str]:
    """Return the `count` captions of an image that are embedded, [] if it has none; UserError if they are not UTF-8."""
    own = captions(shard, encoded)
    return [own[number % len(own)] for number in range(count)] if own else []


def embedded(teacher: object, texts: Sequence[Sequence[str]]) -> "dict[str, Tensor]":
    """Return the embeddings (B, D) of the captions of B images by output, each image's as `chosen` returns them."""
    count = count_of(teacher)
    if not count or not texts:
        return {}
    assert isinstance(teacher, TextTeacher)
    rows_ND = teacher.encode_captions([text for own in texts for text in own])
    return {name: rows_ND[number::count] for number, name in enumerate(caption_names(count))}


def drawn_outputs(outputs: Mapping[str, Output]) -> dict[str, Output]:
    """Return a cache's outputs as training sees them: one caption of each image."""
    return {name: output for name, output in outputs.items() if not stored([name]) or name == CAPTION}


def draw(outputs: "Mapping[str, Tensor]", family: str, places: Sequence[tuple[int, int, str]]) -> "dict[str, Tensor]":
    """Return a batch's outputs with one caption of each image, drawn from its (seed, epoch, key) in `places`."""
    prefix = f"{family}."
    count = stored(name.removeprefix(prefix) for name in outputs)
    if count < 2:
        return dict(outputs)
    import torch

    names = [f"{prefix}{name}" for name in caption_names(count)]
    numbers = [number(seed, epoch, key, count) for seed, epoch, key in places]
    every_BND = torch.stack([outputs[name] for name in names], 1)
    rows_B = torch.arange(len(numbers), device=every_BND.device)
    # A copy that does not wait: a GPU gets the numbers as it gets the batch.
    numbers_B = torch.tensor(numbers).to(every_BND.device, non_blocking=True)
    rest = {name: value for name, value in outputs.items() if name not in names}
    return {**rest, f"{prefix}{CAPTION}": every_BND[rows_B, numbers_B]}


def number(seed: int, epoch: int, key: str, count: int) -> int:
    """Return which of `count` captions an image has in an epoch."""
    digest = blake2b(f"{seed}/{epoch}/{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
