"""The classifiers that a recipe can name, for teachers and students alike; torchvision's are included."""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision import models

from fmdistill.backbones.classifier import Classifier, check_classes
from fmdistill.backbones.mobile_cifar import mobilenet_v2, shufflenet_v1
from fmdistill.backbones.resnet_cifar import (
    digits_resnet,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet50_cifar,
    resnet56,
    resnet110,
    wrn_16_2,
    wrn_40_1,
    wrn_40_2,
)
from fmdistill.backbones.vgg_cifar import vgg8, vgg13
from fmdistill.registry import UserError, suggest

# The modules of a torchvision class whose outputs are block1, block2, ...: the last before each coarser grid.
BLOCKS = {
    models.ResNet: ("layer1", "layer2", "layer3", "layer4"),  # resnet, resnext and wide_resnet, after their ReLU
    models.MobileNetV2: ("features.3", "features.6", "features.13", "features.17"),  # linear, without ReLU
    models.ShuffleNetV2: ("stage2", "stage3", "stage4"),
    models.RegNet: tuple(f"trunk_output.block{i}" for i in range(1, 5)),  # after their ReLU
    models.ConvNeXt: ("features.1", "features.3", "features.5", "features.7"),  # sums, without norm
}
# The first two return more than logits in train mode, the others have no linear head.
UNSUPPORTED = ("googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1")


class HookedNetwork(nn.Module):
    """A network of another package; forward hooks read the outputs of its `blocks` and the input of its `head`."""

    def __init__(self, model: nn.Module, head: str, blocks: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.head_name, self.blocks = model, head, blocks

    def forward(self, image_B3SS: Tensor) -> dict[str, Tensor]:
        """Return {"logits", "feature", "block1", ...}, as described at `Classifier`."""
        outputs: dict[str, Tensor] = {}
        # Hooks exist for this call only, so that a copy of the network never writes into another's outputs.
        head = self.model.get_submodule(self.head_name)
        hooks = [head.register_forward_pre_hook(lambda _, inputs: outputs.update(feature=inputs[0]))]
        for number, name in enumerate(self.blocks, start=1):
            hooks.append(self.model.get_submodule(name).register_forward_hook(_recording(outputs, f"block{number}")))
        try:
            return {"logits": self.model(image_B3SS), **outputs}
        finally:
            for hook in hooks:
                hook.remove()


def torchvision(network: str = "resnet18", classes: int = 1000) -> Classifier:
    """Return torchvision's classifier called `network`, untrained, for 224-px images.

    The names in its state are torchvision's own after "network.model.". The feature is the input of its last linear
    layer, in VGG and AlexNet a hidden layer. Only the network classes in `BLOCKS` (ResNet, MobileNetV2, ...) have
    block1, block2, ... Raises UserError for an unknown or unsupported name.
    """
    known = [name for name in models.list_models(module=models) if name not in UNSUPPORTED]
    if network not in known:
        raise UserError(
            f"torchvision: network={network}: not a supported classifier of torchvision's.{suggest(network, known)}"
        )
    model = models.get_model(network, weights=None, num_classes=check_classes(classes))
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return Classifier(HookedNetwork(model, head, BLOCKS.get(type(model), ())), f"model.{head}", image_size=224)


def _recording(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return a forward hook that stores a module's output as `outputs[name]`."""
    return lambda module, inputs, output: outputs.update({name: output})


CLASSIFIERS: dict[str, Callable[..., Classifier]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet32x4": resnet32x4,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
    "vgg8": vgg8,
    "vgg13": vgg13,
    "mobilenet_v2": mobilenet_v2,
    "shufflenet_v1": shufflenet_v1,
    "resnet50_cifar": resnet50_cifar,
    "digits_resnet": digits_resnet,
    "torchvision": torchvision,
}
