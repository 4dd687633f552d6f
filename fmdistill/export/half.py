"""Write a student alone, in half precision: the format of the packaged sam_mini."""

from pathlib import Path

from safetensors.torch import save
from torch import nn

from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole


def run(source: FinishedRun, out: Path) -> Path:
    """Write the student's weights in float16, as a safetensors file."""
    if source.has_own_head:
        source.leave_out_correction(out)
    return export(source.student, out)


def export(student: nn.Module, out: Path) -> Path:
    """Write the student's own state dict as float16 safetensors to `out` and return it."""
    state = {name: tensor.detach().cpu() for name, tensor in student.state_dict().items()}
    half = {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in state.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, save(half))
    return out
