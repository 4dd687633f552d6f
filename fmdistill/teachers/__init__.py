"""Teachers: frozen models whose outputs are cached, one file per family; each file ends in its `Family` record."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fmdistill.registry import UserError, bind, convert, resolve, suggest

if TYPE_CHECKING:  # loading torch takes seconds, and some functions here do not need it
    from fmdistill.teachers.family import Family, Teacher

FAMILIES = {
    "sam": "fmdistill.teachers.sam:FAMILY",
    "clip": "fmdistill.teachers.clip:FAMILY",
    "classifier": "fmdistill.teachers.classifier:FAMILY",
    "timm": "fmdistill.teachers.timm:FAMILY",
}
NO_ARGUMENT = ("live", "family")  # a recipe's teacher settings that no builder takes


def load_family(name: str) -> "Family":
    """Return the family called `name`, or the record at "package.module:FAMILY". Raises UserError if it is none."""
    from fmdistill.teachers.family import Family

    family = resolve(name, FAMILIES, "teacher.family")
    if not isinstance(family, Family):
        raise UserError(f"teacher.family={name}: is a {type(family).__name__}; name a fmdistill.teachers.family.Family")
    return family


def family_of(settings: Mapping[str, Any] | None) -> "Family | None":
    """Return the family of the teacher that a recipe names; None without a teacher, or if it is not known yet.

    The family of a builder of another package is known only once the teacher is built.
    """
    settings = settings or {}
    if "family" in settings:
        return load_family(str(settings["family"]))
    name = settings.get("name", "")
    if ":" in name:  # a builder of another package
        return None
    return next((record for record in map(load_family, FAMILIES) if name in record.teachers), None)


def may_belong_to(settings: Mapping[str, Any] | None, name: str) -> bool:
    """Return whether the teacher that a recipe names is, or may be, of the family called `name`."""
    record = family_of(settings)
    return record is None or record.name == name


def build(settings: Mapping[str, Any]) -> "Teacher":
    """Return the teacher that a recipe names.

    Raises UserError, before weights are read, if this machine does not have its device.
    """
    from fmdistill.backbones.device import pick_device

    builder = check(settings)
    if family_of(settings) is not None:  # `device` of a builder of another package may mean anything
        pick_device(builder.keywords.get("device", "auto"), "teacher.device")
    return builder()


def check(settings: Mapping[str, Any], trim: bool = False, similarity: bool = False) -> functools.partial:
    """Bind the teacher's settings to its builder without calling it, and return it.

    Raises UserError if a setting is wrong, if the cache shall `trim` the outputs of a teacher that is known to pad no
    image, or if it shall store the `similarity` of maps that the teacher does not make.
    """
    record = family_of(settings)
    if trim and record is not None and not record.pads:
        refuse_trim(f"teacher.name={settings['name']}")
    arguments = {key: value for key, value in settings.items() if key not in NO_ARGUMENT}
    builder = bind(arguments, _builders(record), "teacher")
    for name, least in (("batch", 1), ("workers", 0), ("captions", 0)):
        value = builder.keywords.get(name)
        if isinstance(value, int) and value < least:
            raise UserError(f"teacher.{name}={value}: expected {least} or more")
    if builder.keywords.get("captions") and convert(settings.get("live", False), bool, "teacher.live"):
        raise UserError(
            f"teacher.captions={builder.keywords['captions']}: a live teacher sees images alone; cache its captions, "
            f"without teacher.live, or leave `captions` out"
        )
    if similarity and record is not None and not record.makes_maps(builder.keywords):
        instead = f"request a map by teacher.{record.map_setting}, or remove the setting"
        refuse_similarity(f"teacher.name={settings['name']}", instead)
    return builder


def _builders(record: "Family | None") -> Mapping[str, Any]:
    if record is not None:
        return record.teachers
    return {name: builder for family in map(load_family, FAMILIES) for name, builder in family.teachers.items()}


def makes_only_vectors(settings: Mapping[str, Any]) -> bool:
    """Return whether the teacher that `settings` name is known to make no map, without loading it."""
    record = family_of(settings)
    return record is not None and not record.makes_maps(check(settings).keywords)


def check_pads(model: "Teacher") -> None:
    """Raise a UserError unless the teacher has an output over padded images, whose padding `cache.trim` omits."""
    if not any(output.tokens == "image" for output in model.outputs.values()):
        refuse_trim(type(model).__name__)


def refuse_trim(name: str) -> NoReturn:
    """Raise the UserError for `cache.trim` with a teacher, called `name`, that has no padding."""
    raise UserError(f"cache.trim=true: {name} pads no image, so there is nothing to trim; leave `trim` out")


def refuse_similarity(name: str, instead: str) -> NoReturn:
    """Raise the UserError for `cache.similarity` with a teacher, called `name`, that makes no map."""
    raise UserError(f"cache.similarity=true: {name} makes no map of tokens that could be similar; {instead}")


def weights_file(settings: Mapping[str, Any]) -> Path | None:
    """Return the file or folder of weights that `settings` name; None if they name none, or the family is unknown."""
    record = family_of(settings)
    return None if record is None else record.weights_file(settings)


def identity(settings: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the part of the fingerprint that follows from `settings` alone, without reading weights.

    `stored` is a cache's fingerprint; it completes values that the settings state only in part.
    """
    record = family_of(settings)
    stated = {"name": settings["name"]}
    if settings.get("dtype", "auto") != "auto":
        stated["dtype"] = settings["dtype"]
    return stated if record is None else {**stated, **record.identity(settings, stored or {})}


def family_of_cache(name: str, settings: Mapping[str, Any] | None) -> "Family":
    """Return the family called `name` in a cache's manifest; the recipe's teacher `settings` may define it.

    A manifest alone never runs code of another package: only a recipe may name it. Raises UserError for a name that
    neither fmdistill nor the recipe knows.
    """
    record = family_of(settings)
    if record is not None and record.name == name:
        return record
    if name not in FAMILIES:
        raise UserError(
            f"the cache's teacher is of the family '{name}', which is not one of fmdistill's.{suggest(name, FAMILIES)} "
            f"Name it in the recipe as teacher.family=package.module:FAMILY"
        )
    return load_family(name)
