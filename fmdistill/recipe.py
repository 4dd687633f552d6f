"""A recipe is one typed, frozen value: YAML, `extends`, `key=value` overrides, and nothing that executes."""

import dataclasses
import math
import os
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fmdistill.files import write_whole
from fmdistill.registry import UserError, suggest, typed
from fmdistill.settings import folder_name, merge, methods_of, refer, with_method

SAVED = "recipe.yaml"  # the name of a resolved recipe in a run or cache; a file of this name is not trusted
STUDY = "study.yaml"  # the name of a study's file: a recipe, and `methods`, which are variants of it by name
LOCAL_GB = 50.0  # of a cache whose root is a URL, unless the recipe says otherwise
CodecName = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
Component = dict  # {"name": ..., argument: value, ...}; typed when it is bound to its class
FREE = {"free": True}  # marks a field that moves no weight, so that it may change between a run and its resumption


@dataclass(frozen=True)
class Cache:
    """Where and how teacher outputs are kept."""

    root: str
    # of training shards, validation is always exact fp32; auto = int8 for a teacher of maps, fp16 for one of vectors
    codec: CodecName = "auto"
    # where tars of a root that is a URL are kept on this machine; "" = below ~/.cache/fmdistill
    local: str = field(default="", metadata=FREE)
    # at most so many GB of them (null: 50), the longest unused go first; a training window should fit
    local_gb: float | None = field(default=None, metadata=FREE)
    trim: bool = False  # keep of each training map only the valid tokens, for objectives that exclude padding
    similarity: bool = False  # keep each map's SRW similarities too, so that training need not compute them
    # largest fraction of images that may fail to decode or give a non-finite output
    max_failed: float = field(default=0.01, metadata=FREE)
    # who runs the teacher
    executor: Component = field(default_factory=lambda: {"name": "local"}, compare=False, metadata=FREE)

    def __post_init__(self) -> None:
        """Refuse what cannot keep a cache, before a teacher is loaded."""
        kind, url, place = self.root.partition("://")
        if not self.root or url and (not place.strip("/") or kind in ("s3", "gs") and place.startswith("/")):
            raise UserError(f"cache.root='{self.root}': expected a folder, or a URL such as s3://bucket/caches/mine")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"cache.max_failed={self.max_failed}: expected a fraction of the images, from 0 to 1")
        if self.local_gb is not None and not 0 < self.local_gb < math.inf:
            raise UserError(f"cache.local_gb={self.local_gb}: expected gigabytes, a finite number above 0")
        for name, given in (("local", self.local or None), ("local_gb", self.local_gb)):
            if given is not None and not url:
                raise UserError(
                    f"cache.{name}={given}: only for a URL, and cache.root={self.root} is a folder; leave it out"
                )

    @property
    def local_bytes(self) -> int:
        """Bytes of a URL's tars on this machine, at most; a training window should fit."""
        return int((LOCAL_GB if self.local_gb is None else self.local_gb) * 1e9)


@dataclass(frozen=True)
class Train:
    """The loop's own settings; everything else is a component."""

    steps: int | None = None  # optimizer steps; set this or `epochs`
    epochs: float | None = None
    batch_size: int = 16  # images of one optimizer step, over all processes and accumulation
    accumulate: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # autocast; auto = bf16 on a GPU, fp32 on a CPU
    clip: float | None = None  # largest gradient norm
    window: int = 8  # shards whose samples are shuffled together
    workers: int = field(
        default=2, metadata=FREE
    )  # image-loading processes per training process, and threads that read the cached outputs
    image_memory: float = field(
        default=0.0, metadata=FREE
    )  # GB of prepared images that each of them keeps, so that a later epoch need not decode
    device: str = field(default="auto", metadata=FREE)
    log_every: int = field(default=10, metadata=FREE)  # steps
    validate_every: int = field(default=500, metadata=FREE)  # steps
    checkpoint_every: int = field(default=500, metadata=FREE)  # steps

    def __post_init__(self) -> None:
        """Refuse what cannot train, before anything is cached."""
        if (self.steps is None) == (self.epochs is None):
            raise UserError("train.steps and train.epochs: set exactly one of the two")
        if self.steps is not None and self.steps < 1 or self.epochs is not None and self.epochs <= 0:
            raise UserError(f"train.steps={self.steps}, train.epochs={self.epochs}: makes no step")
        for name in ("batch_size", "accumulate", "window", "log_every", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)}: expected at least 1")
        if self.workers < 0:
            raise UserError(f"train.workers={self.workers}: expected 0 (load in the training process) or more")
        if self.image_memory < 0:
            raise UserError(f"train.image_memory={self.image_memory}: expected gigabytes, 0 to keep no images")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"train.clip={self.clip}: expected a norm above 0, or null for no clipping")


