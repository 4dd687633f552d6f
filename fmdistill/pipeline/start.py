"""Write a recipe for a user's own images: `fmdistill init`, sized to the images and to this machine."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fmdistill import pipeline, recipe, teachers
from fmdistill.backbones.sam import OFFICIAL, PUBLISHED
from fmdistill.files import check_folder
from fmdistill.pipeline.own_images import OwnImages, describe
from fmdistill.pipeline.sizes import Machine, Workload, sizes, this_machine
from fmdistill.recipe import Overrides, Recipe
from fmdistill.registry import UserError, parse, suggest
from fmdistill.settings import flat, merge

EXAMPLE = "fmdistill init mine.yaml sam images.root=/data/mine teacher.weights=sam_vit_h_4b8939.pth"
TEXTS = ("title", "out", "root", "validation_root", "local", "weights", "model")  # texts, even if "1"
SHOWN = ("name", "model", "weights")  # of the teacher
TRY = "teacher.name=sam_mini, the small teacher that ships with fmdistill, needs no file"


@dataclass(frozen=True)
class Start:
    """What a new recipe extends, for one kind of teacher."""

    recipe: str
    about: str
    work: Workload
    student: str
    export: str  # the format, and what is written into the run's folder
    few_protocols: tuple[str, ...] = ()  # instead of the recipe's, for images without labels and captions
    cpu_protocols: tuple[str, ...] = ()  # instead of the recipe's, if there is no GPU
    hint: str = ""  # a setting to uncomment
    model_settings: Mapping[str, Any] = field(default_factory=dict)  # instead of the recipe's, for another model


SRW = "objective: {embedding: {weighting: {name: srw, temperature: 1.0}}}  # weighs patches by SRW instead of evenly"
SRW_VECTORS = (
    "objective: {embedding: {weighting: {name: srw, group: global_batch, temperature: 0.5}}}  # weighs images by SRW"
)
STRIDE = 32  # TinyViT's
COSINE = ("eval/cosine.yaml",)
QUICK = ("eval/sam_grid_quick.yaml",)
# GB that one image keeps for the backward pass in bf16, measured by benchmarks/memory.py and rounded up.
TINY_SAM = Workload(side=1024, gigabytes=1.4, epochs=8, least=1000)
TINY_MINI = Workload(side=256, gigabytes=0.02, epochs=8, least=400, most=2000)
CLIP = Workload(side=224, gigabytes=0.14, epochs=10, least=1000)
CLIP_MINI = Workload(side=64, gigabytes=0.005, epochs=8, least=400, most=2000)
TIMM = Workload(side=224, gigabytes=0.07, epochs=30, least=1000)
STARTS: dict[str, dict[str, Start]] = {
    "sam": {
        **{
            f"sam_{kind}": Start(
                "recipes/sam/mobilesam.yaml",
                "a MobileSAM of your own",
                TINY_SAM,
                "TinyViT-5M",
                "mobilesam mobile_sam.pt",
                cpu_protocols=QUICK,
                hint=SRW,
            )
            for kind in ("vit_h", "vit_l", "vit_b")
        },
        "sam_mini": Start(
            "recipes/demo/sam_mse.yaml",
            "a first try with the small teacher that ships with fmdistill",
            TINY_MINI,
            "a TinyViT of 0.75 M parameters",
            "mobilesam mobile_sam.pt",
            cpu_protocols=QUICK,
            hint=SRW,
        ),
    },
    "clip": {
        "open_clip": Start(
            "recipes/clip/tinyvit.yaml",
            "a small CLIP image tower of your own",
            CLIP,
            "TinyViT-21M",
            "openclip openclip",
            few_protocols=COSINE,
            hint=SRW_VECTORS,
        ),
        "clip_mini": Start(
            "recipes/demo/clip_mse.yaml",
            "a first try with the small teacher that ships with fmdistill",
            CLIP_MINI,
            "a small TinyViT",
            "openclip openclip",
            few_protocols=COSINE,
            hint=SRW_VECTORS,
        ),
    },
    "timm": {
        "timm": Start(
            "recipes/timm/dinov3.yaml",
            "a small network from any timm model",
            TIMM,
            "TinyViT-5M",
            "timm model.safetensors",
            few_protocols=COSINE,
            hint=SRW_VECTORS,
            model_settings={"pool": None, "image_size": None},  # the model's own
        ),
    },
}


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that was written: its path, what was counted for it, and the commands that come next."""

    path: Path
    counted: list[str]
    commands: list[str]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return "\n".join([*self.counted, "", f"{self.path} is written. Next:", "", *self.commands])


