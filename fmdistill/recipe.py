"""Recipes: typed, frozen values read from YAML with `extends` and `key=value` overrides, without executing code."""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fmdistill.files import write_whole
from fmdistill.registry import UserError, suggest, typed
from fmdistill.settings import (
    expand_home,
    folder_name,
    foreign_names,
    merge,
    nested,
    parse_methods,
    parse_recipe_name,
    parts_by_memory,
    with_method,
    without_null,
)

SAVED = "recipe.yaml"  # the resolved recipe in a run or cache; a file of this name is not trusted
STAGES = "stages.yaml"  # beside it in a run of several stages: the recipe with all of them; not trusted either
STUDY = "study.yaml"  # a study's file in its folder: a recipe, and in `methods` variants of it by name
LOCAL_GB = 50.0  # default limit of the local copies of a cache at a URL
VALIDATION = "validation/"  # begins the names of a validation's values in a run's log
# settings of `Train` that are at least 1
COUNTS = (
    "batch_size",
    "accumulate",
    "window",
    "max_skipped",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep",
)
Tracker = Literal["tensorboard", "wandb"]
CodecName = Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"]
Component = dict  # {"name": ..., argument: value, ...}; typed when it is bound to its class
Overrides = (
    Iterable[str] | Mapping[str, Any]
)  # "train.steps=100", or {"train.steps": 100}, or {"train": {"steps": 100}}
NAMED = ("objective", "teachers", "stages")  # mappings of which an entry that is null is left out
FREE = {"free": True}  # marks a field that does not affect weights: it may change when a run is resumed


@dataclass(frozen=True)
class CacheSettings:
    """The settings of a cache: where and how teacher outputs are stored."""

    root: str
    # for training shards, since validation is always exact fp32; auto = int8 for a teacher of maps, fp16 of vectors
    codec: CodecName = "auto"
    # folder for copies of the tars if root is a URL; "" = below ~/.cache/fmdistill
    local: str = field(default="", metadata=FREE)
    # GB of these copies at most (null: 50), the least recently used are removed; a training window should fit
    local_gb: float | None = field(default=None, metadata=FREE)
    trim: bool = False  # store only the valid tokens of training maps, for objectives that exclude padding
    similarity: bool = False  # also store the SRW similarities of each map, so that training need not compute them
    # largest fraction of images that may fail to decode or have a non-finite output
    max_failed: float = field(default=0.01, metadata=FREE)
    # which processes run the teacher
    executor: Component = field(default_factory=lambda: {"name": "local"}, compare=False, metadata=FREE)

    def __post_init__(self) -> None:
        """Check the settings. Raises UserError if one of them is wrong."""
        protocol, url, path = self.root.partition("://")
        if not self.root or url and (not path.strip("/") or protocol in ("s3", "gs") and path.startswith("/")):
            raise UserError(f"cache.root='{self.root}': expected a folder, or a URL such as s3://bucket/caches/sam")
        if not 0 <= self.max_failed <= 1:
            raise UserError(f"cache.max_failed={self.max_failed}: expected a fraction of the images, from 0 to 1")
        if self.local_gb is not None and not 0 < self.local_gb < math.inf:
            raise UserError(f"cache.local_gb={self.local_gb}: expected gigabytes, a finite number above 0")
        for name, value in (("local", self.local or None), ("local_gb", self.local_gb)):
            if value is not None and not url:
                raise UserError(
                    f"cache.{name}={value}: only for a URL, but cache.root={self.root} is a folder; remove it"
                )

    @property
    def local_bytes(self) -> int:
        """The limit, in bytes, of the local copies of a cache at a URL."""
        return int((LOCAL_GB if self.local_gb is None else self.local_gb) * 1e9)


