"""Score a cached CLIP by its own text tower, before a student is trained on it: the cheapest check of a cache."""

from collections.abc import Iterable

from fmdistill.cache import Cache, open_cache
from fmdistill.cache.dataset import CachedImages
from fmdistill.evaluate import results, retrieval, zeroshot
from fmdistill.evaluate.results import TEACHER, Row
from fmdistill.evaluate.retrieval import Retrieval
from fmdistill.evaluate.zeroshot import Zeroshot
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

IMAGES = 2000  # of the validation images, at most
ENOUGH = 32  # images from which a score is told from chance
CAUSES = (
    "Likely causes: teacher.pretrained is another model's or untrained, or its QuickGELU is missing; the labels or "
    "captions are of other images"
)


def judge_teacher(recipe: Recipe, evaluators: Iterable[object] = ()) -> list[Row]:
    """Log how the recipe's cached teacher scores on its validation images' captions and labels; no rows without any.

    Labels need class names: those of the first Zeroshot among `evaluators` that judges these images, or others of the
    same kind of source. The first 2000 images count, by their cached embeddings.
    """
    cache = open_cache(recipe)
    captioned, labelled = _carries(CachedImages(cache, "validation"))
    named = next((one for one in evaluators if isinstance(one, Zeroshot) and _fits(one, recipe)), None)
    rows: list[Row] = []
    if captioned:
        rows += _by_captions(cache)
    if labelled and named is not None:
        rows += _by_names(cache, named)
    if not captioned and not (labelled and named):
        log.info(
            "%s: the teacher is not scored: its validation images have no captions%s",
            cache.root,
            ", and no zeroshot protocol names their classes" if labelled else " and no labels",
        )
    return rows


def _fits(protocol: Zeroshot, recipe: Recipe) -> bool:
    return protocol.images is None or protocol.images["name"] == recipe.images["name"]


def _carries(data: CachedImages) -> tuple[bool, bool]:
    """Return whether the first images of the groups have captions, and whether labels."""
    first: dict[str, tuple[bool, bool]] = {}
    for number, shard in enumerate(data.shards):
        if shard.samples and shard.group not in first:
            encoded = data.encoded(number, 0)
            first[shard.group] = (encoded.caption_column in encoded.extra, encoded.label is not None)
    return any(caption for caption, _ in first.values()), bool(first) and all(label for _, label in first.values())


def _by_captions(cache: Cache) -> list[Row]:
    try:
        rows, details = retrieval.score_teacher(Retrieval(limit=IMAGES), cache)
    except UserError as error:
        log.warning("%s: the teacher is not scored by captions: %s", cache.root, error)
        return []
    text, image = (results.value(rows, metric, TEACHER, k=1) for metric in ("text_retrieval", "image_retrieval"))
    images, captions = len(details["images"]), details["captions"]
    log.info(
        "%s: the teacher, from the cache: an image finds its caption in %.1f %%, a caption its image in %.1f %% "
        "(recall@1, %d images, %d captions)",
        cache.root,
        100 * text,
        100 * image,
        images,
        captions,
    )
    _warn(cache, images, text, 1 / captions)
    return rows


def _by_names(cache: Cache, protocol: Zeroshot) -> list[Row]:
    alone = Zeroshot(classnames=protocol.classnames, templates=protocol.templates, limit=IMAGES, device=protocol.device)
    try:
        rows, details = zeroshot.score_teacher(alone, cache)
    except UserError as error:  # of names for other images, such as ImageNet's beside a protocol's own
        log.warning("%s: the teacher is not scored zero-shot: %s", cache.root, error)
        return []
    shown = [(row["metric"], row["value"]) for row in rows]
    log.info(
        "%s: the teacher, from the cache: zero-shot %s %% (%d images, classnames=%s)",
        cache.root,
        ", ".join(f"{name} {100 * value:.1f}" for name, value in shown),
        len(details["images"]),
        protocol.classnames,
    )
    labels = [image["label"] for image in details["images"]]
    _warn(cache, len(labels), results.value(rows, "top1", TEACHER), max(map(labels.count, set(labels))) / len(labels))
    return rows


def _warn(cache: Cache, images: int, score: float, chance: float) -> None:
    if images >= ENOUGH and score < 2 * chance < 1:
        log.warning("%s: that is below twice chance (%.1f %%). %s", cache.root, 100 * chance, CAUSES)
