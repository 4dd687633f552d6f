"""What an objective sees of a batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmdistill.registry import UserError, suggest


@dataclass(frozen=True)
class Seen:
    """The named outputs of student and teachers, such as "student.embedding" and "sam.embedding", and what is valid.

    `grids` holds, for each teacher output that is a map, (B, N) bool: true where a patch holds any real pixel. In the
    view of one term `output` is the output that it compares and `valid` its grid, all true if padding is included; None
    for vectors. `similarity` holds the SRW similarities (B, 2, g, g) that a cache stores, by the name of their map.
    `whole` holds the teachers' vectors
    (G, D) of the whole optimizer step's G images, over processes and accumulation. `label` is (B,) int64, -1 for
    an image without one, None if none has one; `label_values` are the same on the CPU, so that looking at them makes no
    GPU wait; `keys` are the images' keys; `epoch` is how many epochs are done, with its fraction, None outside of
    training.
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

    @property
    def labelled(self) -> int:
        """How many images have a label."""
        return sum(value >= 0 for value in self.label_values)

    def focus(self, output: str, padding: str) -> "Seen":
        """Return the view of one term: its output and its grid, of which padding "include" makes every patch valid."""
        valid = next((grid for name, grid in self.grids.items() if _is_called(name, output)), None)
        if valid is not None and padding == "include":
            valid = torch.ones_like(valid)
        return dataclasses.replace(self, output=output, valid=valid)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's output that the term compares, in float32 or better."""
        return self.student(), exact(self.teacher(self.output))

    def student(self, output: str | None = None) -> Tensor:
        """Return the student's `output`, by default the term's, in float32 or better; "sam.x" asks for "x"."""
        asked = self.output if output is None else output
        short = asked.rpartition(".")[2]
        if f"student.{short}" not in self.outputs:
            raise UserError(
                f"output={asked}: the student has none.{suggest(asked, self._names('student.'))} "
                f"Choose one of these, or a student that makes it"
            )
        return exact(self.outputs[f"student.{short}"])

    def teacher(self, output: str) -> Tensor:
        """Return the teachers' `output`, (B, C) or (B, C, H, W): "embedding" where one has it, or "sam.embedding"."""
        return self.outputs[self._teacher_name(output)]

    def labels(self, asking: str) -> Tensor:
        """Return the images' labels (B,) int64. UserError that names who is `asking` and an image without a label.

        Also for a label that is not one of the student's classes.
        """
        if self.label is None or self.labelled < len(self.label_values):
            without = [key for key, value in zip(self.keys, self.label_values, strict=False) if value < 0]
            image = f"image '{without[0]}' carries" if without else "these images carry"
            raise UserError(
                f"{asking}: learns from labels, and {image} none; use a source that gives each image one, such as "
                f"image_classes, cifar100 or digits, or leave this image out"
            )
        logits = self.outputs.get("student.logits")
        if logits is not None and max(self.label_values, default=0) >= logits.shape[1]:
            key, value = max(zip(self.keys, self.label_values, strict=True), key=lambda pair: pair[1])
            raise UserError(
                f"{asking}: image '{key}' has the label {value}, and the student makes logits of {logits.shape[1]} "
                f"classes, from 0 to {logits.shape[1] - 1}; choose a student of the images' classes"
            )
        return self.label

    def whole_teacher(self, output: str) -> Tensor:
        """Return the teachers' vectors `output` of the whole optimizer step, (G, D)."""
        name = self._teacher_name(output)
        assert name in self.whole, f"the loop shares no {name}"
        return self.whole[name]

    def _teacher_name(self, output: str) -> str:
        return teacher_name(output, self.outputs)

    def _names(self, prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in self.outputs if name.startswith(prefix)]


def teacher_name(output: str, names: Mapping[str, object]) -> str:
    """Return the one of `names` that is a teacher's `output`. UserError where none or several match."""
    others = [name for name in names if not name.startswith("student.")]
    matching = [name for name in others if _is_called(name, output)]
    if len(matching) != 1:
        raise UserError(f"output={output}: {len(matching)} teacher outputs match.{suggest(output, others)}")
    return matching[0]


def _is_called(name: str, output: str) -> bool:
    """Return whether `output`, with or without a teacher's prefix, means the teacher output called `name`."""
    return name == output or name.endswith(f".{output}")


def exact(output: Tensor) -> Tensor:
    """Return `output` in float32 or better."""
    return output.to(torch.promote_types(output.dtype, torch.float32))