@dataclass(frozen=True)
class Train:
    """The settings of the training loop itself."""

    steps: int | None = None  # optimizer steps; set this or `epochs`
    epochs: float | None = None  # passes over the training images
    batch_size: int = 16  # images of an optimizer step, over all processes and accumulated batches
    # parts in which a process computes its share of a step; auto = as few as fit in memory, tried before training
    accumulate: int | Literal["auto"] = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # autocast; auto = bf16 if the device has it
    clip: float | None = None  # largest gradient norm
    ema: float | None = None  # decay of an exponential moving average of the weights, which is then the run's student
    # steps in a row with a loss or gradient that is not finite: each is skipped, so many of them end the run
    max_skipped: int = field(default=10, metadata=FREE)
    window: int = 8  # shards whose samples are shuffled together
    workers: int = field(
        default=2, metadata=FREE
    )  # image-loading processes per training process, and threads that read the cached outputs
    image_memory: float = field(
        default=0.0, metadata=FREE
    )  # GB of prepared images that each of these processes stores, so that later epochs need not decode them
    device: str = field(default="auto", metadata=FREE)  # where the student is trained; auto = a GPU if there is one
    log_every: int = field(default=10, metadata=FREE)  # steps between lines of the log
    validate_every: int = field(default=500, metadata=FREE)  # steps between validations
    checkpoint_every: int = field(default=500, metadata=FREE)  # steps between checkpoints
    keep: int = field(default=2, metadata=FREE)  # newest checkpoints that are not deleted
    # the value of a validation by which the best checkpoint is not deleted either; null = none is the best
    best: str | None = field(default="validation/loss", metadata=FREE)
    # where the rows of the log are shown too, by accelerate's trackers
    trackers: list[Tracker] = field(default_factory=list, metadata=FREE)

    def __post_init__(self) -> None:
        """Check the settings. Raises UserError if one of them is wrong."""
        if (self.steps is None) == (self.epochs is None):
            raise UserError("train.steps and train.epochs: set exactly one of the two")
        if self.steps is not None and self.steps < 1 or self.epochs is not None and self.epochs <= 0:
            raise UserError(f"train.steps={self.steps}, train.epochs={self.epochs}: expected more than 0")
        for name in COUNTS:
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)}: expected at least 1")
        if self.workers < 0:
            raise UserError(f"train.workers={self.workers}: expected 0 (load in the training process) or more")
        if self.image_memory < 0:
            raise UserError(f"train.image_memory={self.image_memory}: expected gigabytes, or 0 to store no images")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"train.clip={self.clip}: expected a norm above 0, or null for no clipping")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"train.ema={self.ema}: expected a decay between 0 and 1, such as 0.999, or null for none")
        if self.best is not None and not self.best.startswith(VALIDATION):
            raise UserError(
                f"train.best={self.best}: expected a value of a validation, such as {VALIDATION}loss, or null"
            )

    @property
    def parts(self) -> int:
        """The number of parts of a process's share of a step. Not known yet if `accumulate` is "auto"."""
        assert self.accumulate != "auto", "train.accumulate=auto is replaced before it is needed"
        return self.accumulate

    def divides(self, processes: int) -> bool:
        """Return whether a step's images divide evenly among so many processes, and each share into its parts."""
        return self.batch_size % (processes * (1 if self.accumulate == "auto" else self.accumulate)) == 0


@dataclass(frozen=True)
class Recipe:
    """The settings of an experiment: what to cache, train and evaluate."""

    out: str = field(metadata=FREE)  # the folder of the run
    images: Component  # the source of images
    task: Component  # how the student is trained
    optimizer: Component  # the optimizer of the student's weights
    schedule: Component  # the learning rate over the steps
    train: Train  # the training loop
    title: str = field(default="", metadata=FREE)  # what reports call the run
    seed: int = 0  # of the initial weights and of the order of the images
    student: Component = field(default_factory=dict)  # the network that is trained
    teacher: Component | None = None  # the frozen model that the student learns from; needs `cache`, unless it is live
    cache: CacheSettings | None = None  # where and how the teacher's outputs are stored
    # the terms of the loss by name, each with an output, a distance, a weighting and more
    objective: dict[str, dict] = field(default_factory=dict)
    # several teachers by name, instead of `teacher`: each has its own cache, objective, and student on the shared trunk
    teachers: dict[str, Component] = field(default_factory=dict)
    # trained one after the other: what each changes of task, objective, optimizer, schedule, train and student, by name
    stages: dict[str, dict] | None = None
    protocols: list[str] = field(default_factory=list, metadata=FREE)  # files that say how the student is evaluated

    def __post_init__(self) -> None:
        """Check the seed. Raises UserError if it is negative."""
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: expected 0 or more")


