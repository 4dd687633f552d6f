"""The objective: named terms, each rectify -> measure -> weight -> reduce; only the last step reduces."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.rectifiers import RECTIFIERS, Priors
from fmdistill.distill.seen import Seen, teacher_name
from fmdistill.distill.standardize import Standardizer
from fmdistill.distill.weightings import WEIGHTINGS, Learned
from fmdistill.distill.weightings.blend import Blend, bind_weighting, blended, check_values
from fmdistill.distill.weightings.regions import no_regions
from fmdistill.distill.weightings.uniform import Uniform
from fmdistill.logs import log
from fmdistill.registry import UserError, bind, complete, typed

Shape = tuple[int, ...]
SHAPES = ("student", "teacher", "shapes")  # arguments: shapes of one image's compared outputs, and of all by name


@dataclass(frozen=True)
class TermSettings:
    """One term of a recipe's objective."""

    distance: dict
    weighting: dict
    output: str = "embedding"
    rectify: dict | None = None
    padding: Literal["include", "exclude"] = "include"  # whether padded patches take part; the SRW paper includes them
    scale: float = 1.0
    warmup: float = 0.0  # epochs in which the scale rises linearly from zero
    # units in which the two are compared: the teacher's, or its statistics' (`distill.standardize`)
    standardize: Literal["none", "channel", "phi_s"] = "none"

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise UserError(f"objective: warmup={self.warmup}: expected a number of epochs, 0 for no warm-up")


