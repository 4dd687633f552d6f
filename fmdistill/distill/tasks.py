"""Tasks: the one module that the engine wraps. A task turns a batch into named losses; a job adds its data."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fmdistill import recipe as recipes
from fmdistill.backbones.class_preprocess import ClassPreprocess
from fmdistill.backbones.classifiers import Classifier
from fmdistill.cache.batch import Batch
from fmdistill.distill import checkpoint, joined, targets
from fmdistill.distill import provider as providers
from fmdistill.distill import student as students
from fmdistill.distill.job import Job
from fmdistill.distill.objective import Objective, needs_logit_scale, needs_priors
from fmdistill.distill.plain import Augment
from fmdistill.distill.provider import Provider
from fmdistill.distill.seen import Seen, at_least_float32
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError, bind
from fmdistill.several import by_teacher
from fmdistill.teachers.family import Preprocess
from fmdistill.teachers.output import Output, Shape

CIFAR = "cifar100"  # statistics of the pixels, unless a recipe names others


class Distill(nn.Module):
    """Student and objective: the student imitates the teacher's outputs, learns the labels, or both."""

    def __init__(
        self, student: nn.Module, objective: Objective, preprocess: Preprocess, outputs: Mapping[str, Output]
    ) -> None:
        super().__init__()
        self.layout = memory_layout(student)
        self.student = student.to(memory_format=self.layout)
        self.objective, self.preprocess, self.outputs = objective, preprocess, outputs  # of the teacher, by name
        self.scales, self.folded = targets.teacher_scales(student, objective), False  # whether the student gives them

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss", each named term, each term's statistics} for a batch of images and teacher outputs.

        batch["whole"] holds the vectors of the whole optimizer step; without it the batch is the whole.
        With logits and labels, "accuracy" is the share of the labelled images whose label has the highest logit.
        """
        seen = self.see(batch)
        with torch.autocast(batch["pixels"].device.type, enabled=False):
            losses, statistics = self.objective(seen)
            if seen.label is not None and "student.logits" in seen.outputs:
                right_B = seen.student("logits").argmax(1) == seen.label  # never without a label, which is -1
                statistics["accuracy"] = right_B.float().sum() / seen.labelled
            return {"loss": torch.stack(list(losses.values())).sum(), **losses, **statistics}

    def see(self, batch: Batch) -> Seen:
        """Return what the objective sees of a batch."""
        sizes, made = batch["sizes"], self.student(self._image(batch))
        student = {f"student.{name}": self._scaled(name, value) for name, value in made.items()}
        teacher = {name: value for name, value in batch["outputs"].items() if self.outputs[name].of is None}
        label_values = batch["label_values"]
        return Seen(
            outputs={**student, **teacher},
            whole=batch.get("whole") or vectors(batch),
            first=batch.get("first", 0),
            label=batch["labels"] if any(value >= 0 for value in label_values) else None,
            keys=batch["keys"],
            epoch=batch.get("epoch"),
            progress=batch.get("progress"),
            label_values=label_values,
            grids={name: self._grid(name, value, sizes) for name, value in teacher.items() if value.dim() > 2},
            similarity={of: batch["outputs"][name] for name, output in self.outputs.items() if (of := output.of)},
        )

    @torch.no_grad()
    def shared(self, batch: Batch) -> dict[str, Tensor]:
        """Return the vectors (B, D) of a batch that the whole optimizer step shares, by the names of `Seen`.

        They are the teacher's, and the student's that a term compares over the step. The latter take a forward pass
        more, unless the batch is the whole step. It is computed as in training, but leaves the student's buffers, such
        as BatchNorm's statistics, as they were.
        """
        names = self.objective.step_outputs
        if not names or batch.get("parts", 1) == 1:
            return vectors(batch)
        buffers = {name: value.clone() for name, value in self.student.named_buffers()}
        made = torch.func.functional_call(self.student, buffers, (self._image(batch),))
        own = {f"student.{name}": self._scaled(name, value) for name, value in made.items() if name in names}
        return {**vectors(batch), **own}

    def fold(self) -> None:
        """Fold the teacher's scale into the student's last layers, if a term standardises its targets."""
        if not self.folded:
            for scale in self.scales.values():
                scale.fold()
        self.folded = True

    def _image(self, batch: Batch) -> Tensor:
        """Return the student's input (B, 3, S, S)."""
        image_BCHW = self.preprocess.normalize(batch["pixels"], batch["sizes"])
        return image_BCHW.contiguous(memory_format=self.layout)

    def _scaled(self, name: str, value: Tensor) -> Tensor:
        """Return a student's output on the teacher's scale."""
        if self.folded or name not in self.scales:
            return value
        with torch.autocast(value.device.type, enabled=False):
            return self.scales[name](at_least_float32(value))

    def _grid(self, name: str, map_BCgg: Tensor, sizes: Tensor) -> Tensor:
        """Return (B, N) bool: which patches of a teacher's map hold any real pixel."""
        if self.outputs[name].tokens == "image":
            return self.preprocess.valid(sizes).flatten(1)
        return torch.ones_like(map_BCgg[:, 0], dtype=torch.bool).flatten(1)


