"""Train a SAM student by its masks: the second stage, which reads the same cache as the first; task `refine`."""

# Legend: B images, P prompts an image, N = B P prompts, M masks of a prompt, T tokens of a prompt, C channels,
# g tokens a side, n = 4 g the low resolution, R rounds of corrections, Q = P (R + 1) answers, K = Q M masks.

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmdistill import teachers
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache import finished
from fmdistill.cache.batch import Batch
from fmdistill.cache.dataset import CachedImages
from fmdistill.distill import objective, prompts
from fmdistill.distill import provider as providers
from fmdistill.distill.job import Job
from fmdistill.distill.objective import Objective
from fmdistill.distill.prompts import BOX, DRAWS, FIRST_ROUND, Answers, PromptedImages, Prompts
from fmdistill.distill.seen import Seen
from fmdistill.distill.student import own_head
from fmdistill.distill.tasks import Distill, distill_job
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.teachers.family import Preprocess
from fmdistill.teachers.output import Output

# outputs for an objective's terms, and the cells that hold real pixels
MASKS, PATCHES, TOKENS, IOU, CELLS = "masks", "mask_patches", "mask_tokens", "mask_iou", "cells"
WHOLE_MASKS = (MASKS, TOKENS, IOU)  # those with one value for each mask, which is no place in the image


@dataclass(frozen=True)
class Prompting:
    """What is asked of teacher and student: the settings of task `refine`."""

    prompts: int = 16  # prompts of an image
    boxes: float = 0.5  # share of them that are boxes of the teacher's masks; the others are points
    rounds: int = 1  # corrective points that follow, each where the two disagree
    masks: Literal["all", "best"] = "all"  # all four masks of an answer, or the best by the teacher's predicted IoU
    candidates: int = 1  # points drawn for each prompt, of which small masks are chosen by `small`
    small: float = 0.0  # a candidate is chosen in proportion to its mask's area^-small
    head: Literal["frozen", "trained"] = "frozen"  # whether the run trains a mask decoder of its own

    def __post_init__(self) -> None:
        for name in ("prompts", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"task.{name}={getattr(self, name)}: expected at least 1")
        if self.rounds < 0:
            raise UserError(f"task.rounds={self.rounds}: expected 0 or more corrective points")
        if not 0 <= self.boxes <= 1:
            raise UserError(f"task.boxes={self.boxes}: expected a share of the prompts, from 0 to 1")
        if self.small < 0:
            raise UserError(f"task.small={self.small}: expected a power of the area, 0 for no preference")
        if (self.candidates > 1) != (self.small > 0):
            raise UserError(
                f"task.candidates={self.candidates}, task.small={self.small}: each is ignored without the other; set "
                f"both, such as candidates=2 and small=0.5, or neither"
            )


def refine(
    recipe: Recipe,
    prompts: int = 16,
    boxes: float = 0.5,
    rounds: int = 1,
    masks: Literal["all", "best"] = "all",
    candidates: int = 1,
    small: float = 0.0,
    head: Literal["frozen", "trained"] = "frozen",
) -> Job:
    """Train a student by the masks that its embedding gives, against those of its teacher's cached embedding.

    Of an image's `prompts`, a share `boxes` are boxes of the teacher's masks, the others are random points; `rounds`
    corrective points follow, each where the two masks disagree. `masks` says which of an answer are compared: "all"
    four, or the "best" by the teacher's predicted IoU. With `candidates` points for each prompt, those of small masks
    are preferred, in proportion to area^-`small`. `head=trained` trains a mask decoder too, which the run then keeps.
    """
    settings = Prompting(prompts, boxes, rounds, masks, candidates, small, head)
    provider = providers.build(recipe)
    assert provider.cache is not None, "checked by `check`"
    teacher_head = provider.cache.head()

    def task(student: nn.Module, objective: Objective, preprocess: Preprocess, outputs: Mapping[str, Output]) -> Refine:
        if settings.head == "trained" and own_head(student) is None:
            student.prompt_head = copy.deepcopy(teacher_head)
        return Refine(student, objective, preprocess, outputs, teacher_head, settings)

    drawn = settings.prompts * settings.candidates
    parts: dict[str, Any] = {
        split: PromptedImages(images, drawn, settings.rounds, recipe.seed)
        for split, images in (("train", provider.train), ("validation", provider.validation))
        if isinstance(images, CachedImages)
    }
    return distill_job(recipe, replace(provider, **parts), task)