@dataclass(frozen=True)
class Recipe:
    """One experiment: what to cache, train and judge."""

    out: str = field(metadata=FREE)  # the run's directory
    images: Component
    student: Component
    task: Component
    optimizer: Component
    schedule: Component
    train: Train
    title: str = field(default="", metadata=FREE)
    seed: int = 0
    teacher: Component | None = None
    cache: Cache | None = None
    objective: dict[str, dict] = field(default_factory=dict)
    protocols: list[str] = field(default_factory=list, metadata=FREE)

    def __post_init__(self) -> None:
        """Refuse a seed that no generator takes."""
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: expected 0 or more")


def variants(name: str) -> list[str]:
    """Return the names of all recipes that `name` stands for: of a study its methods', the baseline first."""
    named = refer(name)
    if named.method or named.settings:
        return [name]
    file, study = locate(name), name.removesuffix(f"/{STUDY}")
    return [f"{study}:{method}" for method in methods_of(read_yaml(file).get("methods", {}), file)] or [name]


def locate(path: str | Path) -> Path:
    """Return the recipe or protocol file `path`, looked up in the working folder first, then in the package.

    A folder stands for the study in it.
    """
    path, package = Path(path).expanduser(), Path(__file__).parent
    for base in (Path.cwd(), package, package.parent):
        for file in (base / path, base / path / STUDY):
            if file.is_file():
                return file
    raise UserError(f"{path}: no such file here or in the package; `fmdistill check` lists those that ship")


def load(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe called `name` with `key=value` overrides applied; every field is typed and known.

    The run of a study's method lies in the study's `out`/METHOD, that of a name with settings beside the run without
    them. A recipe that a run or cache saved, or that extends such a recipe, may not name code unless `trust=true` is
    given. A path may begin with ~.
    """
    named, given = refer(name), parse_overrides(overrides)
    trust = str(given.pop("trust", "false")).lower() == "true"
    settings = _read(locate(named.path), trust, named.method)
    if named.settings:
        apart = _apart(settings, f"-{folder_name(named.settings)}", ", ".join(named.settings))
        settings = merge(settings, {**apart, **parse_overrides(named.settings)})
    return freeze(merge(settings, given), str(name))


def load_saved(folder: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the resolved recipe saved in a run or cache; it may not name code unless `trust=true` is given."""
    path = Path(folder).expanduser() / SAVED
    if not path.is_file():
        raise UserError(f"{folder}: not a run, it holds no {SAVED}; `fmdistill distill RECIPE out={folder}` makes one")
    return load(path, overrides)


def freeze(settings: Mapping[str, Any], where: str) -> Recipe:
    """Return `settings` as a Recipe; `where` names the file in errors."""
    try:
        return Recipe(**typed(Recipe, settings, "recipe"))
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('recipe.')}") from None


def save(recipe: Recipe, folder: str | Path) -> None:
    """Write the resolved recipe to `folder`/recipe.yaml, unless it is there already."""
    path, text = Path(folder) / SAVED, to_yaml(recipe)
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)  # several training processes save it at once


