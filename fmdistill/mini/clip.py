"""Build clip_mini, a small CLIP of open_clip's own classes that has token embeddings only for `captioned`'s words."""

# Legend: B images or texts, L context length, D embedding channels, W text width, V tokens in all, R known.

import copy
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from open_clip import SimpleTokenizer
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from torch import Tensor, nn

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.clip import ClipPreprocess
from fmdistill.mini.captioned import words
from fmdistill.registry import UserError
from fmdistill.teachers.clip import ClipTeacher
from fmdistill.teachers.compute import DType

IMAGE_SIZE, EMBED_DIM, CONTEXT = 64, 128, 16
MODEL_CFG: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    # A ResNet: in 2,000 steps, a ViT of 8-px patches learned colours and textures but only 56 % of the shapes.
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 2, 2, 1], "width": 24, "head_width": 32},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
PREPROCESS_CFG = {"size": IMAGE_SIZE, "interpolation": "bicubic", "resize_mode": "shortest"}  # mean and std are CLIP's
PREPROCESS_CFG |= {"mean": list(OPENAI_DATASET_MEAN), "std": list(OPENAI_DATASET_STD)}
CONFIG = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG, "tokenizer": "simple"}
PACKAGED = Path(__file__).parent / "weights" / "clip_mini.safetensors"

_log = logging.getLogger(__name__)


class MiniClip(nn.Module):
    """Both towers of a CLIP as one trainable network; `token_ids` (R,) are the tokens that it knows, ascending."""

    token_ids: Tensor
    config = CONFIG

    def __init__(self, token_ids: Tensor):
        super().__init__()
        self.clip = CLIP(**_config(len(token_ids)))
        self.image_size, self.out_channels = IMAGE_SIZE, EMBED_DIM
        self.preprocess = ClipPreprocess.from_config(PREPROCESS_CFG, IMAGE_SIZE)
        self.register_buffer("token_ids", token_ids.long())

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (B, D)}, not normalised, of normalised images (B, 3, 64, 64)."""
        return {"embedding": self.clip.encode_image(image)}

    def encode_text(self, tokens_BL: Tensor) -> Tensor:
        """Return the embeddings (B, D), not normalised, of token ids of the whole vocabulary."""
        # The tokens ascend, so the end token still has the largest number, by which open_clip recognises it.
        rows_BL = torch.searchsorted(self.token_ids, tokens_BL.contiguous()).clamp(max=len(self.token_ids) - 1)
        assert (self.token_ids[rows_BL] == tokens_BL).all(), "a token without a row"
        return self.clip.encode_text(rows_BL)

    def whole(self) -> CLIP:
        """Return the network with the whole vocabulary, in eval mode; embeddings of unknown tokens are zero."""
        full = CLIP(**_config(MODEL_CFG["text_cfg"]["vocab_size"]))
        state = self.clip.state_dict()
        known_RW = state["token_embedding.weight"]
        rows_VW = known_RW.new_zeros(full.vocab_size, known_RW.shape[1])
        rows_VW[self.token_ids] = known_RW
        full.load_state_dict({**state, "token_embedding.weight": rows_VW})
        return full.eval()


@cache
def tokenizer() -> SimpleTokenizer:
    """Return open_clip's tokenizer at clip_mini's context length."""
    return SimpleTokenizer(context_length=CONTEXT)


def tokenize(texts: list[str], token_ids: Tensor) -> Tensor:
    """Return the token ids (B, L) of texts; UserError if a token is not among `token_ids`."""
    tokens_BL = tokenizer()(texts)
    missing_B = ~torch.isin(tokens_BL, token_ids).all(1)
    if missing_B.any():
        text = texts[int(missing_B.nonzero()[0])]
        raise UserError(
            f"clip_mini: the caption '{text}' has a word that clip_mini does not know; it has the {len(words())} "
            f"words of the source `captioned`, so train it on that source"
        )
    return tokens_BL


def clip_mini_student(pretrained: str = "none") -> MiniClip:
    """Return clip_mini for training: fresh ("none"), "packaged", or from a safetensors file."""
    if pretrained == "none":
        return MiniClip(tokenizer()(words()).unique())  # the padding, start and end tokens among them
    return _load(PACKAGED if pretrained == "packaged" else Path(pretrained))


def build_clip_mini(weights: str | Path = "packaged") -> CLIP:
    """Return clip_mini as open_clip's CLIP in eval mode, unused token rows zero.

    `weights` is "packaged", "none", a safetensors file or a run's folder. Without weights ("none", or a checkout that
    has no packaged ones) the network is untrained and always the same.
    """
    untrained = str(weights) == "none"
    if str(weights) == "packaged" and not PACKAGED.is_file():
        _log.warning("clip_mini is untrained: this checkout has no %s", PACKAGED.name)
        untrained = True
    with torch.random.fork_rng(devices=[]):  # open_clip draws weights even if they are then replaced
        torch.manual_seed(0)
        if untrained:
            return clip_mini_student().whole()
        path = PACKAGED if str(weights) == "packaged" else Path(weights)
        return _load(path / "student.safetensors" if path.is_dir() else path).whole()


def clip_mini(
    weights: str = "packaged",
    tokens: bool = False,
    captions: int = 0,
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 64,
    workers: int = 2,
) -> ClipTeacher:
    """Return clip_mini as a teacher, 64 px; `weights` is "packaged", "none", a run's folder or a safetensors file.

    `captions` is the number of captions of each image that its text tower embeds.
    """
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "batch": batch, "workers": workers}
    settings["captions"] = captions
    return ClipTeacher(build_clip_mini(weights), CONFIG, name="clip_mini", kind="clip_mini", tokens=tokens, **settings)


def _config(rows: int) -> dict:
    config = copy.deepcopy(MODEL_CFG)
    config["text_cfg"]["vocab_size"] = rows
    return config


def _load(path: Path) -> MiniClip:
    if not path.is_file():
        raise UserError(f"clip_mini weights {path}: no such file; use 'packaged', 'none', a safetensors file or a run")
    state = read_state(path, f"clip_mini weights {path}")
    try:
        state = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
        model = MiniClip(state.get("token_ids", torch.zeros(1)))
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"clip_mini weights {path}: not a clip_mini checkpoint ({reason})") from error
    return model
