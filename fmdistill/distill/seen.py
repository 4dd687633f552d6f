"""What an objective sees of a batch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmdistill.registry import UserError, suggest


@dataclass(frozen=True)
class Seen:
    """The named outputs of student and teachers, such as "student.embedding" and "sam.embedding", and what is valid.

    `valid` is (B, N) bool for maps of N patches: true where a patch holds any real pixel; None where no output is a
    map. `output` is the output that the asking term compares. `whole` holds the teachers' vectors (G, D) of the whole
    optimizer step's G images, over processes and accumulation.
    """

    outputs: Mapping[str, Tensor]
    valid: Tensor | None = None
    output: str = ""
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def focus(self, output: str, padding: str) -> "Seen":
        """Return the view of one term: its output, and with padding "include" every patch valid."""
        valid = self.valid if padding == "exclude" or self.valid is None else torch.ones_like(self.valid)
        return dataclasses.replace(self, output=output, valid=valid)

    def pair(self, output: str) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's `output`; "embedding" where one teacher has it, or "sam.embedding"."""
        _, _, short = output.rpartition(".")
        if f"student.{short}" not in self.outputs:
            raise UserError(
                f"output={output}: the student has none.{suggest(output, self._names('student.'))} "
                f"Choose one of these, or a student that makes it"
            )
        return self.outputs[f"student.{short}"], self.teacher(output)

    def teacher(self, output: str) -> Tensor:
        """Return the teachers' `output`, (B, C) or (B, C, H, W)."""
        return self.outputs[self._teacher_name(output)]

    def whole_teacher(self, output: str) -> Tensor:
        """Return the teachers' vectors `output` of the whole optimizer step, (G, D)."""
        name = self._teacher_name(output)
        assert name in self.whole, f"the loop shares no {name}"
        return self.whole[name]

    def _teacher_name(self, output: str) -> str:
        names = [n for n in self.outputs if not n.startswith("student.") and (n == output or n.endswith(f".{output}"))]
        if len(names) != 1:
            others = [n for n in self.outputs if not n.startswith("student.")]
            raise UserError(f"output={output}: {len(names)} teacher outputs match.{suggest(output, others)}")
        return names[0]

    def _names(self, prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in self.outputs if name.startswith(prefix)]
