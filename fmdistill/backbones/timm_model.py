"""Name timm's models and the weights that they start from."""

from pathlib import Path
from typing import Any

import timm
from timm.layers.drop import DropPath
from torch import nn

from fmdistill.backbones.checkpoints import read_state
from fmdistill.registry import UserError, suggest

FILES = (".safetensors", ".pth", ".pt", ".bin")


def check_model(model: str) -> str:
    """Return the name of a timm model, without a tag. Raises UserError, with a suggestion, if timm has none."""
    if not timm.is_model(model):
        raise UserError(f"student.model={model}: timm has no such model.{suggest(model, timm.list_models())}")
    name, _, tag = model.partition(".")
    if tag:
        raise UserError(f"student.model={model}: contains a tag; set student.model={name} student.pretrained={tag}")
    return model


def without_drop_path(network: nn.Module) -> nn.Module:
    """Return the network without stochastic depth, since noise only disturbs the imitation of a teacher's features."""
    for module in network.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return network


def pretrained_settings(model: str, pretrained: str) -> dict[str, Any]:
    """Return the arguments of timm.create_model for `model` with the weights `pretrained`.

    `pretrained` is "none", a tag that timm has of the model, or a file of its weights under timm's names. Raises
    UserError for a model, a tag or a file that does not exist, and for a damaged file; nothing in it is executed.
    """
    check_model(model)
    if pretrained == "none":
        return {"pretrained": False}
    path = Path(pretrained).expanduser()
    if path.suffix in FILES or "/" in pretrained:
        if not path.is_file():
            raise UserError(f"student.pretrained={pretrained}: no such file; use a timm tag, a file's path or `none`")
        read_state(path, f"student.pretrained={pretrained}")
        return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    known = [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]
    if pretrained not in known:
        raise UserError(
            f"student.pretrained={pretrained}: neither a file ({', '.join(FILES)}) nor a timm tag of {model}."
            f"{suggest(pretrained, ['none', *known])}"
        )
    return {"pretrained": True, "pretrained_cfg": timm.get_pretrained_cfg(f"{model}.{pretrained}")}
