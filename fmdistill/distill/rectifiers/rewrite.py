"""Put a rectified output in the place of the teacher's."""

import dataclasses

from torch import Tensor

from fmdistill.distill.seen import Seen, teacher_name


def rewrite(seen: Seen, output: Tensor) -> Seen:
    """Return what was seen with `output`, detached, in the place of the teacher's output that the term compares.

    The whole optimizer step's teacher vectors of that name go: those of the other images are not rectified; and the
    similarities that a cache keeps of a map, which are not those of the rectified one.
    """
    name = teacher_name(seen.output, seen.outputs)
    whole = {key: value for key, value in seen.whole.items() if key != name}
    similarity = {key: value for key, value in seen.similarity.items() if key != name}
    outputs = {**seen.outputs, name: output.detach()}
    return dataclasses.replace(seen, outputs=outputs, whole=whole, similarity=similarity)