def check(recipe: Recipe, settings: Mapping[str, Any]) -> None:
    """Raise a UserError if the task cannot train this recipe, without touching data."""
    Prompting(**settings)
    if recipe.teacher is None or recipe.cache is None or finished.is_live(recipe.teacher):
        raise UserError(
            "task.name=refine: decodes the teacher's cached embeddings with its mask decoder; it needs a `teacher` and "
            "a `cache`, and no teacher.live"
        )
    if not teachers.may_belong_to(recipe.teacher, "sam"):
        raise UserError(
            f"teacher.name={recipe.teacher.get('name')}: is no SAM, and task refine trains by masks; use a teacher of "
            "the family sam, or task distill"
        )
    if recipe.cache.trim:
        raise UserError(
            "cache.trim=true: stores no padded tokens, but the mask decoder of task refine reads all of them; set "
            "cache.trim=false, in another cache.root=FOLDER if that cache is trimmed already"
        )
    if not mask_terms(recipe):
        raise UserError(
            f"task.name=refine: no term of the objective has output={MASKS}, {PATCHES}, {TOKENS} or {IOU}, so no mask "
            "would be compared; add one, such as objective.masks={output: masks, distance: {name: mask}, weighting: "
            "{name: uniform}}, or use task distill"
        )


def mask_terms(recipe: Recipe) -> list[str]:
    """Return the names of the objective's terms that compare masks."""
    terms = objective.check(recipe.objective).items() if recipe.objective else ()
    return [name for name, term in terms if term.output in (MASKS, PATCHES, TOKENS, IOU)]