def memory_layout(student: nn.Module) -> torch.memory_format:
    """Return the memory format for training a student: channels last, which is faster on CPU and GPU, if it is safe.

    With channels last, the backward pass of a strided 1x1 convolution of fewer than 8 input channels writes past its
    buffer on CPUs that have AVX2 but not AVX-512 (oneDNN 3.12, in torch 2.14), and the process crashes.
    """
    convolutions = (module for module in student.modules() if isinstance(module, nn.Conv2d))
    narrow = any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 8 for c in convolutions)
    return torch.contiguous_format if narrow else torch.channels_last


def distill(recipe: Recipe) -> Job:
    """Distil the recipe's teacher, cached or live, into its student; several teachers into students of one trunk."""
    if recipe.teachers:
        return joined.join({name: distill(part) for name, part in by_teacher(recipe).items()})
    return distill_job(recipe, providers.build(recipe), Distill)


def distill_job(recipe: Recipe, provider: Provider, task: Callable[..., Distill]) -> Job:
    """Return the job of `task`, a Distill or a subclass, for the provider's teacher and the recipe's student."""
    student = students.build(recipe.student)
    _check_fit(student, provider, recipe)
    return _job(recipe, provider, student, task)


def classify(
    recipe: Recipe,
    statistics: str | None = None,
    crop: int = 0,
    flip: bool = False,
    resized_crop: bool = False,
) -> Job:
    """Train a classifier by labels, by a teacher's outputs, or both, as the objective's terms say.

    `statistics` names the mean and deviation of the pixels ("cifar100" if not given); a teacher's must agree. Anew for
    each epoch, `crop` shifts an image by at most so many pixels each way, `resized_crop` (ImageNet's augmentation) cuts
    out a part of any size, and `flip` mirrors every other image.
    """
    student = students.build(recipe.student)
    if not isinstance(student, Classifier):
        raise UserError(f"student.name={recipe.student['name']}: task classify trains a classifier, such as resnet20")
    own = ClassPreprocess.of(student.image_size, statistics or CIFAR)
    provider = providers.build(recipe, own, Augment(crop, flip, resized_crop))
    if provider.preprocess.image_size != student.image_size:
        raise UserError(
            f"student.name={recipe.student['name']}: sees {student.image_size} px, its teacher "
            f"{provider.preprocess.image_size} px; choose a student of the teacher's size"
        )
    if statistics is not None and _statistics(provider.preprocess) != _statistics(own):
        raise UserError(
            f"task.statistics={statistics}: the teacher's preprocessing has another mean and deviation, and decides; "
            f"leave task.statistics out, or set it to null"
        )
    return _job(recipe, provider, student)


def _statistics(preprocess: Preprocess) -> Any:
    return getattr(preprocess, "mean", None), getattr(preprocess, "std", None)


def _job(recipe: Recipe, provider: Provider, student: nn.Module, kind: Callable[..., Distill] = Distill) -> Job:
    shapes = {**_student_shapes(student, provider), **_shapes(provider)}
    priors = None
    if needs_priors(recipe.objective):
        if "student.logits" not in shapes:
            raise UserError(
                f"student.name={recipe.student['name']}: makes no logits, and a rectifier of the objective goes by the "
                f"frequencies of classes; use task classify, or leave the rectifier out"
            )
        priors = providers.priors(provider, shapes["student.logits"][0])
    gpu = recipe.train.device != "cpu" and torch.cuda.is_available()
    standardizers = targets.standardizers(recipe.objective, provider.cache, shapes, gpu)
    logit_scale = provider.logit_scale() if needs_logit_scale(recipe.objective) else None
    terms = Objective(recipe.objective, shapes, priors, standardizers, logit_scale)
    task = kind(student, terms, provider.preprocess, provider.outputs)
    targets.unfold_loaded(task.scales, student, recipe.student, recipe.seed)
    vector = any(output.is_vector for output in provider.outputs.values())
    shared = (task.shared if terms.step_outputs else vectors) if vector else None
    return Job(task, student, provider.train, provider.validation, shared, provider.complete, finish=task.fold)


def _shapes(provider: Provider) -> dict[str, Shape]:
    """Return the shape of each output of the teacher for one image."""
    return {name: output.shape for name, output in provider.outputs.items() if output.of is None}


