"""What is annotated on images: instances from COCO's, LVIS's or SA-1B's JSON, label maps, or the teacher's masks."""

from collections.abc import Sequence
from typing import Any, Protocol

from fmdistill.evaluate.truth.instances import JoinedTruth
from fmdistill.recipe import Component
from fmdistill.registry import bind

TRUTHS: dict[str, Any] = {
    "coco": "fmdistill.evaluate.truth.coco:CocoTruth",
    "lvis": "fmdistill.evaluate.truth.coco:LvisTruth",
    "sa1b": "fmdistill.evaluate.truth.sa1b:Sa1bTruth",
    "labels": "fmdistill.evaluate.truth.label_maps:LabelMaps",
    "teacher": "fmdistill.evaluate.truth.teacher_masks:TeacherMasks",
}


class Truth(Protocol):
    """A frozen dataclass whose fields are its settings; `annotations` is its file or folder, "" for none."""

    def check(self) -> None:
        """Raise a UserError if a setting is wrong, or a file or folder is missing; nothing is read."""
        ...

    def join(self, names: Sequence[str]) -> JoinedTruth:
        """Read the annotations and join them with images, SHARD/KEY each, by the keys. Raises UserError if none fit."""
        ...


def build(settings: Component, annotations: str | None = None) -> Truth:
    """Return the truth that a protocol names; `annotations` replaces its file or folder. Nothing is read yet."""
    merged = settings if annotations is None else {**settings, "annotations": annotations}
    return bind(merged, TRUTHS, "truth")()
