"""An image classifier as a teacher: its logits, its pooled feature and, if requested, maps of its stages."""

# Legend: B images, K classes, D the feature's width, C the channels of a stage's map.

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmdistill.backbones.checkpoints import read_state
from fmdistill.backbones.class_preprocess import ClassPreprocess
from fmdistill.backbones.classifiers import CLASSIFIERS, Classifier
from fmdistill.backbones.linear_head import LinearHead
from fmdistill.recipe import Component
from fmdistill.registry import UserError, bind, suggest
from fmdistill.teachers.compute import DType, Precision, computing, own_device, own_dtype, state_hash
from fmdistill.teachers.family import Family, weights_setting
from fmdistill.teachers.output import Output


class ClassTeacher:
    """A frozen classifier in eval mode with the outputs logits (B, K), feature (B, D) and named maps (B, C, H, W)."""

    family = "classifier"

    def __init__(
        self,
        model: Classifier,
        preprocess: ClassPreprocess,
        *,
        kind: dict[str, Any],
        maps: list[str],
        device: str,
        dtype: DType,
        batch: int,
        workers: int,
    ) -> None:
        self.kind, self.batch, self.workers, self.preprocess = kind, batch, workers, preprocess
        self.device = own_device(device)
        self.dtype: Precision = own_dtype(dtype, self.device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        outputs = self._outputs(torch.zeros(1, 3, *(2 * [model.image_size]), device=self.device))
        for name in maps:
            if name not in outputs or outputs[name].dim() != 4:
                raise UserError(f"teacher.maps={name}: {kind['name']} has no such map.{suggest(name, outputs)}")
        vectors = {name: Output(tuple(outputs[name].shape[1:])) for name in ("logits", "feature")}
        self.outputs = {**vectors, **{name: Output(tuple(outputs[name].shape[1:]), "all") for name in maps}}

    def __call__(self, pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Return the named outputs, float32 on the CPU, for uint8 (B, 3, S, S) pixels."""
        outputs = self._outputs(self.preprocess.normalize(pixels.to(self.device), sizes.to(self.device)))
        return {name: outputs[name].float().cpu().contiguous() for name in self.outputs}

    @torch.inference_mode()
    def _outputs(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        with computing(self.dtype, self.device):
            return self.model(image_BCHW)

    def fingerprint(self) -> dict[str, Any]:
        """Return the teacher's identity."""
        return {
            "name": "classifier",
            "network": self.kind,
            "weights": state_hash(self.model.state_dict()),
            "preprocess": self.preprocess.to_json(),
            "dtype": self.dtype,
            "path": "fmdistill",
        }

    def head(self) -> LinearHead:
        """Return the classifier's last layer."""
        return LinearHead.of(self.model.head)


def classifier(
    network: Component,
    weights: str,
    statistics: str = "cifar100",
    maps: list[str] | None = None,
    device: str = "auto",
    dtype: DType = "auto",
    batch: int = 256,
    workers: int = 2,
) -> ClassTeacher:
    """Return a classifier that a recipe trained, as a teacher.

    `network` is that recipe's `student`, and `weights` its run or safetensors file. `statistics` names the pixels' mean
    and deviation, as in task `classify`; `maps` names the stages whose maps are cached. Raises UserError if the weights
    are missing or do not fit.
    """
    model = bind(network, CLASSIFIERS, "teacher.network")()
    path = Path(weights) / "student.safetensors" if Path(weights).is_dir() else Path(weights)
    if not path.is_file():
        raise UserError(
            f"teacher.weights={weights}: no such run or file; train the teacher first with its own recipe, or name the "
            f"safetensors file of a {network['name']}"
        )
    state = read_state(path, f"teacher.weights={weights}", model.state_dict().keys())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"teacher.weights={weights}: does not contain this {network['name']} ({reason}); set teacher.network to "
            f"the `student` of the recipe that trained it"
        ) from None
    preprocess = ClassPreprocess.of(model.image_size, statistics)
    settings: dict[str, Any] = {"device": device, "dtype": dtype, "batch": batch, "workers": workers}
    return ClassTeacher(model, preprocess, kind=dict(network), maps=maps or [], **settings)


def random_weights(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings with random weights instead of a checkpoint's; they are saved in `folder`."""
    path = folder / "drawn.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(bind(settings["network"], CLASSIFIERS, "teacher.network")().state_dict(), path)
    return {**settings, "weights": str(path)}


FAMILY = Family(
    name="classifier",
    teachers={"classifier": classifier},
    preprocess=ClassPreprocess,
    head=LinearHead,
    map_setting="maps",
    weights_file=weights_setting,
    random_weights=random_weights,
)
