"""Settings that a CLIP checkpoint's tensors do not contain: set explicitly, or taken from open_clip's tags."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg

from fmdistill.registry import UserError, suggest

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "squash"]
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
STATED = (*PREPROCESSING, "quick_gelu")  # settings that open_clip's tags state in addition to the weights
OPENAI = "openai"


@dataclass(frozen=True)
class ClipSettings:
    """Settings that a CLIP checkpoint's tensors do not contain; None means the value of its tag.

    For a file, None means the value of the tag `as_tag`, or else the value on which all tags of the model agree.
    `context_length` (tokens) and `tokenizer` ("simple" or a transformers tokenizer) default to the model's config.
    """

    as_tag: str | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Interpolation | None = None
    resize_mode: ResizeMode | None = None
    quick_gelu: bool | None = None
    context_length: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Raise a UserError for values out of range, such as a mean of pixels from 0 to 255."""
        if self.mean is not None and not all(0 <= value <= 1 for value in self.mean):
            raise UserError(
                f"teacher.mean={list(self.mean)}: expected three numbers from 0 to 1, for pixels from 0 to 1"
            )
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise UserError(f"teacher.std={list(self.std)}: expected three numbers above 0, for pixels from 0 to 1")
        if self.context_length is not None and self.context_length < 1:
            raise UserError(f"teacher.context_length={self.context_length}: expected 1 or more")

    def given(self) -> dict[str, Any]:
        """Return the values that are not None, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


NOTHING_SET = ClipSettings()


def tag_values(name: str, tag: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `STATED` values of the tag `tag` of the model `name`, whose open_clip config is `config`.

    Raises UserError for an unknown tag.
    """
    known = get_pretrained_cfg(name, tag)
    if not known:
        tags = list_pretrained_tags_by_model(name)
        way_out = suggest(tag, tags) if tags else f" {name} has none; set {_settings(STATED)} instead"
        raise UserError(f"teacher.as_tag={tag}: no tag of {name}.{way_out}")
    return {**_defaults(config), **{key: known[key] for key in PREPROCESSING if key in known}} | {
        "quick_gelu": bool(known.get("quick_gelu") or config.get("quick_gelu"))
    }


def file_values(
    name: str, file: str, config: Mapping[str, Any], settings: ClipSettings, is_openai: bool
) -> tuple[dict[str, Any], str]:
    """Return the `STATED` values for a checkpoint `file` of the model `name`, and a log line with the source of each.

    Raises UserError if the tags of `name` disagree on a value that `settings` do not set.
    """
    stated, source = _stated(name, file, config, settings, is_openai)
    given = {key: value for key, value in settings.given().items() if key != "as_tag"}
    groups = {"as set": given, source: stated, "from its config": text_values(config)}
    parts = [
        f"{_shown(used)} {source}"
        for source, values in groups.items()
        if (used := {key: value for key, value in values.items() if values is given or key not in given})
    ]
    line = f"teacher.pretrained={file}: {'; '.join(parts)}; teacher.KEY=VALUE changes a value"
    return {key: given.get(key, value) for key, value in stated.items()}, line


def text_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the context length in tokens and the tokenizer's name from a model's open_clip config."""
    text_cfg = config["text_cfg"]
    return {
        "context_length": text_cfg.get("context_length", 77),
        "tokenizer": text_cfg.get("hf_tokenizer_name") or "simple",
    }


def _stated(
    name: str, file: str, config: Mapping[str, Any], settings: ClipSettings, is_openai: bool
) -> tuple[dict[str, Any], str]:
    if settings.as_tag is not None:
        return tag_values(name, settings.as_tag, config), f"from {name}'s tag {settings.as_tag}"
    if is_openai:
        return {**_defaults(config), "quick_gelu": True}, "for OpenAI's own file, recognised by its hash"
    by_tag = {tag: tag_values(name, tag, config) for tag in list_pretrained_tags_by_model(name)}
    if not by_tag:
        return _defaults(config), f"by open_clip's defaults, since {name} has no tag"
    values = next(iter(by_tag.values()))
    open_keys = [key for key in STATED if key not in settings.given()]
    differing = [key for key in open_keys if any(other[key] != values[key] for other in by_tag.values())]
    if differing:
        shown = "; ".join(f"{key} is {_by_value(key, by_tag)}" for key in differing)
        raise UserError(
            f"teacher.pretrained={file}: the file does not state the settings of {name}, and its tags differ: {shown}. "
            f"Set teacher.as_tag=TAG, the tag with which the file was trained, or {_settings(differing)}"
        )
    tags = f"only tag ({next(iter(by_tag))})" if len(by_tag) == 1 else f"{len(by_tag)} tags, which agree"
    return values, f"from {name}'s {tags}"


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's default values."""
    preprocessing = PreprocessCfg()
    return {key: getattr(preprocessing, key) for key in PREPROCESSING} | {"quick_gelu": bool(config.get("quick_gelu"))}


def _by_value(key: str, by_tag: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which tags have which value, such as "true for openai and 4 more, false for laion2b_e16"."""
    groups: dict[str, list[str]] = {}
    for tag, values in by_tag.items():
        groups.setdefault(_text(values[key]), []).append(tag)
    shown = []
    for value, tags in groups.items():
        more = f" and {len(tags) - 2} more" if len(tags) > 2 else ""
        shown.append(f"{value} for {', '.join(tags[:2])}{more}")
    return ", ".join(shown)


def _settings(keys: Any) -> str:
    return " ".join(f"teacher.{key}=VALUE" for key in keys)


def _shown(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple | list) else str(value)
