"""Settings that every weighting takes: for which part of the run it applies, and how much of it is uniform."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fmdistill.distill.seen import Seen
from fmdistill.distill.weightings import WEIGHTINGS
from fmdistill.distill.weightings.uniform import Uniform
from fmdistill.registry import UserError, bind, typed


@dataclass(frozen=True)
class Blend:
    """Replaces a share u of each weight w by uniform ones: w' = (1 - u) w + u, for valid entries.

    u = 1 - (1 - mix) (1 - e), with e the part of the weighting that has ended: without `until` 0; with it 0 before that
    share of the run and 1 from then on; with `fade` progress / until, at most 1. Outside of training e = 0, so that a
    validation loss means the same at any step. Each entry is blended by itself, so weights of mean one over any group
    stay so, and no valid weight is below `mix`.
    """

    until: float | None = None  # the share of the run's steps after which weights are uniform
    fade: bool = False  # whether they become so little by little, from the first step until `until`
    mix: float = 0.0  # the share of uniform weights throughout

    @property
    def changes(self) -> bool:
        """Return whether any weight may change."""
        return self.until is not None or self.mix > 0

    def share(self, progress: float | None) -> float:
        """Return u in [0, 1] when the share `progress` of the run's steps is done; None outside of training."""
        ended = 0.0
        if progress is not None and self.until is not None:
            ended = min(progress / self.until, 1.0) if self.fade else float(progress >= self.until)
        return 1 - (1 - self.mix) * (1 - ended)


def blended(weight: Tensor, distance: Tensor, seen: Seen, share: float) -> Tensor:
    """Return weights of the distance's shape of which `share` is uniform; zero for invalid entries."""
    return (1 - share) * weight + share * Uniform()(distance, seen) if share else weight


def bind_weighting(settings: Mapping[str, Any], where: str, context: Collection[str] = ()) -> tuple[partial, Blend]:
    """Return a weighting with its arguments bound, as `bind` does, and how its weights are blended with uniform ones.

    Raises UserError for what `bind` refuses, for values out of range, and for settings that would be ignored or would
    change the size of the loss.
    """
    if not isinstance(settings, Mapping):
        return bind(settings, WEIGHTINGS, where, context), Blend()
    reserved = {field.name for field in fields(Blend)} & settings.keys()
    weighting = bind({k: v for k, v in settings.items() if k not in reserved}, WEIGHTINGS, where, context)
    if own := sorted({field.name for field in fields(Blend)} & inspect.signature(weighting.func).parameters.keys()):
        raise UserError(
            f"{where}.name={settings['name']}: has an argument `{own[0]}`, a setting that every weighting takes "
            f"already; rename the argument"
        )
    blend = Blend(**typed(Blend, {key: settings[key] for key in reserved}, where))
    _check_range(blend, where)
    if blend.changes:
        _check_weighting(settings["name"], weighting, f"{where}.{'mix' if blend.until is None else 'until'}")
    return weighting, blend


def check_values(weighting: partial, term: str) -> None:
    """Raise a UserError, which names the term, for settings of a bound weighting that are out of range.

    It tries those of fmdistill's own that are frozen dataclasses of nothing but settings.
    """
    function = weighting.func
    if function in WEIGHTINGS.values() and is_dataclass(function) and all(field.init for field in fields(function)):
        try:
            weighting()
        except UserError as error:
            raise UserError(f"{term}.{error}") from None


def _check_range(blend: Blend, where: str) -> None:
    if blend.until is not None and not 0 < blend.until <= 1:
        raise UserError(
            f"{where}.until={blend.until}: expected a share of the run above 0 and at most 1, such as 0.5; leave it "
            f"out to use the weighting in the whole run"
        )
    if blend.until == 1 and not blend.fade:
        raise UserError(f"{where}.until={blend.until}: ignored, since the run ends there; leave it out, or set `fade`")
    if blend.fade and blend.until is None:
        raise UserError(f"{where}.fade=true: ignored without `until`; set {where}.until, 1.0 for the whole run")
    if not 0 <= blend.mix < 1:
        raise UserError(
            f"{where}.mix={blend.mix}: expected a share of uniform weights of at least 0 and below 1; for uniform "
            f"weights set {where}.name=uniform"
        )


def _check_weighting(name: str, weighting: partial, setting: str) -> None:
    """Raise a UserError if uniform weights change nothing, or another mean than this weighting's."""
    if WEIGHTINGS.get(name) is Uniform:
        raise UserError(f"{setting}: ignored, since the weights of {name} are uniform already; remove it")
    normalize = inspect.signature(weighting).parameters.get("normalize")
    if name in WEIGHTINGS and normalize is not None and not normalize.default:
        raise UserError(
            f"{setting}: the mean weight of {name} is not one, so uniform weights would change the size of the loss; "
            f"set normalize=true beside it, or remove it"
        )