def free_settings(kind: type = Recipe, where: str = "") -> set[str]:
    """Return the settings that may change between a run and its resumption, such as "train.workers"."""
    found: set[str] = set()
    for one in dataclasses.fields(kind):
        name = f"{where}.{one.name}" if where else one.name
        if one.metadata.get("free"):
            found.add(name)
        for nested in (Cache, Train):
            if nested in (one.type, *typing.get_args(one.type)):
                found |= free_settings(nested, name)
    return found


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML."""
    try:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)), resolve=False)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe: a text with an unclosed '${{' cannot be saved: {_line(error)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping; interpolation stays literal text."""
    import yaml

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not YAML: {_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a mapping of settings is expected")
    return {str(k): _at_home(v) for k, v in loaded.items()}


def foreign_names(settings: Any) -> list[str]:
    """Return the names in `settings` of components outside fmdistill, "package.module:Name"."""
    return [name for name in _names(settings) if ":" in name]


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return "a.b=text" strings as one nested mapping of literal texts."""
    nested: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}': expected key=value, such as train.steps=1000")
        *parents, last = key.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"'{override}': {parent} is given a value elsewhere on the command line")
        if isinstance(place.get(last), dict):
            raise UserError(f"'{override}': settings below {last} are given elsewhere on the command line")
        place[last] = _at_home(text)
    return nested


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read(path: Path, trust: bool, method: str = "", below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a recipe's file, or of a method of the study in it, on top of what they extend."""
    settings = read_yaml(path)
    methods = methods_of(settings.pop("methods", {}), path)
    foreign = foreign_names([settings, *methods.values()])
    saved = any(one.name == SAVED for one in (*below, path))  # who saved it may have chosen what it extends
    if saved and foreign and not trust:
        raise UserError(f"{path}: names code outside fmdistill ({', '.join(foreign)}); add trust=true to import it")
    parent = settings.pop("extends", None)
    if parent is not None:
        if path in below:
            raise UserError(
                f"{path}: extends itself, by way of {' and '.join(map(str, below))}; take one `extends` out"
            )
        named = refer(str(parent))
        if named.settings:
            raise UserError(
                f"{path}: extends={parent}: name a recipe or a study's method, and set {named.settings[0]} here"
            )
        settings = merge(_read(locate(named.path), trust, named.method, (*below, path)), settings)
    if not methods and not method:
        return settings
    if not method:
        wrong = f"a study of several recipes; name one as {path}:METHOD, or `fmdistill compare` them all"
        raise UserError(f"{path}: {wrong}.{suggest('', methods)}")
    if method not in methods:
        raise UserError(f"{path}: no method '{method}'.{suggest(method, methods)}")
    own = {key: value for key, value in methods[method].items() if key in ("out", "title")}
    return {**with_method(settings, methods, method, path), **_apart(settings, f"/{method}", method), **own}


def _apart(settings: Mapping[str, Any], out: str, title: str) -> dict[str, Any]:
    """Return the folder and the title of a variant of a recipe with these settings."""
    apart = {"title": ", ".join(filter(None, [settings.get("title"), title]))}
    return {**apart, "out": f"{settings['out']}{out}"} if "out" in settings else apart


def _at_home(value: Any) -> Any:
    """Return the value, each of its texts that begins with ~ as a path of the user's home folder."""
    if isinstance(value, Mapping):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    is_path = isinstance(value, str) and value.startswith("~") and "/" in value  # ~ alone is YAML's null
    return os.path.expanduser(value) if is_path else value


def _names(settings: Any) -> list[str]:
    if isinstance(settings, Mapping):
        own = [str(settings["name"])] if "name" in settings else []
        return own + [name for value in settings.values() for name in _names(value)]
    if isinstance(settings, list):
        return [name for value in settings for name in _names(value)]
    return []
