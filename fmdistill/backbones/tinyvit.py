"""TinyViT students with SAM's interface: timm's trunk at stride 16 and MobileSAM's neck.

Legend: B images, S the image side, C embedding channels.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import timm
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.mobilesam_names import timm_names
from fmdistill.registry import UserError, suggest


class TinyViTSAM(nn.Module):
    """MobileSAM's image encoder (Zhang et al. 2023, arXiv:2306.14289) at any width, on timm's TinyViT.

    `last_stride` is the stride of the last stage's downsampling: 1 makes a grid of S/16, timm's own 2 one of S/32.
    `trunk` overrides settings of timm's TinyVit, such as `embed_dims`.
    """

    def __init__(
        self,
        variant: str = "tiny_vit_5m_224",
        image_size: int = 1024,
        out_channels: int = 256,
        last_stride: int = 1,
        **trunk: Any,
    ):
        super().__init__()
        self.variant, self.image_size, self.out_channels = variant, image_size, out_channels
        self.trunk: Any = timm.create_model(variant, num_classes=0, global_pool="", drop_path_rate=0.0, **trunk)
        self.trunk.head = nn.Identity()  # unused parameters would stop distributed training
        self.trunk.stages[3].downsample.conv2.conv.stride = (last_stride, last_stride)
        self.neck = nn.Sequential(
            nn.Conv2d(self.trunk.num_features, out_channels, 1, bias=False),
            LayerNorm2d(out_channels, eps=1e-6),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels, eps=1e-6),
        )
        self.register_load_state_dict_post_hook(forget_cached_biases)

    @property
    def last_layers(self) -> dict[str, nn.Module]:
        """The last layer before each output, by the output's name; standardised targets are folded into it."""
        return {"embedding": self.neck[-1]}

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, C, S/16, S/16)} for normalised float images (B, 3, S, S)."""
        return {"embedding": self.neck(self.trunk.forward_features(image_B3SS))}


def forget_cached_biases(student: nn.Module, _keys: object) -> None:
    """Delete the attention biases that timm caches in eval mode; a hook that runs after a state was loaded."""
    student.train(student.training)


def tinyvit_sam(size: Literal["5m", "11m", "21m"] = "5m", pretrained: str = "none") -> TinyViTSAM:
    """Return the full-size student: 1024 px, 256 channels on a 64x64 grid.

    `pretrained` is "none", a timm tag such as "dist_in22k_ft_in1k" (downloaded once by timm), or the path of a
    .safetensors, .pth, .pt or .bin state: timm's trunk, Microsoft's TinyViT, a MobileSAM checkpoint or a student that
    fmdistill trained.
    """
    student = TinyViTSAM(f"tiny_vit_{size}_224")
    load_pretrained(student, pretrained)
    return student


class TinyViTStudent(Protocol):
    """A student whose `trunk` is timm's TinyViT `variant`."""

    variant: str
    image_size: int

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights; the names of the trunk's begin with "trunk."."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Load the weights."""
        ...


def load_pretrained(student: TinyViTStudent, pretrained: str) -> None:
    """Load a timm tag or a file into the trunk of `student`, and into its other layers if the source contains them.

    Does nothing if `pretrained` is "none". Raises UserError if the source is missing or does not fit.
    """
    if pretrained == "none":
        return
    is_path = Path(pretrained).suffix in (".safetensors", ".pth", ".pt", ".bin") or "/" in pretrained
    state = _read(Path(pretrained)) if is_path else _download(student.variant, pretrained)
    _load(student, _student_names(state, student.state_dict().keys()), pretrained)


def _download(variant: str, tag: str) -> dict[str, Tensor]:
    known = [name.partition(".")[2] for name in timm.list_pretrained(f"{variant}.*")]
    if tag not in known:
        raise UserError(
            f"student.pretrained={tag}: neither a file (.safetensors, .pth, .pt, .bin) nor a timm tag of {variant}."
            f"{suggest(tag, ['none', *known])}"
        )
    try:
        return timm.create_model(f"{variant}.{tag}", pretrained=True, num_classes=0, global_pool="").state_dict()
    except Exception as error:  # the hub's client raises classes of whichever transport it was built on
        raise UserError(
            f"student.pretrained={tag}: timm could not download {variant}.{tag} ({type(error).__name__}); "
            f"without a network use the path of its model.safetensors, or `none`"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"student.pretrained={path}: no such file; use a timm tag, a state dict's path or `none`")
    return read_state(path, f"student.pretrained={path}")


def _student_names(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return `state` under the names of TinyViTSAM or TinyViTCLIP; unused classifier heads are omitted."""
    for prefix in ("image_encoder.", "visual."):  # MobileSAM's whole model, open_clip's
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if any(name.startswith("layers.") for name in state):
        state = timm_names(state)
    if not any(name.startswith("trunk.") for name in state):
        state = {f"trunk.{name}": value for name, value in state.items()}
    return {name: value for name, value in state.items() if name in names or not name.startswith("trunk.head.")}


def _load(student: TinyViTStudent, state: dict[str, Tensor], source: str) -> None:
    expected = student.state_dict()
    if all(name.startswith("trunk.") for name in state):
        missing = {name for name in expected if name.startswith("trunk.head.")} - state.keys()  # Microsoft's lacks it
        expected = {
            name: value for name, value in expected.items() if name.startswith("trunk.") and name not in missing
        }
    reshaped = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    differing = sorted([*(expected.keys() ^ state.keys()), *reshaped])
    if differing:
        raise UserError(
            f"student.pretrained={source}: does not fit {student.variant} at {student.image_size} px, "
            f"{len(differing)} names or shapes differ, first {differing[0]}; use a state of the same size"
        )
    student.load_state_dict(state, strict=False)