@torch.no_grad()
def _student_shapes(student: nn.Module, provider: Provider) -> dict[str, Shape]:
    side = provider.preprocess.image_size
    training, device = student.training, next(student.parameters()).device
    outputs = student.eval()(torch.zeros(1, 3, side, side, device=device))
    student.train(training)
    return {f"student.{name}": tuple(value.shape[1:]) for name, value in outputs.items()}


def vectors(batch: Batch) -> dict[str, Tensor]:
    """Return the teachers' outputs that are one vector per image, (B, D) each: small enough to share."""
    return {name: output for name, output in batch["outputs"].items() if output.dim() == 2}


TASKS: dict[str, Callable[..., Job] | str] = {
    "distill": distill,
    "classify": classify,
    "refine": "fmdistill.distill.refine:refine",
    "promptable": "fmdistill.mini.promptable:promptable",
    "contrastive": "fmdistill.mini.contrastive:contrastive",
}
WITHOUT_TEACHER = ("promptable", "contrastive")  # tasks that learn from the images alone, by losses of their own


def check(recipe: Recipe) -> None:
    """Bind the task's settings and raise a UserError for what it would ignore, without touching data."""
    task = bind(recipe.task, TASKS, "task", context=("recipe",))
    if recipe.teachers and task.func is not distill:
        raise UserError(f"task.name={recipe.task['name']}: has one teacher or none; use task distill with `teachers`")
    _check_masks(recipe, task.keywords)
    if recipe.task["name"] in WITHOUT_TEACHER:
        for part in ("teacher", "cache", "objective"):
            if getattr(recipe, part):
                raise UserError(
                    f"{part}: task {recipe.task['name']} ignores it, since it learns from the images alone, by losses "
                    f"of its own; leave `{part}` out (as a setting, {part}=null)"
                )
    if task.func is classify:
        given = task.keywords
        augment = Augment(given.get("crop", 0), given.get("flip", False), given.get("resized_crop", False))
        providers.check(recipe, augment)
        statistics, teacher = given.get("statistics"), recipe.teacher or {}
        if statistics is not None and teacher.get("name") == "classifier":
            decided = teacher.get("statistics", CIFAR)
            if statistics != decided:
                raise UserError(
                    f"task.statistics={statistics}: ignored, since the teacher's preprocessing decides, and "
                    f"teacher.statistics={decided}; leave task.statistics out, or set both alike"
                )


def _check_masks(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    from fmdistill.distill import refine

    if recipe.task["name"] == "refine":
        refine.check(recipe, settings)
    elif names := refine.mask_terms(recipe):
        raise UserError(
            f"objective.{names[0]}.output={recipe.objective[names[0]]['output']}: only task refine makes masks, and "
            f"task.name={recipe.task['name']}; use task.name=refine"
        )


def build(recipe: Recipe) -> Job:
    """Return the recipe's job, its student's weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return bind(recipe.task, TASKS, "task", context=("recipe",))(recipe)


def open_task(run: str | Path, trust: bool = False) -> tuple[Job, Distill]:
    """Return a finished run's job, and its task with all that it learned, in eval mode on the CPU."""
    saved = recipes.load_saved(run, ["trust=true"] if trust else [])
    job = build(replace(saved, student={**saved.student, "pretrained": "none"}))
    if not isinstance(job.task, Distill) or not (Path(run) / students.WEIGHTS).is_file():
        raise UserError(f"{run}: not a finished run of task classify or distill, which has an objective to ask")
    student = students.load_student(run, trust)
    if (head := students.own_head(student)) is not None:
        setattr(job.student, students.PROMPT_HEAD, head)
    job.student.load_state_dict(student.state_dict())
    job.task.folded = True
    if job.task.objective.state_dict():
        path = checkpoint.learned(Path(run))
        prefix = "objective."
        try:
            learned = {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}
            job.task.objective.load_state_dict(learned)
        except (SafetensorError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: does not hold this run's objective ({reason}); train it anew") from None
    return job, job.task.eval()


def _check_fit(student: Any, provider: Provider, recipe: Recipe) -> None:
    image_size = provider.preprocess.image_size
    shape = next((shape for name, shape in _shapes(provider).items() if name.endswith(".embedding")), None)
    if shape is None:
        raise UserError(f"task.name=distill: {provider.source} has no embedding; use task classify for a classifier")
    try:
        student_size, channels = student.image_size, student.out_channels
    except AttributeError as error:
        raise UserError(
            f"student.name={recipe.student['name']}: {error}; a student states its image_size and out_channels"
        ) from None
    if (student_size, channels) != (image_size, shape[0]):
        kind = "dimensions" if len(shape) == 1 else "channels"
        raise UserError(
            f"student.name={recipe.student['name']}: makes {channels} {kind} at {student_size} px, but "
            f"{provider.source} has {shape[0]} {kind} at {image_size} px; choose a student of the teacher's size"
        )