def variants(name: str) -> list[str]:
    """Return the names of a study's methods as recipes, the baseline first; for any other recipe [`name`]."""
    parsed = parse_recipe_name(name)
    if parsed.method or parsed.settings:
        return [name]
    file, study = locate(name), name.removesuffix(f"/{STUDY}")
    return [f"{study}:{method}" for method in parse_methods(read_yaml(file).get("methods", {}), file)] or [name]


def locate(path: str | Path) -> Path:
    """Return the path of a recipe's or protocol's file, looked up in the working folder, then in the package.

    A folder means the study in it. Raises UserError if there is no such file.
    """
    path, package = Path(path).expanduser(), Path(__file__).parent
    for base in (Path.cwd(), package, package.parent):
        for file in (base / path, base / path / STUDY):
            if file.is_file():
                return file
    raise UserError(
        f"{path}: no such file in the working folder or in the package; `fmdistill check` lists those in the package"
    )


def shipped() -> list[str]:
    """Return the paths of the recipes and protocols in the package."""
    package = Path(__file__).parent
    base = package if (package / "recipes").is_dir() else package.parent
    files = [*base.glob("recipes/**/*.yaml"), *base.glob("eval/*.yaml")]
    return sorted(str(path.relative_to(base)) for path in files)


def load(name: str | Path, overrides: Overrides = ()) -> Recipe:
    """Load the recipe called `name`, apply the overrides, and check the names and types of all settings.

    The run of a study's method is in the study's `out`/METHOD; the run of a name with settings is next to the run
    without them. A recipe saved in a run or cache, or that extends one, may name code only with `trust=true`. A path
    may begin with ~. Raises UserError if the file or a setting is wrong.
    """
    parsed, changes = parse_recipe_name(name), parse_overrides(overrides)
    trust = str(changes.pop("trust", "false")).lower() == "true"
    settings = _read(locate(parsed.path), trust, parsed.method)
    if parsed.settings:
        own = _own_out_and_title(settings, f"-{folder_name(parsed.settings)}", ", ".join(parsed.settings))
        settings = merge(settings, {**own, **parse_overrides(parsed.settings)})
    return freeze(merge(settings, changes), str(name))


def load_saved(folder: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the resolved recipe saved in a run or cache; it may name code only with `trust=true`.

    Raises UserError for a run of several teachers, which contains one run for each.
    """
    loaded = load_claimed(folder, overrides)
    if loaded.teachers:
        raise UserError(
            f"{folder}: a run of several teachers; name the run of one of them: "
            f"{', '.join(str(Path(folder) / name) for name in loaded.teachers)}"
        )
    return loaded


def load_claimed(folder: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Load the resolved recipe saved in a run or cache, also that of a run of several teachers.

    For a run of several stages it is the recipe of the last one.
    """
    path = Path(folder).expanduser() / SAVED
    if not path.is_file() and path.with_name(STAGES).is_file():
        raise UserError(
            f"{folder}: its last stage has not begun; `fmdistill distill {folder}/{STAGES}` continues the run, and the "
            f"runs of the stages before are in folders there"
        )
    if not path.is_file():
        raise UserError(
            f"{folder}: not a run, it contains no {SAVED}; `fmdistill distill RECIPE out={folder}` creates one"
        )
    return load(path, overrides)


def freeze(settings: Mapping[str, Any], where: str = "") -> Recipe:
    """Convert `settings` to a Recipe. Raises UserError, beginning with the file `where`, if a setting is wrong.

    A term of the objective, a teacher or a stage that is null is left out.
    """
    settings = {key: without_null(value) if key in NAMED else value for key, value in settings.items()}
    train = settings.get("train")
    if isinstance(train, Mapping):  # "auto" as batch size is the default number
        settings = {**settings, "train": parts_by_memory(train, {"batch_size": Train.batch_size})}
    try:
        return Recipe(**typed(Recipe, settings, "recipe"))
    except UserError as error:
        raise UserError(f"{where}{': ' * bool(where)}{str(error).removeprefix('recipe.')}") from None


def save(recipe: Recipe, folder: str | Path, name: str = SAVED) -> None:
    """Write the resolved recipe to `folder`/`name`, unless the file has this content already."""
    path, text = Path(folder) / name, to_yaml(recipe)
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)  # several training processes may save it at the same time


