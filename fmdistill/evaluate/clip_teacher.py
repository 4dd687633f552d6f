"""Score a cached CLIP with its own text tower before a student is trained on it: the cheapest check of a cache."""

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

IMAGES = 2000  # validation images to score, at most
MIN_IMAGES = 32  # fewer cannot tell a score from chance
CAUSES = (
    "Likely causes: teacher.pretrained is another model's or untrained, or its QuickGELU is missing; the labels or "
    "captions are of other images"
)


def judge_teacher(recipe: Recipe, evaluators: Iterable[object] = ()) -> list[Row]:
    """Log and return the cached teacher's retrieval and zero-shot scores; no rows without captions and labels.

    The class names of the labels are those of the first Zeroshot among `evaluators` for these images or for the same
    kind of source. Uses the cached embeddings of the first 2000 validation images.
    """
    cache = open_cache(recipe)
    captioned, labelled = _annotations(CachedImages(cache, "validation"))
    zeroshots = (evaluator for evaluator in evaluators if isinstance(evaluator, Zeroshot))
    protocol = next((evaluator for evaluator in zeroshots if _fits(evaluator, recipe)), None)
    rows: list[Row] = []
    if captioned:
        rows += _retrieval(cache)
    if labelled and protocol is not None:
        rows += _zeroshot(cache, protocol)
    if not captioned and not (labelled and protocol):
        log.info(
            "%s: the teacher is not scored: its validation images have no captions%s",
            cache.root,
            ", and no zeroshot protocol names their classes" if labelled else " and no labels",
        )
    return rows


def _fits(protocol: Zeroshot, recipe: Recipe) -> bool:
    return protocol.images is None or protocol.images["name"] == recipe.images["name"]


def _annotations(data: CachedImages) -> tuple[bool, bool]:
    """Return whether the first image of any group has a caption column, and that of every group a label."""
    first: dict[str, tuple[bool, bool]] = {}
    for number, shard in enumerate(data.shards):
        if shard.samples and shard.group not in first:
            encoded = data.encoded(number, 0)
            first[shard.group] = (encoded.caption_column in encoded.extra, encoded.label is not None)
    return any(caption for caption, _ in first.values()), bool(first) and all(label for _, label in first.values())


def _retrieval(cache: Cache) -> list[Row]:
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


def _zeroshot(cache: Cache, protocol: Zeroshot) -> list[Row]:
    limited = Zeroshot(
        classnames=protocol.classnames, templates=protocol.templates, limit=IMAGES, device=protocol.device
    )
    try:
        rows, details = zeroshot.score_teacher(limited, cache)
    except UserError as error:  # such as ImageNet's names for images of other classes
        log.warning("%s: the teacher is not scored zero-shot: %s", cache.root, error)
        return []
    log.info(
        "%s: the teacher, from the cache: zero-shot %s %% (%d images, classnames=%s)",
        cache.root,
        ", ".join(f"{row['metric']} {100 * row['value']:.1f}" for row in rows),
        len(details["images"]),
        protocol.classnames,
    )
    labels = [image["label"] for image in details["images"]]
    _warn(cache, len(labels), results.value(rows, "top1", TEACHER), max(map(labels.count, set(labels))) / len(labels))
    return rows


def _warn(cache: Cache, images: int, score: float, chance: float) -> None:
    if images >= MIN_IMAGES and score < 2 * chance < 1:
        log.warning("%s: that is below twice chance (%.1f %%). %s", cache.root, 100 * chance, CAUSES)
