"""What an export is made from: a finished run's recipe, student and head, and what its cache stores of the teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from fmdistill import __version__
from fmdistill import recipe as recipes
from fmdistill.backbones.clip import TextHead, WholeClip
from fmdistill.backbones.iou_correction import IouCorrection
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import manifest
from fmdistill.cache.store import opened
from fmdistill.distill.student import WEIGHTS, detach_head, load_student
from fmdistill.logs import log
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers import family_of_cache
from fmdistill.teachers.family import Preprocess

OWN = {"single": "sam", "points": "sam", "min_miou": "sam", "min_cosine": "clip"}  # settings of one family alone


@dataclass(frozen=True)
class FinishedRun:
    """A finished run to export; `student` is in eval mode on the CPU."""

    run: Path
    recipe: Recipe
    student: nn.Module
    license: str = ""  # of the student's weights, as the user states it for the model card: "apache-2.0"
    images_license: str = ""  # of the training images
    trained_head: PromptHead | None = None  # the mask decoder that was trained with the student; None for the teacher's

    @classmethod
    def of(cls, run: str | Path, trust: bool = False, license: str = "", images_license: str = "") -> "FinishedRun":
        """Open a finished run. `trust` allows its recipe to name code outside fmdistill."""
        recipe = recipes.load_saved(run, ["trust=true"] if trust else [])
        student = load_student(run, trust)
        trained_head = detach_head(student)  # so that `student` is an image encoder for every format
        return cls(Path(run), recipe, student, license, images_license, trained_head)

    @property
    def is_whole(self) -> bool:
        """Whether the student is a whole CLIP, or a whole SAM that was trained without a teacher, as sam_mini is."""
        sam = isinstance(getattr(self.student, "head", None), PromptHead) and self.recipe.cache is None
        return sam or isinstance(self.student, WholeClip)

    @property
    def family(self) -> str:
        """The student's family: its own, or the teacher's from the cache's manifest, which needs no images."""
        if self.is_whole:
            return "clip" if isinstance(self.student, WholeClip) else "sam"
        return self._manifest["family"]

    @property
    def preprocess(self) -> Preprocess:
        """The student's preprocessing: its own, or the teacher's."""
        if self.is_whole:
            return self.student.preprocess  # type: ignore[return-value]
        family = family_of_cache(self.family, self.recipe.teacher)
        return family.preprocess.from_json(self._manifest["teacher"]["preprocess"])

    def head(self) -> Any:
        """Return a PromptHead or a TextHead: the student's own, or the teacher's, which the cache stores.

        A PromptHead predicts corrected IoU if the run stores a correction. Raises UserError if the teacher has none.
        """
        head = self._head()
        if isinstance(head, PromptHead) and self.correction is not None:
            self.correction.apply(head)
        return head

    @cached_property
    def correction(self) -> IouCorrection | None:
        """The correction of predicted IoU that the run stores, None without."""
        return IouCorrection.stored(self.run, self.run / WEIGHTS)

    def leave_out_correction(self, out: Path) -> None:
        """Warn that `out`, in a format of weights alone, does not hold the correction that the run stores, if any."""
        if self.correction is not None:
            log.warning(
                "%s: predicts IoU without the correction that the run stores, which the format cannot hold; the order "
                "of a prompt's masks is the same, but thresholds mean something else", out,
            )  # fmt: skip

    def _head(self) -> Any:
        if self.trained_head is not None:
            return self.trained_head
        if self.is_whole:
            student: Any = self.student
            if isinstance(student, WholeClip):
                return TextHead.from_clip(student.whole(), student.config)
            return student.head
        record = family_of_cache(self.family, self.recipe.teacher)
        if record.head is None:
            raise UserError(f"{self.recipe.out}: its teacher is of the family '{self.family}', which has no head")
        return record.head.load(self._folder)

    def to_json(self) -> dict[str, Any]:
        """Return what an exported folder's JSON says of the run."""
        return {
            "fmdistill": __version__,
            "title": self.recipe.title,
            "seed": self.recipe.seed,
            "steps": self.recipe.train.steps,
            "student": without_folders(dict(self.recipe.student)),
            "teacher": without_folders(dict(self.recipe.teacher or {})),
            **({"own_head": True} if self.trained_head is not None else {}),
        }

    @cached_property
    def _folder(self) -> Path:
        if self.recipe.cache is None:
            raise UserError(
                f"{self.recipe.out}: its recipe has no `cache`, where the teacher's head and preprocessing are stored; "
                f"set cache.root"
            )
        return opened(self.recipe.cache).folder  # not by the cache's reader, which needs the images

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        return manifest.read(self._folder)


def check_family(source: FinishedRun, format: str, settings: Mapping[str, Any]) -> str:
    """Return the family, "sam" or "clip", of a run for a format of both.

    `settings` are the format's by name, None if not set. Raises UserError for another family, and for a setting of the
    other one.
    """
    family = source.family
    if family not in OWN.values():
        raise UserError(
            f"export {format}: {source.recipe.out} was distilled from the family '{family}'; {format} exports students "
            f"of sam and clip"
        )
    for setting, value in settings.items():
        if value is not None and OWN[setting] != family:
            raise UserError(
                f"export.{setting}={value}: is a setting of {OWN[setting]} students, and {source.recipe.out} is one of "
                f"{family}; leave it out"
            )
    return family


def without_folders(value: Any) -> Any:
    """Return settings with each path's last part only: folders of the author's machine do not belong in what is shared.

    A text is a path if it is absolute or begins with ~, ./ or ../. Of a URL, which may hold a password, the same part
    remains.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        return PurePath(urlsplit(value).path).name
    scheme, colon, rest = value.partition(":")
    if colon and scheme == "local-dir":
        return f"{scheme}:{without_folders(rest)}"
    return PurePath(value).name if value.startswith(("/", "~", "./", "../")) else value
