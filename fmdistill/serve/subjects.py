"""Open the runs that a page shows: their students, and the teacher, with its head and the preprocessing of all."""

# Legend: B images, S the square's side, C channels, g tokens a side, D a vector's width.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fmdistill import recipe as recipes
from fmdistill.backbones.clip import TextHead
from fmdistill.backbones.device import pick_device
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import Cache, open_cache
from fmdistill.distill import student as students
from fmdistill.evaluate.results import TEACHER
from fmdistill.evaluate.subjects import embed
from fmdistill.images import Decoding, build
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.report.named import open_teacher
from fmdistill.report.rows import Run, read_runs
from fmdistill.teachers.family import Preprocess, Teacher

Embed = Callable[[Tensor, Tensor], Tensor]  # uint8 (1, 3, S, S), sizes (1, 2) -> float32 (C, g, g) or (D,)
SMALL = 512  # pixels a side up to which a teacher is run once at the start, so that its first time is a usual one


@dataclass(frozen=True)
class Subject:
    """A network on the page, the teacher or a run's student; `embed` is None for a teacher that is not at hand."""

    name: str
    title: str
    embed: Embed | None
    parameters: int | None = None
    problem: str = ""  # why it is not at hand
    head: PromptHead | None = None  # on the device, of a student with a mask decoder of its own; else the teacher's


@dataclass(frozen=True)
class OpenedRuns:
    """What the runs share, and the networks to show by name, the teacher first."""

    family: str
    recipe: Recipe  # of the first run
    head: Any  # the teacher's, PromptHead or TextHead, on `device`
    preprocess: Preprocess
    decoding: Decoding
    device: torch.device
    cache: Cache | None
    subjects: Mapping[str, Subject]
    recipes: Mapping[str, Recipe]  # of the runs by name


def open_runs(folders: Sequence[str], device: str = "auto", trust: bool = False) -> OpenedRuns:
    """Open finished runs that were distilled from one SAM or one CLIP; their teacher may be missing if it was cached.

    Code outside fmdistill is imported only with `trust`. Raises UserError if a run cannot be shown.
    """
    runs = read_runs(folders)
    for run in runs:  # before anything is loaded
        recipes.load_saved(run.folder, ["trust=true"] if trust else [])
        students.weights_path(run.folder)
    where, first = pick_device(device, "device"), runs[0]
    cache = _cache(first)
    teacher, problem = _teacher(first, cache)
    family, preprocess, head = _shared(first, cache, teacher, problem)
    for run in runs[1:]:
        _check_same(first, run)
    subjects = {TEACHER: _teacher_subject(first, teacher, problem)}
    for run in runs:
        model = students.load_student(run.folder, trust).to(where)
        own = students.detach_head(model)
        title = run.recipe.title or str(run.folder)
        subjects[run.name] = Subject(run.name, title, partial(_embed_by, model, preprocess), _count(model), head=own)
    opened = OpenedRuns(
        family,
        first.recipe,
        head.to(where),
        preprocess,
        build(first.recipe.images).decoding,
        where,
        cache,
        subjects,
        {run.name: run.recipe for run in runs},
    )
    _warm_up(opened)
    return opened


def expected_shape(head: Any) -> tuple[int, ...]:
    """Return the shape of the embedding that a head takes: (C, g, g) of a PromptHead, (D,) of a TextHead."""
    if isinstance(head, PromptHead):
        grid = head.config["image_embedding_size"]
        return head.config["embed_dim"], grid, grid
    return (head.config["model_cfg"]["embed_dim"],)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work, so that a clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache(run: Run) -> Cache | None:
    """Return the run's cache; None if it has none, or it is gone."""
    if run.recipe.cache is None:
        return None
    try:
        return open_cache(run.recipe)
    except UserError as error:
        log.warning("%s: its cache cannot be opened, so its teacher is needed: %s", run.folder, error)
        return None


def _teacher(run: Run, cache: Cache | None) -> tuple[Teacher | None, str]:
    """Return the run's teacher, or None and why it is not at hand."""
    try:
        return open_teacher(run.recipe, cache), ""
    except (UserError, OSError) as error:
        return None, str(error)


def _shared(
    run: Run, cache: Cache | None, teacher: Teacher | None, problem: str
) -> tuple[str, Preprocess, PromptHead | TextHead]:
    """Return family, preprocessing and head, of the cache if it is at hand. Raises UserError if neither is."""
    if cache is not None:
        family, preprocess = cache.family, cache.preprocess
        head = cache.head() if cache.record.head is not None else None
    elif teacher is not None:
        family, preprocess, head = teacher.family, teacher.preprocess, teacher.head()
    else:
        raise UserError(
            f"{run.folder}: neither its cache nor its teacher is at hand ({problem}); serve shows runs that were "
            f"distilled from a SAM or a CLIP"
        )
    if not isinstance(head, PromptHead | TextHead):
        raise UserError(
            f"{run.folder}: its teacher is of the family '{family}'; serve shows the masks of a SAM's students and "
            f"the scores of a CLIP's"
        )
    return family, preprocess, head.eval()


def _check_same(first: Run, run: Run) -> None:
    """Raise a UserError unless two runs have the same teacher."""
    if run.recipe.cache == first.recipe.cache and run.recipe.teacher == first.recipe.teacher:
        return
    settings = [_what_determines(each.recipe.teacher) for each in (first, run)]
    if settings[0] != settings[1]:
        raise UserError(
            f"{run.folder}: was distilled from another teacher ({(run.recipe.teacher or {}).get('name', 'none')}) than "
            f"{first.folder} ({(first.recipe.teacher or {}).get('name', 'none')}); serve them by two commands"
        )


def _what_determines(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a recipe's teacher settings without those that do not change its network."""
    return {k: v for k, v in (settings or {}).items() if k not in ("batch", "workers", "device", "dtype", "live")}


def _teacher_subject(run: Run, teacher: Teacher | None, problem: str) -> Subject:
    title = str((run.recipe.teacher or {}).get("name", "unknown"))
    if teacher is None:
        log.warning("the teacher is not at hand, only its cached embeddings: %s", problem)
        return Subject(TEACHER, title, None, problem=problem)
    network = getattr(teacher, "encoder", getattr(teacher, "visual", None))
    return Subject(TEACHER, title, partial(_embed_by_teacher, teacher), _count(network))


def _embed_by(model: nn.Module, preprocess: Preprocess, pixels: Tensor, sizes: Tensor) -> Tensor:
    return embed(model, preprocess, pixels, sizes)[0]


def _embed_by_teacher(teacher: Teacher, pixels: Tensor, sizes: Tensor) -> Tensor:
    return teacher(pixels, sizes)["embedding"][0]


def _count(model: Any) -> int | None:
    return sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else None


def _warm_up(opened: OpenedRuns) -> None:
    """Run each network once, and raise a UserError if its embedding is not of the shape that the head takes."""
    side, expected = opened.preprocess.image_size, expected_shape(opened.head)
    pixels, sizes = torch.zeros(1, 3, side, side, dtype=torch.uint8), torch.tensor([[side, side]])
    for subject in opened.subjects.values():
        if subject.embed is None or (subject.name == TEACHER and side > SMALL and opened.device.type == "cpu"):
            continue
        shape = tuple(subject.embed(pixels, sizes).shape)
        if shape != expected:
            raise UserError(
                f"{subject.name}: gives an embedding of {shape}, but the teacher's head takes {expected}; serve a "
                f"student of the teacher's own embedding"
            )
