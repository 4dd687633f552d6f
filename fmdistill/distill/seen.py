"""A batch as the objective sees it: outputs of student and teachers, masks, labels, keys."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmdistill.registry import UserError, suggest


@dataclass(frozen=True)
class Seen:
    """The outputs of student and teachers for a batch, by names such as "student.embedding" and "sam.embedding".

    `grids` holds, for each teacher output that is a map, a bool mask (B, N): true if the patch holds any real pixel. In
    the view of one term, `output` is the output that it compares and `valid` that output's mask, all true if padding is
    included; None for vectors. `similarity` holds the SRW similarities (B, 2, g, g) that a cache stores, by the name of
    their map. `whole` holds the teachers' vectors (G, D) for the G images of the whole optimizer step, over processes
    and accumulation, and the student's that a term compares over the step, without gradient; `first` is the row of this
    batch's first image in them. `label` is (B,) int64, -1 for an image without a label, and None if no image has one;
    `label_values` are the same on the CPU, so that reading them makes no GPU wait. `keys` are the images' keys, and
    `epoch` is the number of epochs done, with its fraction; `progress` is the share of the run's steps done before this
    one, in [0, 1). Both are None outside of training.
    """

    outputs: Mapping[str, Tensor]
    valid: Tensor | None = None
    output: str = ""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    label: Tensor | None = None
    keys: Sequence[str] = ()
    epoch: float | None = None
    label_values: Sequence[int] = ()
    grids: Mapping[str, Tensor] = field(default_factory=dict)
    similarity: Mapping[str, Tensor] = field(default_factory=dict)
    progress: float | None = None
    first: int = 0

    @property
    def labelled(self) -> int:
        """Return the number of images with a label."""
        return sum(value >= 0 for value in self.label_values)

    def focus(self, output: str, padding: str) -> "Seen":
        """Return the view of a term that compares `output`; if `padding` is "include", all patches are valid."""
        valid = next((grid for name, grid in self.grids.items() if _matches(name, output)), None)
        if valid is not None and padding == "include":
            valid = torch.ones_like(valid)
        return dataclasses.replace(self, output=output, valid=valid)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's output that the term compares, in float32 or better."""
        return self.student(), at_least_float32(self.teacher(self.output))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Seen":
        """Return the view of a term with `function` applied to the two outputs that it compares."""
        names = f"student.{self.output.rpartition('.')[2]}", self._teacher_name(self.output)
        pair = zip(names, self.pair(), strict=True)
        return dataclasses.replace(self, outputs={**self.outputs, **{name: function(value) for name, value in pair}})

    def of_step(self) -> "Seen":
        """Return the view of a term over all G images of the optimizer step: outputs (G, D) instead of (B, D).

        The student's output is that of `whole`, with this batch's rows replaced by those that have a gradient. Their
        gradient is multiplied by the number of the step's batches, over whose losses the loop takes the mean: so each
        batch can have the loss of the whole step, and the step the gradient of one process with all its images. Keys
        and labels of the other images are not known, so the view has none if the step is divided.
        """
        own_BD, total = self.student(), len(self.whole_teacher(self.output))
        size, name = len(own_BD), f"student.{self.output.rpartition('.')[2]}"
        if size == total:
            return self
        assert name in self.whole, f"the loop does not share {name}"
        rows_BD = own_BD.view_as(own_BD)
        if rows_BD.requires_grad:
            rows_BD.register_hook(lambda gradient_BD: gradient_BD * (total // size))
        others_GD = at_least_float32(self.whole[name])
        every_GD = torch.cat([others_GD[: self.first], rows_BD, others_GD[self.first + size :]])
        outputs = {**self.whole, name: every_GD}
        return dataclasses.replace(self, outputs=outputs, first=0, keys=(), label=None, label_values=())

    def student(self, output: str | None = None) -> Tensor:
        """Return the student's `output`, by default the term's, in float32 or better.

        A teacher's prefix is ignored: "sam.x" means the student's "x". Raises UserError if the student lacks it.
        """
        name = self.output if output is None else output
        short = name.rpartition(".")[2]
        if f"student.{short}" not in self.outputs:
            raise UserError(
                f"output={name}: the student has no such output.{suggest(name, self._names('student.'))} "
                f"Choose one of these, or a student that has it"
            )
        return at_least_float32(self.outputs[f"student.{short}"])

    def teacher(self, output: str) -> Tensor:
        """Return the teacher's `output`, (B, C) or (B, C, H, W), named with its prefix ("sam.embedding") or without.

        Raises UserError if no output, or that of several teachers, has this name.
        """
        return self.outputs[self._teacher_name(output)]

    def labels(self, setting: str) -> Tensor:
        """Return the images' labels (B,) int64, for the setting or command `setting`.

        Raises UserError, which names `setting` and the image, if an image has no label or one that is not among the
        student's classes.
        """
        if self.label is None or self.labelled < len(self.label_values):
            without = [key for key, value in zip(self.keys, self.label_values, strict=False) if value < 0]
            images = f"image '{without[0]}' has" if without else "these images have"
            raise UserError(
                f"{setting}: learns from labels, but {images} none; use a source with a label for each image, such as "
                f"image_classes, cifar100 or digits, or leave this image out"
            )
        logits = self.outputs.get("student.logits")
        if logits is not None and max(self.label_values, default=0) >= logits.shape[1]:
            key, value = max(zip(self.keys, self.label_values, strict=True), key=lambda pair: pair[1])
            raise UserError(
                f"{setting}: image '{key}' has the label {value}, but the student's logits are of {logits.shape[1]} "
                f"classes, from 0 to {logits.shape[1] - 1}; choose a student with the images' classes"
            )
        return self.label

    def whole_teacher(self, output: str) -> Tensor:
        """Return the teacher's vectors `output` (G, D) for all images of the optimizer step."""
        name = self._teacher_name(output)
        assert name in self.whole, f"the loop does not share {name}"
        return self.whole[name]

    def _teacher_name(self, output: str) -> str:
        return teacher_name(output, self.outputs)

    def _names(self, prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in self.outputs if name.startswith(prefix)]


def teacher_name(output: str, names: Mapping[str, object]) -> str:
    """Return the name in `names` of the teacher output `output`. Raises UserError if none or several match."""
    teacher_names = [name for name in names if not name.startswith("student.")]
    matching = [name for name in teacher_names if _matches(name, output)]
    if len(matching) != 1:
        raise UserError(f"output={output}: {len(matching)} teacher outputs match.{suggest(output, teacher_names)}")
    return matching[0]


def _matches(name: str, output: str) -> bool:
    """Return whether `output`, with or without a teacher's prefix, names the teacher output `name`."""
    return name == output or name.endswith(f".{output}")


def at_least_float32(output: Tensor) -> Tensor:
    """Return `output` in float32 or better."""
    return output.to(torch.promote_types(output.dtype, torch.float32))
