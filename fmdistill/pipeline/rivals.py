"""What a teacher is compared with: the plain loop of its own package, and weights drawn where there are no others."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from fmdistill.backbones.classifiers import CLASSIFIERS
from fmdistill.backbones.clip import load_clip
from fmdistill.backbones.clip_mini import CONFIG, build_clip_mini
from fmdistill.backbones.mini import build_sam_mini
from fmdistill.backbones.sam import build_sam
from fmdistill.backbones.throughput import flops, take_turns
from fmdistill.cache.clip_teacher import DEFAULT, ClipTeacher, clip_settings
from fmdistill.cache.compute import computing
from fmdistill.cache.sam_teacher import SamTeacher
from fmdistill.cache.teacher import Teacher
from fmdistill.registry import UserError, bind

OFFICIAL = {"sam_vit_b": "vit_b", "sam_vit_l": "vit_l", "sam_vit_h": "vit_h"}
UNTRAINED = {"sam_mini": "weights", "clip_mini": "weights", "open_clip": "pretrained"}  # the setting that takes "none"


@dataclass(frozen=True)
class Row:
    """One measured figure, and that of what it is set against, in the same unit."""

    what: str
    figure: float
    unit: str
    against: str = ""
    other: float | None = None

    @property
    def ratio(self) -> float | None:
        """Return the figure over the other's."""
        return None if self.other is None else self.figure / self.other


@dataclass(frozen=True)
class Rival:
    """A package's own way from images to embeddings, as its README shows it, with the teacher's weights."""

    name: str
    embed: Callable[[Sequence[Image.Image]], torch.Tensor]  # prepares and embeds; float32 (B, ...) on the CPU
    pixels: Callable[[bytes], Any]  # encoded bytes -> what its network takes
    flops: Callable[[], int]  # of its network for one image


def drawn(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the teacher's settings with weights drawn instead of read; a checkpoint of them lies in `folder`."""
    name = settings["name"]
    if name in UNTRAINED and not str(settings.get("model", "")).startswith("local-dir:"):
        return {**settings, UNTRAINED[name]: "none"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in OFFICIAL:
            sam, path = sam_model_registry[OFFICIAL[name]](), folder / "drawn.pth"
            for parameter in sam.parameters():  # at zero some would cost less on a device that sees zeros
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            torch.save(sam.state_dict(), path)
        elif name == "classifier":
            path = folder / "drawn.safetensors"
            save_file(bind(settings["network"], CLASSIFIERS, "teacher.network")().state_dict(), path)
        else:
            raise UserError(f"bench.weights=random: the weights of teacher {name} cannot be drawn; give it its own")
    return {**settings, "weights": str(path)}


def rival(settings: Mapping[str, Any], teacher: Teacher) -> Rival | None:
    """Return the package's own loop for the teacher; None where the teacher is of no other package."""
    name, weights = settings["name"], settings.get("weights", "packaged")
    if isinstance(teacher, SamTeacher) and name == "sam_mini":
        file = Path(weights) / "student.safetensors"
        return _segment_anything(build_sam_mini(file if file.is_file() else weights), teacher)
    if isinstance(teacher, SamTeacher) and name in OFFICIAL:
        return _segment_anything(build_sam(OFFICIAL[name], settings.get("weights")), teacher)  # type: ignore[arg-type]
    if isinstance(teacher, ClipTeacher) and name == "clip_mini":
        return _open_clip(build_clip_mini(weights), CONFIG, teacher)
    if isinstance(teacher, ClipTeacher) and name == "open_clip":
        pretrained = str(settings.get("pretrained") or "none")
        made, config = load_clip(str(settings.get("model", DEFAULT)), pretrained, clip_settings(settings))
        return _open_clip(made, config, teacher)
    return None


def in_precision(work: Callable[[], Any], teacher: Teacher) -> Callable[[], Any]:
    """Return `work` under the teacher's precision."""
    assert isinstance(teacher, SamTeacher | ClipTeacher)

    def same() -> None:
        with computing(teacher.dtype, teacher.device):
            work()

    return same


def _segment_anything(sam: Sam, teacher: SamTeacher) -> Rival:
    predictor = SamPredictor(sam.to(teacher.device))

    def embed(pictures: Sequence[Image.Image]) -> torch.Tensor:
        found = []
        for picture in pictures:
            predictor.set_image(np.asarray(picture))
            found.append(predictor.get_image_embedding().float().cpu())
        return torch.cat(found)

    def pixels(data: bytes) -> torch.Tensor:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        resized = torch.as_tensor(predictor.transform.apply_image(image))
        padded = torch.zeros(3, *2 * [teacher.preprocess.image_size], dtype=torch.uint8)  # it pads on the device
        padded[:, : resized.shape[0], : resized.shape[1]] = resized.permute(2, 0, 1)
        return padded

    side = teacher.preprocess.image_size
    blank = torch.zeros(1, 3, side, side, device=teacher.device)
    return Rival("SamPredictor.set_image", embed, pixels, lambda: flops(sam.image_encoder, blank))


def _open_clip(model: nn.Module, config: Mapping[str, Any], teacher: ClipTeacher) -> Rival:
    network: Any = model.to(teacher.device).eval()
    transform: Any = image_transform_v2(PreprocessCfg(**config["preprocess_cfg"]), is_train=False)

    @torch.no_grad()
    def embed(pictures: Sequence[Image.Image]) -> torch.Tensor:
        found = []
        for start in range(0, len(pictures), teacher.batch):
            batch = torch.stack([transform(picture) for picture in pictures[start : start + teacher.batch]])
            found.append(network.encode_image(batch.to(teacher.device)).float().cpu())
        return torch.cat(found)

    side = teacher.preprocess.image_size
    blank = torch.zeros(1, 3, side, side, device=teacher.device)
    return Rival(
        "open_clip encode_image",
        embed,
        lambda data: transform(Image.open(io.BytesIO(data))),
        lambda: flops(network.encode_image, blank),
    )


def rates(works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, amount: float) -> dict[str, float]:
    """Return how much of `amount` each of `works` does in a second, at its best of several rounds in turns."""
    return {name: amount / seconds for name, seconds in take_turns(works, device, rounds).items()}