def init(path: str | Path, kind: str, overrides: Overrides = ()) -> NewRecipe:
    """Write the recipe `path` for the images and the teacher that `overrides` name, and return it.

    Raises UserError, and writes nothing, if the file exists, or if a setting, the images or the weights are wrong.
    """
    path = Path(path).expanduser()
    try:
        _check_name(path)
        check_folder(path.parent, "the recipe")
        if kind not in STARTS:
            raise UserError(f"init {kind}: unknown kind of teacher.{suggest(kind, STARTS)}")
        changes = recipe.parse_overrides(overrides)
        teacher = _teacher(kind, changes.get("teacher", {}))
        start = STARTS[kind][teacher["name"]]
        base = recipe.load(start.recipe)
        if other_model := _is_other_model(teacher, base):
            teacher = {**start.model_settings, **teacher}
        own = describe(changes.get("images", {}))
        machine = this_machine()
        student = _student(teacher) if other_model else {}
        settings, comments = _settings(path, start, own, machine, base, student, {**changes, "teacher": teacher})
        loaded = recipe.load(start.recipe, settings)
        _check_weights(loaded)
        _check_new(loaded, path)
        pipeline.check_before(loaded)
    except UserError as error:
        raise UserError(f"{error}. {path} was not written" if not path.exists() else str(error)) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x") as file:
        file.write(_text(path, start, own, settings, comments))
    return NewRecipe(path, _counted(own, machine, loaded), _commands(path, loaded, start))


def complete(arguments: Sequence[str], ask: bool) -> tuple[str, str, list[str]]:
    """Return the file, the kind and the settings among a command's arguments; `ask` for those that are missing.

    Raises UserError if one is missing and nobody can be asked.
    """
    overrides = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 2:
        raise UserError(f"init: '{names[2]}': expected FILE KIND key=value ..., such as `{EXAMPLE}`")
    changes = recipe.parse_overrides(overrides)
    root = changes.get("images", {}).get("root")
    if not ask and (len(names) < 2 or not root):
        missing = "a file and a kind (sam, clip or timm)" if len(names) < 2 else "images.root=FOLDER"
        raise UserError(f"init: needs {missing}, such as `{EXAMPLE}`; in a terminal it asks")
    path = names[0] if names else _answer("Recipe to write", "mine.yaml")
    kind = names[1] if len(names) > 1 else _answer(f"Teacher: {', '.join(STARTS)}", "sam")
    if not root:
        overrides.append(f"images.root={_answer('Folder of images', '.')}")
        if kind == "sam" and not changes.get("teacher"):
            weights = _answer("SAM's checkpoint (Enter: the small teacher sam_mini, which needs none)", "")
            overrides.append(f"teacher.weights={weights}" if weights else "teacher.name=sam_mini")
    return path, kind, overrides


def _answer(question: str, default: str) -> str:
    try:
        return input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
    except EOFError:
        raise UserError(f"init: no answer; write it in one line, such as `{EXAMPLE}`") from None


def _check_name(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already and is not overwritten; choose another name, or delete it")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: a recipe's name ends in .yaml; write {path}.yaml")


