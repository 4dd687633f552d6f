"""Teachers: frozen models whose outputs are cached. Each maps prepared images to named outputs."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from fmdistill.backbones.device import pick_device
from fmdistill.backbones.heads import Head
from fmdistill.backbones.preprocess import Preprocess
from fmdistill.cache import class_teacher, clip_teacher, sam_teacher
from fmdistill.registry import UserError, bind


class Teacher(Protocol):
    """What the cache asks of a teacher."""

    family: str  # prefix of its outputs, such as "sam"
    preprocess: Preprocess
    outputs: dict[str, tuple[int, ...]]  # name -> shape of one image's output
    batch: int
    workers: int

    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Map uint8 (B, 3, S, S) pixels and their (B, 2) sizes to float32 outputs on the CPU."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return all that the outputs depend on: weights, preprocessing, compute dtype and path."""
        ...

    def head(self) -> Head:
        """Return the small part that is kept beside the shards."""
        ...


TEACHERS = {
    "sam_vit_b": sam_teacher.sam_vit_b,
    "sam_vit_l": sam_teacher.sam_vit_l,
    "sam_vit_h": sam_teacher.sam_vit_h,
    "sam_mini": sam_teacher.sam_mini,
    "open_clip": clip_teacher.open_clip,
    "clip_mini": clip_teacher.clip_mini,
    "classifier": class_teacher.classifier,
}
FAMILIES = {name: "sam" for name in sam_teacher.NAMES} | {name: "clip" for name in ("open_clip", "clip_mini")}
FAMILIES |= {"classifier": "classifier"}
UNPADDED = {"open_clip": "tokens", "clip_mini": "tokens", "classifier": "maps"}  # and the setting that asks for maps


def build(settings: Mapping[str, Any]) -> Teacher:
    """Return the teacher that a recipe names. UserError, before its weights are read, if it cannot compute here."""
    bound = check(settings)
    if settings["name"] in TEACHERS:  # another's `device` may mean anything
        pick_device(bound.keywords.get("device", "auto"), "teacher.device")
    return bound()


def check(settings: Mapping[str, Any], trim: bool = False, similarity: bool = False) -> functools.partial:
    """Bind the teacher's settings without loading it; `live` is the recipe's, and no teacher's.

    UserError for `trim`, the cache's, where the teacher is known to pad no image, and `similarity` where it has no map.
    """
    maps = UNPADDED.get(settings.get("name", ""))
    if trim and maps:
        refuse_trim(f"teacher.name={settings['name']}")
    bound = bind({key: value for key, value in settings.items() if key != "live"}, TEACHERS, "teacher")
    for name, least in (("batch", 1), ("workers", 0)):
        value = bound.keywords.get(name)
        if isinstance(value, int) and value < least:
            raise UserError(f"teacher.{name}={value}: expected {least} or more")
    if similarity and maps and not bound.keywords.get(maps):
        refuse_similarity(f"teacher.name={settings['name']}", f"ask for one by teacher.{maps}, or leave it out")
    return bound


def family(settings: Mapping[str, Any] | None) -> str | None:
    """Return the family of the teacher that a recipe names; None if there is none, or it is another package's."""
    return FAMILIES.get((settings or {}).get("name", ""))


def only_vectors(settings: Mapping[str, Any]) -> bool:
    """Return whether the teacher that `settings` name is known to make no map, without loading it."""
    maps = UNPADDED.get(settings.get("name", ""))
    return maps is not None and not check(settings).keywords.get(maps)


def pads(preprocess: Preprocess) -> bool:
    """Return whether some images are padded, so that not all of their tokens are valid."""
    return not bool(preprocess.valid(torch.tensor([[1, 1]])).all())


def check_pads(model: Teacher) -> None:
    """Raise a UserError unless the teacher pads images: what `cache.trim` leaves out."""
    if not pads(model.preprocess):
        refuse_trim(type(model).__name__)


def refuse_trim(name: str) -> NoReturn:
    """Raise the UserError that a teacher has no padding."""
    raise UserError(f"cache.trim=true: {name} pads no image, so there is nothing to trim; leave `trim` out")


def refuse_similarity(name: str, instead: str) -> NoReturn:
    """Raise the UserError that a teacher has no map."""
    raise UserError(f"cache.similarity=true: {name} makes no map of tokens that could be similar; {instead}")


def weights_path(settings: Mapping[str, Any]) -> Path | None:
    """Return where the weights lie that `settings` name; None where they are packaged, open_clip's own, or unknown."""
    weights = settings.get("weights")
    if settings["name"] == "open_clip":
        return clip_teacher.weights_path(settings)
    if settings["name"] not in TEACHERS:  # of another teacher it is not known that `weights` is a file
        return None
    return Path(weights) if isinstance(weights, str) and weights not in ("", "none", "packaged") else None


def asked(settings: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the part of the fingerprint that `settings` tell without the weights.

    `stored` is a cache's fingerprint, for what they tell only in part.
    """
    found = {"name": settings["name"]}
    if settings.get("dtype", "auto") != "auto":
        found["dtype"] = settings["dtype"]
    if settings["name"] == "open_clip":
        return {**found, **clip_teacher.asked(settings, stored or {})}
    return {**found, **(sam_teacher.asked(settings) if settings["name"] in sam_teacher.NAMES else {})}
