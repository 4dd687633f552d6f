"""Teachers: frozen models whose outputs are cached, one file a family; each file ends in its `Family` record."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fmdistill.registry import UserError, bind, resolve, suggest

if TYPE_CHECKING:  # loading torch takes seconds, and some questions about a cache are answered without it
    from fmdistill.teachers.family import Family, Teacher

FAMILIES = {
    "sam": "fmdistill.teachers.sam:FAMILY",
    "clip": "fmdistill.teachers.clip:FAMILY",
    "classifier": "fmdistill.teachers.classifier:FAMILY",
    "timm": "fmdistill.teachers.timm:FAMILY",
}
NO_ARGUMENT = ("live", "family")  # a recipe's teacher settings that no builder takes


def load_family(name: str) -> "Family":
    """Return the family called `name`, or the record at "package.module:FAMILY"."""
    from fmdistill.teachers.family import Family

    found = resolve(name, FAMILIES, "teacher.family")
    if not isinstance(found, Family):
        raise UserError(f"teacher.family={name}: is a {type(found).__name__}; name a fmdistill.teachers.family.Family")
    return found


def family_of(settings: Mapping[str, Any] | None) -> "Family | None":
    """Return the family of the teacher that a recipe names; None without a teacher, or if its builder alone tells."""
    settings = settings or {}
    if "family" in settings:
        return load_family(str(settings["family"]))
    name = settings.get("name", "")
    if ":" in name:  # a builder of another package
        return None
    return next((record for record in map(load_family, FAMILIES) if name in record.teachers), None)


def may_be(settings: Mapping[str, Any] | None, name: str) -> bool:
    """Return whether the teacher that a recipe names is, or may be, of the family called `name`."""
    record = family_of(settings)
    return record is None or record.name == name


def build(settings: Mapping[str, Any]) -> "Teacher":
    """Return the teacher that a recipe names. UserError, before its weights are read, if it cannot compute here."""
    from fmdistill.backbones.device import pick_device

    builder = check(settings)
    if family_of(settings) is not None:  # another's `device` may mean anything
        pick_device(builder.keywords.get("device", "auto"), "teacher.device")
    return builder()


def check(settings: Mapping[str, Any], trim: bool = False, similarity: bool = False) -> functools.partial:
    """Bind the teacher's settings to its builder without calling it.

    UserError if the cache is to `trim` the outputs of a teacher that is known to pad no image, or to store the
    `similarity` of maps that it does not make.
    """
    record = family_of(settings)
    if trim and record is not None and not record.pads:
        refuse_trim(f"teacher.name={settings['name']}")
    arguments = {key: value for key, value in settings.items() if key not in NO_ARGUMENT}
    builder = bind(arguments, _builders(record), "teacher")
    for name, least in (("batch", 1), ("workers", 0)):
        value = builder.keywords.get(name)
        if isinstance(value, int) and value < least:
            raise UserError(f"teacher.{name}={value}: expected {least} or more")
    if similarity and record is not None and not record.makes_maps(builder.keywords):
        instead = f"ask for one by teacher.{record.map_setting}, or leave it out"
        refuse_similarity(f"teacher.name={settings['name']}", instead)
    return builder


def _builders(record: "Family | None") -> Mapping[str, Any]:
    if record is not None:
        return record.teachers
    return {name: builder for each in map(load_family, FAMILIES) for name, builder in each.teachers.items()}


def only_vectors(settings: Mapping[str, Any]) -> bool:
    """Return whether the teacher that `settings` name is known to make no map, without loading it."""
    record = family_of(settings)
    return record is not None and not record.makes_maps(check(settings).keywords)


def check_pads(model: "Teacher") -> None:
    """Raise a UserError unless the teacher has an output of padded images, whose padding `cache.trim` leaves out."""
    if not any(output.tokens == "image" for output in model.outputs.values()):
        refuse_trim(type(model).__name__)


def refuse_trim(name: str) -> NoReturn:
    """Raise the UserError that a teacher has no padding."""
    raise UserError(f"cache.trim=true: {name} pads no image, so there is nothing to trim; leave `trim` out")


def refuse_similarity(name: str, instead: str) -> NoReturn:
    """Raise the UserError that a teacher has no map."""
    raise UserError(f"cache.similarity=true: {name} makes no map of tokens that could be similar; {instead}")


def weights_file(settings: Mapping[str, Any]) -> Path | None:
    """Return the file or folder of weights that `settings` name; None if they name none, or that is not known."""
    record = family_of(settings)
    return None if record is None else record.weights_file(settings)


def identity(settings: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the part of the fingerprint that `settings` state without the weights.

    `stored` is a cache's fingerprint, for values that they state only in part.
    """
    record = family_of(settings)
    stated = {"name": settings["name"]}
    if settings.get("dtype", "auto") != "auto":
        stated["dtype"] = settings["dtype"]
    return stated if record is None else {**stated, **record.identity(settings, stored or {})}


def of_cache(name: str, settings: Mapping[str, Any] | None) -> "Family":
    """Return the family called `name` in a cache's manifest, which the recipe's teacher `settings` may give.

    A manifest alone never makes code of another package run: it is the recipe that names it.
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
