"""Write the model card of an exported folder: README.md with Hugging Face's front matter, from what the run states."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fmdistill import __version__
from fmdistill.distill.student import weights_path
from fmdistill.evaluate import results
from fmdistill.evaluate.results import Result
from fmdistill.export.source import FinishedRun, without_folders
from fmdistill.files import file_hash, write_whole
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.stages import by_stage, saved_stages

NAME = "README.md"
NOT_STATED = "not stated"
PIPELINES = {"sam": "mask-generation", "clip": "zero-shot-image-classification"}
LIBRARIES = {  # library_name by a pattern of the folder's files, the first that matches
    "open_clip_config.json": "open_clip",
    "preprocessor_config.json": "transformers.js",
    "**/*.mlpackage": "coreml",
    "**/*.tflite": "tflite",
    "**/*.pte": "executorch",
    "**/*.onnx": "onnx",
}
TEACHER_LICENCES = {
    "sam_vit_b": "Apache-2.0 (Segment Anything)",
    "sam_vit_l": "Apache-2.0 (Segment Anything)",
    "sam_vit_h": "Apache-2.0 (Segment Anything)",
    "sam_mini": "Apache-2.0 (packaged with fmdistill)",
    "clip_mini": "Apache-2.0 (packaged with fmdistill)",
}
DRAWN = ("scenes", "captioned")  # sources whose images fmdistill's own code draws
OWN_DECODER = (
    "The student replaces the image encoder, and the mask decoder was trained with it; the prompt encoder is the "
    "teacher's. It takes points, boxes and masks as prompts, no text."
)
LIMITS = {
    "sam": (
        "The student replaces the image encoder; prompt encoder and mask decoder are the teacher's. It takes points, "
        "boxes and masks as prompts, no text."
    ),
    "clip": (
        "The student replaces the image tower; texts are embedded by the teacher's text tower, with its vocabulary and "
        "its biases."
    ),
}


def write_card(folder: Path, source: FinishedRun, check: Mapping[str, Any]) -> Path:
    """Write `folder`/README.md and return its path; call it when the other files exist, before `describe`.

    `check` holds the figures measured on the exported files, possibly nested; it may be empty. What nobody stated, such
    as a licence, is "not stated".
    """
    sections = (
        ("Student and teacher", _networks(source)),
        ("Training", _training(source)),
        ("Check of the exported files", _check(check)),
        ("Evaluation", _evaluation(source)),
        ("Limits", _limits(source)),
        ("Licences", _licences(source)),
        ("Files", _files(folder)),
    )
    front = yaml.safe_dump(_front_matter(folder, source), sort_keys=False, allow_unicode=True)
    body = "\n".join(f"## {heading}\n\n{text}\n" for heading, text in sections if text)
    title = " ".join(source.recipe.title.split()) or source.run.resolve().name
    intro = f"# {title}\n\nDistilled and exported by fmdistill {__version__}.\n"
    path = folder / NAME
    write_whole(path, f"---\n{front}---\n\n{intro}\n{body}")
    return path


def _front_matter(folder: Path, source: FinishedRun) -> dict[str, Any]:
    library = next((name for pattern, name in LIBRARIES.items() if any(folder.glob(pattern))), "fmdistill")
    tags = ["knowledge-distillation", "fmdistill"]
    family = source.family
    tags += [family] if family in PIPELINES else []
    tags += ["onnx"] if library != "onnx" and any(folder.glob("**/*.onnx")) else []
    return {
        **({"license": source.license} if source.license else {}),
        "library_name": library,
        "pipeline_tag": PIPELINES.get(family, "image-feature-extraction"),
        "tags": tags,
    }


def _networks(source: FinishedRun) -> str:
    parameters = sum(parameter.numel() for parameter in source.student.parameters())
    rows = [
        ("Student", _component(source.recipe.student)),
        ("Student's parameters", f"{parameters:,}"),
        ("Teacher", _component(source.recipe.teacher) if source.recipe.teacher else "none"),
        ("Image side", f"{source.preprocess.image_size} px"),
    ]
    if source.trained_head is not None:
        rows.append(("Mask decoder", "the student's own, trained with it"))
    if source.correction is not None:
        power = f"of masks 1 to 3 corrected by fmdistill: raised to the power {source.correction.exponent:.4g}"
        rows.append(("Predicted IoU", power))
    return _table(("", ""), rows)


def _training(source: FinishedRun) -> str:
    whole = saved_stages(source.run)
    if whole is None:
        return _trained(source.recipe)
    tables = [f"Stage `{name}`:\n\n{_trained(stage)}" for name, stage in by_stage(whole).items()]
    return "\n\n".join(["In stages, each of which began with the student of the one before.", *tables])


def _trained(recipe: Recipe) -> str:
    rows = [("Images", _component(recipe.images)), ("Task", _component(recipe.task))]
    rows += [(f"Objective `{name}`", _component(term)) for name, term in recipe.objective.items()]
    length = f"{recipe.train.steps} steps" if recipe.train.steps is not None else f"{recipe.train.epochs:g} epochs"
    rows += [
        ("Optimizer", _component(recipe.optimizer)),
        ("Schedule", _component(recipe.schedule)),
        ("Length", f"{length} of {recipe.train.batch_size} images"),
        ("Seed", str(recipe.seed)),
    ]
    return _table(("", ""), rows)


def _check(check: Mapping[str, Any]) -> str:
    rows = [(f"`{name}`", _text(value)) for name, value in _flat(check)]
    if not rows:
        return ""
    return f"Measured before the export was published, against the PyTorch student.\n\n{_table(('', ''), rows)}"


def _evaluation(source: FinishedRun) -> str:
    tables = [_result(path.stem, result) for path, result in _results(source)]
    return "\n\n".join(tables) or "The run has no evaluation of these weights, so its quality is not stated."


def _results(source: FinishedRun) -> Iterator[tuple[Path, Result]]:
    """Yield each stored result of the run that is of its present weights."""
    digest = file_hash(weights_path(source.run))
    for path in sorted((source.run / "evaluation").glob("*.json")):
        result = results.read(path)
        if result is None:
            continue
        if json.loads(path.read_text()).get("of", {}).get("weights", {}).get("student") != digest:
            log.warning("%s: is of other weights than the run's; the card leaves it out", path)
            continue
        yield path, result


def _result(name: str, result: Result) -> str:
    rows = [row for row in result.rows if result.metric(row["metric"]).shown]
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    lines: dict[Any, dict[str, str]] = {}
    for row in rows:
        count = f" (n={row['count']})" if "count" in row else ""
        interval = f" [{row['low']:.4f}, {row['high']:.4f}]" if {"low", "high"} <= row.keys() else ""
        lines.setdefault(results.key(row), {})[row["subject"]] = f"{row['value']:.4f}{interval}{count}"
    table = [(results.shown(key), *(cells.get(subject, "") for subject in subjects)) for key, cells in lines.items()]
    settings = _component({"name": result.protocol.get("name", name), **result.protocol})
    return f"Protocol `{name}`: {settings}\n\n{_table(('Metric', *subjects), table)}"


def _limits(source: FinishedRun) -> str:
    whole, family = source.is_whole, LIMITS.get(source.family, "")
    lines = [
        "The figures hold for the protocols and images named above; of images unlike those that it was trained on, "
        "nothing is known.",
        "" if whole else family if source.trained_head is None else OWN_DECODER,
        "" if whole else "The student imitates its teacher, with the teacher's errors and biases.",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _licences(source: FinishedRun) -> str:
    pretrained = source.recipe.student.get("pretrained", "none")
    start = "" if pretrained in ("none", "", None) else without_folders(pretrained)
    drawn = "drawn by fmdistill's own code, Apache-2.0" if source.recipe.images.get("name") in DRAWN else NOT_STATED
    rows = [("The student's weights", source.license or NOT_STATED)]
    rows += [("The teacher's weights", _teacher(source.recipe.teacher))] if source.recipe.teacher else []
    rows += [(f"The weights that the student started from, {start}", NOT_STATED)] if start else []
    rows += [("The training images", source.images_license or drawn)]
    return _table(("", "Licence"), rows)


def _teacher(teacher: Mapping[str, Any]) -> str:
    """Return the licence of the teacher's published weights; nobody stated that of other weights."""
    if teacher.get("name") == "open_clip":
        return "MIT (OpenAI's CLIP)" if teacher.get("pretrained") == "openai" else NOT_STATED
    if str(teacher.get("name")).endswith("_mini") and teacher.get("weights", "packaged") != "packaged":
        return NOT_STATED
    return TEACHER_LICENCES.get(str(teacher.get("name")), NOT_STATED)


def _files(folder: Path) -> str:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / NAME]
    return _table(
        ("File", "Bytes"), [(f"`{path.relative_to(folder).as_posix()}`", f"{path.stat().st_size:,}") for path in paths]
    )


def _component(settings: Mapping[str, Any] | None) -> str:
    """Return a component of a recipe as text, its name first; its paths without their folders, which are private."""
    if not settings:
        return NOT_STATED
    public = without_folders(dict(settings))
    name = public.pop("name", None)
    listed = ", ".join(f"{key} {_text(value)}" for key, value in public.items() if value not in (None, {}, []))
    return ": ".join(filter(None, [f"`{name}`" if name else "", listed]))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