def free_settings(kind: type = Recipe, where: str = "") -> set[str]:
    """Return the names of the settings that may change when a run is resumed, such as "train.workers"."""
    names: set[str] = set()
    for setting in dataclasses.fields(kind):
        name = f"{where}.{setting.name}" if where else setting.name
        if setting.metadata.get("free"):
            names.add(name)
        for part in (CacheSettings, Train):
            if part in (setting.type, *typing.get_args(setting.type)):
                names |= free_settings(part, name)
    return names


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML."""
    try:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)), resolve=False)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe: a text with an unclosed '${{' cannot be saved: {_line(error)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, with interpolations as literal text. Raises UserError if the file contains none."""
    import yaml

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not YAML: {_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a mapping of settings")
    return {str(key): expand_home(value) for key, value in loaded.items()}


def parse_overrides(overrides: Overrides) -> dict[str, Any]:
    """Parse "a.b=text" strings into a nested mapping of literal texts. Raises UserError if two contradict.

    The values of a mapping are used as they are.
    """
    if isinstance(overrides, Mapping):
        return {key: expand_home(value) for key, value in nested(overrides).items()}
    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}': expected key=value, such as train.steps=1000")
        *parents, last = key.split(".")
        mapping = parsed
        for parent in parents:
            mapping = mapping.setdefault(parent, {})
            if not isinstance(mapping, dict):
                raise UserError(f"'{override}': another argument sets {parent} itself; remove one of the two")
        if isinstance(mapping.get(last), dict):
            raise UserError(f"'{override}': another argument sets a part of {last}; remove one of the two")
        mapping[last] = expand_home(text)
    return parsed


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read(path: Path, trust: bool, method: str = "", below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe's file, or a method of the study in it, and merge its settings into those that it extends.

    `below` are the files that extend this one.
    """
    settings = read_yaml(path)
    if isinstance(stages := settings.get("stages"), dict):
        settings["stages"] = nested(stages)
    methods = parse_methods(settings.pop("methods", {}), path)
    foreign = foreign_names([settings, *methods.values()])
    saved = any(file.name in (SAVED, STAGES) for file in (*below, path))  # a saved recipe may extend any file
    if saved and foreign and not trust:
        raise UserError(f"{path}: names code outside fmdistill ({', '.join(foreign)}); add trust=true to import it")
    parent = settings.pop("extends", None)
    if parent is not None:
        if path in below:
            raise UserError(f"{path}: extends itself, by way of {' and '.join(map(str, below))}; remove one `extends`")
        parsed = parse_recipe_name(str(parent))
        if parsed.settings:
            raise UserError(
                f"{path}: extends={parent}: name a recipe or a study's method, and set {parsed.settings[0]} in {path}"
            )
        settings = merge(_read(locate(parsed.path), trust, parsed.method, (*below, path)), settings)
    if not methods and not method:
        return settings
    if not method:
        raise UserError(
            f"{path}: a study of several recipes; name one as {path}:METHOD, or run all with `fmdistill compare`."
            f"{suggest('', methods)}"
        )
    if method not in methods:
        raise UserError(f"{path}: no method '{method}'.{suggest(method, methods)}")
    own = {key: value for key, value in methods[method].items() if key in ("out", "title")}
    return {**with_method(settings, methods, method, path), **_own_out_and_title(settings, f"/{method}", method), **own}


def _own_out_and_title(settings: Mapping[str, Any], out: str, title: str) -> dict[str, Any]:
    """Return `out` and `title` of a variant of a recipe: the recipe's with these suffixes."""
    own = {"title": ", ".join(filter(None, [settings.get("title"), title]))}
    return {**own, "out": f"{settings['out']}{out}"} if "out" in settings else own