def _teacher(kind: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the teacher's settings, with the name that the weights' file implies if none is stated."""
    teacher = dict(stated)
    if "name" not in teacher:
        file = Path(str(teacher.get("weights", ""))).name
        implied = [f"sam_{name}" for name, official in OFFICIAL.items() if file == official]
        teacher = {"name": implied[0] if implied and kind == "sam" else next(iter(STARTS[kind])), **teacher}
    if teacher["name"] not in STARTS[kind]:
        raise UserError(f"teacher.name={teacher['name']}: not for init {kind}.{suggest(teacher['name'], STARTS[kind])}")
    return teacher


def _settings(
    path: Path,
    start: Start,
    own: OwnImages,
    machine: Machine,
    base: Recipe,
    student: Mapping[str, int],
    changes: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the new recipe's settings, and comments on them by dotted name; the user's `changes` take precedence."""
    train, comments = sizes(start.work, own.train, base.train, machine)
    settings: dict[str, Any] = {
        "title": f"{changes['teacher']['name']} to {start.student}, {own.name} images",
        "out": f"runs/{path.stem}",
        "images": own.settings,
        "teacher": {},
        "cache": {"root": f"caches/{path.stem}"},
        **({"student": dict(student)} if student else {}),
        "train": train,
    }
    comments |= {f"student.{key}": "the teacher's" for key in student}
    comments |= {"out": "the run", "cache.root": "the teacher's outputs"} | own.comments
    if start.few_protocols and not own.labelled:
        settings["protocols"] = list(start.few_protocols)
        comments["protocols"] = "needs neither labels nor captions"
    elif start.cpu_protocols and not machine.gpu:
        settings["protocols"] = list(start.cpu_protocols)
        comments["protocols"] = "quick, since there is no GPU; eval/sam_grid_miou.yaml is the full one"
    changes = {key: value for key, value in changes.items() if key != "images"}
    kept = {name: comment for name, comment in comments.items() if name not in flat(changes)}
    return merge(settings, changes), kept


def _is_other_model(teacher: Mapping[str, Any], base: Recipe) -> bool:
    """Return whether the teacher is another model of open_clip or timm than the base recipe's."""
    own = base.teacher or {}
    return teacher["name"] == own.get("name") and teacher.get("model", own.get("model")) != own.get("model")


def _student(teacher: Mapping[str, Any]) -> dict[str, int]:
    """Return the settings of a student with the teacher's embedding and image side, by building the teacher.

    Raises UserError if the student cannot see images of this side.
    """
    local = str(teacher["model"]).startswith("local-dir:")  # whose weights need no download
    built = teachers.build({**teacher, **({} if local else {"pretrained": "none"}), "device": "cpu"})
    side, (width,) = built.preprocess.image_size, built.outputs["embedding"].shape
    if side % STRIDE:
        way = f"set teacher.image_size={side // STRIDE * STRIDE}" if teacher["name"] == "timm" else "use another model"
        raise UserError(
            f"teacher.model={teacher['model']}: sees images of {side} x {side}, but a TinyViT's side is a multiple of "
            f"{STRIDE}; {way}"
        )
    return {"embed_dim": width, "image_size": side}


def _check_weights(settings: Recipe) -> None:
    """Raise a UserError, which says where to download it, if the teacher's file of weights does not exist."""
    assert settings.teacher is not None
    name, file = str(settings.teacher["name"]), teachers.weights_file(settings.teacher)
    official = OFFICIAL.get(name.removeprefix("sam_"))
    weights = settings.teacher.get("weights")
    if official and weights in (None, "", "none"):
        raise UserError(
            f"teacher.weights: {name} needs Meta's checkpoint; download {PUBLISHED}{official} and add "
            f"teacher.weights={official}. {TRY}"
        )
    if file is not None and not file.exists():
        way = f"download {PUBLISHED}{official}" if official else "check the path"
        raise UserError(f"teacher: {file}: no such file; {way}{f'. {TRY}' if official else ''}")


def _check_new(settings: Recipe, path: Path) -> None:
    out = Path(settings.out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: holds a run already; choose another name than {path}, set out=FOLDER, or delete it")


def _counted(own: OwnImages, machine: Machine, settings: Recipe) -> list[str]:
    train, teacher = settings.train, settings.teacher or {}
    passes = train.steps * train.batch_size / own.train if train.steps else train.epochs
    return [
        f"images    {own.text}",
        f"split     {own.train:,} to train on, {own.validation:,} held out for validation",
        f"machine   {machine.text}",
        f"teacher   {', '.join(str(teacher[key]) for key in SHOWN if teacher.get(key))}",
        f"training  {train.steps:,} steps of {train.batch_size} images, about {passes:,.0f} times each"
        if train.steps
        else f"training  {train.epochs} epochs in steps of {train.batch_size} images",
    ]


def _commands(path: Path, settings: Recipe, start: Start) -> list[str]:
    file, out = shlex.quote(str(path)), shlex.quote(settings.out)
    kind, name = start.export.split()
    commands = [
        (f"fmdistill plan {file}", "how many hours and bytes it takes, measured on a few images"),
        (f"fmdistill run {file}", "run the teacher, train, evaluate; if it is stopped, it continues"),
        (f"fmdistill serve {out}", "try the student in a browser"),
        (f"fmdistill export {out} {kind} {shlex.quote(f'{settings.out}/{name}')}", "for other software"),
    ]
    shown = [pair for pair in commands if kind != "timm" or " serve " not in pair[0]]  # features alone show nothing
    width = max(len(command) for command, _ in shown)
    return [f"  {command:{width}}  # {why}" for command, why in shown]


def _text(path: Path, start: Start, own: OwnImages, settings: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """Return the recipe as YAML with comments, one line for each setting."""
    teacher = settings["teacher"]["name"]
    about = start.about[0].upper() + start.about[1:]
    lines = [
        f"# {about}: {teacher} to {start.student}, on {own.text}.",
        f"# Command: fmdistill run {shlex.quote(str(path))}",
        f"# What is not set here comes from {start.recipe}; `fmdistill show {shlex.quote(str(path))}` prints all.",
        f"extends: {start.recipe}",
    ]
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{key}:", *_lines(value, key, comments)]
        else:
            lines += _lines({key: value}, "", comments)
    if start.hint and "objective" not in settings:
        lines.append(f"# {start.hint}")
    return "\n".join(lines) + "\n"


def _lines(settings: Mapping[str, Any], parent: str, comments: Mapping[str, str]) -> Iterator[str]:
    indent = "  " if parent else ""
    for key, value in settings.items():
        comment = comments.get(f"{parent}.{key}" if parent else key, "")
        yield f"{indent}{key}: {_yaml(key, value)}{f'  # {comment}' if comment else ''}"


def _yaml(key: str, value: Any) -> str:
    """Return a value as YAML in one line; a text that stands for a number, a list or a boolean is not quoted."""
    if isinstance(value, str):
        parsed = _parsed(value)
        if key in TEXTS and not isinstance(parsed, str):
            return json.dumps(value, ensure_ascii=False)
        value = parsed
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _parsed(text: str) -> Any:
    try:
        return parse(text, "") if text else text
    except UserError:
        return text