class Term(nn.Module):
    """One weighted distance. Learned parts are submodules, so that the optimizer and checkpoints include them."""

    def __init__(
        self,
        settings: TermSettings,
        where: str,
        shapes: Mapping[str, Shape],
        priors: Priors | None = None,
        standardizer: Standardizer | None = None,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.standardizer = settings, standardizer
        distance, weighting, rectify, self.blend = _bound(settings, where)
        known = {"priors": priors, "logit_scale": logit_scale, **shapes_of(settings.output, shapes)}
        why = f": output={settings.output}. Known: {', '.join(sorted(shapes)) or 'none'}"
        self.rectify = rectify and complete(rectify, known, f"{where}.rectify", why)
        self.distance = complete(distance, known, f"{where}.distance", why)
        self.weighting = complete(weighting, known, f"{where}.weighting", why)
        self.weighting_setting, self.weights_checked = f"{where}.weighting={settings.weighting['name']}", False
        self.over_step = getattr(self.distance, "over_step", False)

    def forward(self, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the term's scalar loss and its statistics: effective sample size and largest weight."""
        distance, weight, seen = self.measure(seen)
        loss = self._scale(seen.epoch) * reduce(weight * distance, seen.valid)
        if isinstance(self.weighting, Learned):
            loss = loss + self.weighting.auxiliary(seen).mean()
        return loss, {
            "effective_sample_size": effective_sample_size(weight, seen.valid),
            "largest_weight": weight.max(),
        }

    def measure(self, seen: Seen) -> tuple[Tensor, Tensor, Seen]:
        """Return the distance and its weight, both (B,) or (B, N), and the rectified view they were computed from.

        The distance alone is of standardised outputs: the view and the weighting are on the teacher's own scale. Of a
        distance over the step, all three are of the step's images, (G,).
        """
        seen = self.focus(seen)
        seen = seen.of_step() if self.over_step else seen
        distance = self.distance(self.standardised(seen))
        if distance.dim() == 2 and (seen.valid is None or seen.valid.shape != distance.shape):
            if seen.valid is not None and not seen.valid.all():
                raise UserError(
                    f"objective: padding=exclude: output={self.settings.output} has {distance.shape[1]} patches per "
                    f"image, but padding is known for {seen.valid.shape[1]} patches; use padding=include, or an output "
                    f"on the teacher's grid"
                )
            seen = dataclasses.replace(seen, valid=torch.ones_like(distance, dtype=torch.bool))
        return distance, self._weight(distance.detach(), seen), seen

    def focus(self, seen: Seen) -> Seen:
        """Return the term's view of a batch, rectified, on the teacher's own scale."""
        seen = seen.focus(self.settings.output, self.settings.padding)
        return seen if self.rectify is None else self.rectify(seen)

    def standardised(self, seen: Seen) -> Seen:
        """Return the term's view with both compared outputs in the units in which the distance compares them."""
        return seen if self.standardizer is None else seen.mapped(self.standardizer)

    def _weight(self, distance: Tensor, seen: Seen) -> Tensor:
        """Return the weights of the detached distance at this time of the run."""
        share = self.blend.share(seen.progress)
        if share == 1:
            return Uniform()(distance, seen)
        weight = self.weighting(distance, seen)
        self._check(weight, distance, seen.valid)
        return blended(weight, distance, seen, share)

    def _check(self, weight: Tensor, distance: Tensor, valid: Tensor | None) -> None:
        """Raise a UserError for weights of a wrong shape; check their values once only, since that makes a GPU wait."""
        if getattr(weight, "shape", None) != distance.shape:
            actual = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise UserError(
                f"{self.weighting_setting}: returned {actual}; expected weights of the distance's shape "
                f"{(*distance.shape,)}"
            )
        if self.weights_checked:
            return
        self.weights_checked = True
        if bool(distance.isfinite().all()) and not bool(weight.isfinite().all()):
            raise UserError(
                f"{self.weighting_setting}: returned weights that are not finite for finite distances; does it divide "
                f"0 by 0?"
            )
        count = weight.numel() if valid is None or weight.dim() == 1 else int(valid.sum())
        mean = float(weight.sum()) / max(count, 1)
        # fmdistill's own weightings document a mean other than one.
        if self.settings.weighting["name"] not in WEIGHTINGS and abs(mean - 1) > 1e-3:
            log.warning(
                "%s: the mean weight of the first batch is %.4g, not one, so a comparison with another weighting "
                "also compares learning rates; divide by the mean, unless this is intended",
                self.weighting_setting,
                mean,
            )

    def _scale(self, epoch: float | None) -> float:
        if epoch is None or epoch >= self.settings.warmup:
            return self.settings.scale
        return self.settings.scale * epoch / self.settings.warmup


class Objective(nn.Module):
    """The loss as a mapping of named terms.

    `shapes` are the shapes of one image's outputs, by the names of `Seen`; learned parts are built for them. `priors`
    are the class statistics, for rectifiers that need class frequencies. `standardizers` are those of the terms that
    standardise, by the terms' names. `logit_scale` is the factor of a teacher's cosines between images and texts.
    """

    def __init__(
        self,
        settings: Mapping[str, Mapping[str, Any]],
        shapes: Mapping[str, Shape] | None = None,
        priors: Priors | None = None,
        standardizers: Mapping[str, Standardizer] = {},
        logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        terms = check(settings).items()
        for name, term in terms:
            _check_vectors(term, f"objective.{name}", shapes_of(term.output, shapes or {}))
        self.terms = nn.ModuleDict(
            {
                name: Term(term, f"objective.{name}", shapes or {}, priors, standardizers.get(name), logit_scale)
                for name, term in terms
            }
        )

    def forward(self, seen: Seen) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the named losses and the named statistics."""
        losses, statistics = {}, {}
        for name, term in self.items():
            losses[name], term_statistics = term(seen)
            statistics |= {f"{name}/{key}": value for key, value in term_statistics.items()}
        return losses, statistics

    @property
    def step_outputs(self) -> set[str]:
        """The names of the student's outputs that terms compare over all images of the optimizer step."""
        return {term.settings.output.rpartition(".")[2] for _, term in self.items() if term.over_step}

    def items(self) -> Iterator[tuple[str, Term]]:
        """Yield each term with its name."""
        for name, term in self.terms.items():
            assert isinstance(term, Term)
            yield name, term


def check(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, TermSettings]:
    """Return the typed settings of every term; bind its components and check their values, without reading data."""
    if not settings:
        raise UserError("objective: has no term; a recipe that distils needs one, such as objective.embedding")
    terms = {name: TermSettings(**typed(TermSettings, s, f"objective.{name}")) for name, s in settings.items()}
    for name, term in terms.items():
        check_values(_bound(term, f"objective.{name}")[1], f"objective.{name}")
    return terms


def check_trimmed(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a UserError for a term that includes padded patches, which a trimmed cache does not store."""
    for name, term in check(settings).items():
        if term.padding == "include":
            raise UserError(
                f"objective.{name}.padding=include: a cache with cache.trim=true stores no padded patches to compare; "
                f"set objective.{name}.padding=exclude, or cache.trim=false"
            )


def check_vectors(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a UserError for a term that needs patches, given a teacher whose outputs are all vectors."""
    for name, term in check(settings).items():
        _check_vectors(term, f"objective.{name}", {"student": (1,), "teacher": (1,)})


def _check_vectors(term: TermSettings, where: str, shapes: Mapping[str, Any]) -> None:
    known = [shape for shape in (shapes["student"], shapes["teacher"]) if shape is not None]
    if not known or any(len(shape) > 1 for shape in known):
        return
    if getattr(_bound(term, where)[1].func, "needs_patches", False):
        raise no_regions(term.output, f"{where}.weighting.name={term.weighting['name']}")
    if term.padding == "exclude":
        raise UserError(
            f"{where}.padding=exclude: ignored, since output={term.output} is one vector per image and has no "
            f"padded patches; remove `padding`"
        )


def needs_logit_scale(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a term's distance depends on the teacher's logit scale."""
    distances = [_bound(term, f"objective.{name}")[0] for name, term in check(settings).items()]
    return any("logit_scale" in inspect.signature(distance.func).parameters for distance in distances)


def needs_priors(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a term needs the class statistics `Priors`."""
    rectifiers = [_bound(term, f"objective.{name}")[2] for name, term in check(settings).items()]
    return any(rectify and "priors" in inspect.signature(rectify.func).parameters for rectify in rectifiers)


def _bound(term: TermSettings, where: str) -> tuple[Any, Any, Any, Blend]:
    weighting, blend = bind_weighting(term.weighting, f"{where}.weighting", SHAPES)
    return (
        bind(term.distance, DISTANCES, f"{where}.distance", (*SHAPES, "logit_scale")),
        weighting,
        term.rectify and bind(term.rectify, RECTIFIERS, f"{where}.rectify", (*SHAPES, "priors")),
        blend,
    )


def shapes_of(output: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the shapes of the student's and the teacher's `output` and of all outputs; None if not known."""
    student = shapes.get(f"student.{output.rpartition('.')[2]}")
    try:
        teacher = shapes[teacher_name(output, shapes)]
    except UserError:
        teacher = None  # a distance to labels needs no teacher; any other raises an error
    return {"student": student, "teacher": teacher, "shapes": shapes or None}


def reduce(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean over the batch of `values` (B,), or of each image's mean over its valid patches for (B, N).

    `values` are zero for invalid patches; `valid` is (B, N) for maps, None for vectors.
    """
    if values.dim() == 1:
        return values.mean()
    assert valid is not None
    return (values.sum(1) / valid.sum(1).clamp_min(1)).mean()


@torch.no_grad()
def effective_sample_size(weight: Tensor, valid: Tensor | None) -> Tensor:
    """Return (sum w)^2 / (n sum w^2) in (0, 1]: over the micro-batch for `weight` (B,).

    For (B, N), it is computed over each image's valid patches and averaged over the images.
    """
    if weight.dim() == 1:
        return weight.sum().square() / (len(weight) * weight.square().sum().clamp_min(1e-12))
    assert valid is not None
    count_B = valid.sum(1).clamp_min(1)
    return (weight.sum(1).square() / (count_B * weight.square().sum(1).clamp_min(1e-12))).mean()