class Refine(Distill):
    """Student and objective, which sees the masks of both embeddings for the same prompts.

    To the outputs of `Distill` it adds, for the Q answers to an image's prompts in all rounds, K = Q M masks:
    "masks", logits (B, K, n, n) of student and teacher; the same as "mask_patches", whose padding is known;
    "mask_tokens" (B, C, Q, M), from which the masks are made; "mask_iou" (B, 1, Q, M), the predicted IoU, by which a
    mask is chosen; and "cells", bool (B, n, n), the cells of the masks that hold any real pixel. The teacher's head is
    outside of the state and of the optimizer.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        preprocess: Preprocess,
        outputs: Mapping[str, Output],
        teacher_head: PromptHead,
        prompting: Prompting,
    ) -> None:
        super().__init__(student, objective, preprocess, outputs)
        self.prompting, self._teacher_head = prompting, (teacher_head.eval().requires_grad_(False),)
        if (own := own_head(self.student)) is not None:
            own.requires_grad_(prompting.head == "trained")
            own.prompt_encoder.requires_grad_(False)
            # what no loss is of: a parameter without a gradient would stop several processes
            decoder, compared = own.mask_decoder, {term.settings.output for _, term in self.objective.items()}
            if IOU not in compared:
                decoder.iou_prediction_head.requires_grad_(False)
            if not compared & {MASKS, PATCHES}:
                decoder.output_upscaling.requires_grad_(False)
                decoder.output_hypernetworks_mlps.requires_grad_(False)

    def see(self, batch: Batch) -> Seen:
        """Return what the objective sees of a batch, with the masks of its prompts.

        The prompts of a batch without random numbers, such as one of a report's images, depend on its keys alone.
        """
        if DRAWS not in batch:
            batch = self._with_draws(batch)
        seen, sizes = super().see(batch), batch["sizes"]
        (family,) = {name.partition(".")[0] for name in self.outputs}
        pairs = self._answers(seen.outputs["student.embedding"], seen.teacher("embedding"), batch)
        compared = [self._compared(teacher) for _, teacher in pairs]

        def joined(values: list[Tensor]) -> Tensor:
            """Return the compared entries of all rounds, (B, Q, M, ...)."""
            parts = [prompts.taken(v, chosen) for v, chosen in zip(values, compared, strict=True)]
            return torch.cat([part.unflatten(0, (len(sizes), -1)) for part in parts], 1)

        outputs = dict(seen.outputs)
        for name, answers in (("student", [pair[0] for pair in pairs]), (family, [pair[1] for pair in pairs])):
            logits_BKnn = joined([answer.logits for answer in answers]).flatten(1, 2)
            tokens_BQMC = joined([answer.tokens for answer in answers])
            outputs |= {
                f"{name}.{MASKS}": logits_BKnn,
                f"{name}.{PATCHES}": logits_BKnn,
                f"{name}.{TOKENS}": tokens_BQMC.permute(0, 3, 1, 2),
                f"{name}.{IOU}": joined([answer.iou for answer in answers])[:, None],
            }
        outputs[f"{family}.{CELLS}"] = self._real(sizes, outputs[f"student.{MASKS}"].shape[-1])
        grids = {**seen.grids, f"{family}.{PATCHES}": self.preprocess.valid(sizes).flatten(1)}
        return replace(seen, outputs=outputs, grids=grids)

    def _with_draws(self, batch: Batch) -> Batch:
        drawn = self.prompting.prompts * self.prompting.candidates
        draws = [prompts.draw(key, drawn, self.prompting.rounds) for key in batch["keys"]]
        return {**batch, DRAWS: torch.stack(draws).to(batch["pixels"].device)}  # type: ignore[typeddict-unknown-key]

    def _compared(self, teacher: Answers) -> Tensor:
        if self.prompting.masks == "best":
            return teacher.best
        return torch.arange(teacher.iou.shape[1], device=teacher.iou.device).expand_as(teacher.iou)

    def _real(self, sizes: Tensor, side: int) -> Tensor:
        preprocess: Any = self.preprocess
        return preprocess.real_cells(sizes, side)

    def _answers(self, student_BCgg: Tensor, teacher_BCgg: Tensor, batch: Batch) -> list[tuple[Answers, Answers]]:
        """Return the student's and the teacher's answers to the prompts, and to those of each round of corrections."""
        teacher_head = self._teacher_head[0].to(teacher_BCgg)
        head = own_head(self.student) or teacher_head
        with torch.no_grad():
            request, draws_NX, known = self._first_prompts(teacher_head, teacher_BCgg, batch)
        pairs = []
        for number in range(self.prompting.rounds + 1):
            with torch.no_grad():
                teacher = known if number == 0 and known else Answers.ask(teacher_head, teacher_BCgg, request)
            student = Answers.ask(head, student_BCgg, request)
            pairs.append((student, teacher))
            if number < self.prompting.rounds:
                wanted_Nnn = teacher.mask(teacher.best)
                wrong_Nnn = student.mask(teacher.best) != wanted_Nnn
                real_Nnn = self._real(batch["sizes"], wanted_Nnn.shape[-1])
                real_Nnn = real_Nnn.repeat_interleave(self.prompting.prompts, 0)
                draw_N, step = draws_NX[:, FIRST_ROUND + number], self.preprocess.image_size / wanted_Nnn.shape[-1]
                request = request.plus(*prompts.corrections(wrong_Nnn, wanted_Nnn, real_Nnn, draw_N, step))
        return pairs

    def _first_prompts(
        self, head: PromptHead, teacher_BCgg: Tensor, batch: Batch
    ) -> tuple[Prompts, Tensor, Answers | None]:
        """Return the prompts of all images before any correction, their random numbers (N, X), and known answers.

        The teacher's answers are known if all prompts are the points for which they were decoded already.
        """
        settings, sizes = self.prompting, batch["sizes"]
        draws_BPX: Tensor = batch[DRAWS]  # type: ignore[literal-required]
        images, candidates, _ = draws_BPX.shape
        point_N12 = prompts.points(draws_BPX, sizes).flatten(0, 1)[:, None]
        label_N1 = torch.ones_like(point_N12[..., 0])
        no_box_N4, boxed_N = (
            point_N12.new_zeros(len(point_N12), 4),
            point_N12.new_zeros(len(point_N12), dtype=torch.bool),
        )
        answers = Answers.ask(head, teacher_BCgg, Prompts(point_N12, label_N1, no_box_N4, boxed_N))
        mask_Nnn = answers.mask(answers.best)
        mask_Nnn &= self._real(sizes, mask_Nnn.shape[-1]).repeat_interleave(candidates, 0)
        box_N4, has_box_N = prompts.boxes(mask_Nnn, self.preprocess.image_size / mask_Nnn.shape[-1])
        draws_NX = draws_BPX.flatten(0, 1)
        boxed_N = has_box_N & (draws_NX[:, BOX] < settings.boxes)
        if settings.candidates == 1:
            known = answers if settings.boxes == 0 else None
            return Prompts(point_N12, label_N1, box_N4, boxed_N), draws_NX, known
        area_BP = mask_Nnn.flatten(1).sum(1).view(images, candidates)
        chosen_BP = prompts.favour_small(draws_BPX, area_BP, settings.prompts, settings.small)
        first_B1 = torch.arange(images, device=chosen_BP.device)[:, None] * candidates
        rows_N = (chosen_BP + first_B1).flatten()
        request = Prompts(point_N12[rows_N], label_N1[rows_N], box_N4[rows_N], boxed_N[rows_N])
        return request, draws_NX[rows_N], None
