"""Write a student in half precision, without its teacher's head: the format of the packaged sam_mini."""

from pathlib import Path

from safetensors.torch import save
from torch import nn

from fmdistill.backbones.promptable import PromptHead
from fmdistill.distill.student import PROMPT_HEAD, save_sizes
from fmdistill.export.source import FinishedRun
from fmdistill.files import write_whole


def run(source: FinishedRun, out: Path) -> Path:
    """Write the student's weights in float16, as a safetensors file, with a mask decoder that the run trained."""
    if source.is_whole or source.trained_head is not None:
        source.leave_out_correction(out)
    return export(source.student, out, source.trained_head)


def export(student: nn.Module, out: Path, trained_head: PromptHead | None = None) -> Path:
    """Write the student's own state dict as float16 safetensors to `out` and return it.

    It includes the mask decoder that was trained with the student, if any; a file beside it states the decoder's sizes.
    """
    state = {name: tensor.detach().cpu() for name, tensor in student.state_dict().items()}
    if trained_head is not None:
        state |= {f"{PROMPT_HEAD}.{name}": value.detach().cpu() for name, value in trained_head.state_dict().items()}
    half = {name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in state.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    if trained_head is not None:
        save_sizes(trained_head, out.parent)
    write_whole(out, save(half))
    return out
