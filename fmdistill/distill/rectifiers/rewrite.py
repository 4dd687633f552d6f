"""Replace the teacher's output by a rectified one."""

import dataclasses

from torch import Tensor

from fmdistill.distill.seen import Seen, teacher_name


def replace_teacher_output(seen: Seen, output: Tensor) -> Seen:
    """Return `seen` with the teacher's output that the term compares replaced by `output`, detached.

    It drops what belongs to the unrectified output: the vectors of that name for the whole optimizer step, and the
    similarities that a cache stores for the map of that name.
    """
    name = teacher_name(seen.output, seen.outputs)
    whole = {key: value for key, value in seen.whole.items() if key != name}
    similarity = {key: value for key, value in seen.similarity.items() if key != name}
    outputs = {**seen.outputs, name: output.detach()}
    return dataclasses.replace(seen, outputs=outputs, whole=whole, similarity=similarity)
