"""Classifiers: published sizes, the same outputs for all, and formulas against an independent forward pass."""

import copy

import pytest
import torch
from nondegenerate import randomize
from torch import nn
from torch.nn import functional as F
from torchvision import models

from fmdistill.backbones.classifiers import CLASSIFIERS, UNSUPPORTED, torchvision
from fmdistill.backbones.mobile_cifar import shuffle
from fmdistill.images import decode
from fmdistill.images.digits import Digits
from fmdistill.registry import UserError, bind

# Thousands of parameters at 100 classes, and channels and sides of the blocks. The distillation tables print the same
# counts, some rounded up (0.704 M for wrn_16_2), and only two digits of resnet32's.
PUBLISHED = {
    "resnet20": (278, [(16, 32), (32, 16), (64, 8)]),
    "resnet32": (473, [(16, 32), (32, 16), (64, 8)]),
    "resnet56": (862, [(16, 32), (32, 16), (64, 8)]),
    "resnet110": (1737, [(16, 32), (32, 16), (64, 8)]),
    "resnet8x4": (1234, [(64, 32), (128, 16), (256, 8)]),
    "resnet32x4": (7434, [(64, 32), (128, 16), (256, 8)]),
    "wrn_16_2": (703, [(32, 32), (64, 16), (128, 8)]),
    "wrn_40_1": (570, [(16, 32), (32, 16), (64, 8)]),
    "wrn_40_2": (2255, [(32, 32), (64, 16), (128, 8)]),
    "vgg8": (3965, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg13": (9462, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "mobilenet_v2": (813, [(12, 16), (16, 8), (48, 4), (160, 2)]),
    "shufflenet_v1": (949, [(240, 16), (480, 8), (960, 4)]),
    "resnet50_cifar": (23705, [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
}
SIGNED = {"wrn_16_2", "wrn_40_1", "wrn_40_2", "mobilenet_v2"}  # whose blocks end without ReLU


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def blocks(outputs: dict[str, torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(value.shape[1:]) for name, value in outputs.items() if name.startswith("block")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_network_has_the_published_size_and_the_same_outputs(name):
    thousands, stages = PUBLISHED[name]
    model = randomize(CLASSIFIERS[name]())
    assert round(parameters(model) / 1000) == thousands
    assert (model.image_size, model.classes, model.head.out_features) == (32, 100, 100)
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 32, 32))
    assert blocks(outputs) == [(channels, side, side) for channels, side in stages]
    assert set(outputs) == {"logits", "feature", *(f"block{i + 1}" for i in range(len(stages)))}
    assert outputs["feature"].shape == (2, model.head.in_features) and outputs["feature"].std(0).max() > 0
    expected = outputs["feature"] @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(outputs["logits"], expected, rtol=1e-4, atol=1e-4)
    for block, value in outputs.items():
        if block.startswith("block"):
            assert (value.min() < 0) == (name in SIGNED), block
    assert CLASSIFIERS[name](7).classes == 7


def test_the_table_lists_every_network_and_binds_its_settings():
    assert set(CLASSIFIERS) == {*PUBLISHED, "digits_resnet", "torchvision"}
    bound = bind({"name": "mobilenet_v2", "classes": "10", "width": 0.25}, CLASSIFIERS, "student")()
    assert bound.classes == 10 and parameters(bound) < parameters(CLASSIFIERS["mobilenet_v2"](10)) / 2


@torch.no_grad()
def test_a_resnet_equals_its_formula():
    model = randomize(CLASSIFIERS["resnet8x4"]())
    weights = list(model.state_dict().values())
    image = torch.randn(2, 3, 32, 32)

    def next_conv_bn(x, stride=1):
        weight, gamma, beta, mean, variance, _ = (weights.pop(0) for _ in range(6))
        return F.batch_norm(F.conv2d(x, weight, None, stride, weight.shape[-1] // 2), mean, variance, gamma, beta)

    x = next_conv_bn(image).relu()
    for stage in (1, 2, 3):
        stride = 1 if stage == 1 else 2
        y = next_conv_bn(next_conv_bn(x, stride).relu())
        x = (y + next_conv_bn(x, stride)).relu()
        torch.testing.assert_close(model(image)[f"block{stage}"], x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_wide_resnet_returns_sums_as_blocks_and_pools_the_normed_last_one():
    model = randomize(CLASSIFIERS["wrn_16_2"]())
    outputs = model(torch.randn(2, 3, 32, 32))
    norm = model.network.tail[0]
    normed = F.batch_norm(outputs["block3"], norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(outputs["feature"], normed.relu().mean((2, 3)))
    unit = model.network.stages[1][0]
    entered = unit.norm(outputs["block1"])
    expected = unit.body(entered) + F.conv2d(entered, unit.shortcut.weight, stride=2)
    torch.testing.assert_close(model.network.stages[1][1](expected), outputs["block2"])


def test_shuffling_interleaves_the_channels_of_the_groups():
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 3)
    assert shuffle(x, 3)[1, :, 2, 1].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(shuffle(x.contiguous(memory_format=torch.channels_last), 3), shuffle(x, 3))


def test_convolutions_start_from_kaiming_and_every_parameter_learns():
    torch.manual_seed(0)
    for name in ("resnet8x4", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "digits_resnet"):
        model = CLASSIFIERS[name]().train()
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
                fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
                assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
                assert module.bias is None or not module.bias.any()
        outputs = model(torch.randn(8, 3, model.image_size, model.image_size))
        F.cross_entropy(outputs["logits"], torch.arange(8)).backward()
        silent = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        # A batch norm takes out what a bias before it adds.
        assert name == "vgg8" or silent == [], name


def test_a_small_teacher_learns_the_digits_in_seconds():
    source = Digits()
    held = {}
    for split, names in source.shards().items():
        images = [e for name in names for e in source.read(name)]
        pixels = torch.stack([torch.tensor(decode(e.data)[..., 0].ravel().tolist()) for e in images])
        image = (pixels.view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 255 - 0.305) / 0.376
        held[split] = image, torch.tensor([e.label for e in images])
    torch.manual_seed(0)
    model = CLASSIFIERS["digits_resnet"](width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    image, label = held["train"]
    for step in range(60):
        batch = torch.arange(step * 64, step * 64 + 64) % len(label)
        optimizer.zero_grad()
        F.cross_entropy(model(image[batch])["logits"], label[batch]).backward()
        optimizer.step()
    image, label = held["validation"]
    with torch.inference_mode():
        outputs = model.eval()(image)
    assert blocks(outputs) == [(8, 8, 8), (16, 4, 4), (32, 2, 2)]
    assert (outputs["logits"].argmax(1) == label).float().mean() > 0.9


@pytest.mark.parametrize(
    ("network", "features", "stages"),
    [
        ("resnet18", 512, [(64, 56), (128, 28), (256, 14), (512, 7)]),
        ("mobilenet_v2", 1280, [(24, 56), (32, 28), (96, 14), (320, 7)]),
        ("shufflenet_v2_x0_5", 1024, [(48, 28), (96, 14), (192, 7)]),
        ("efficientnet_b0", 1280, []),
    ],
)
@torch.no_grad()
def test_torchvisions_network_has_its_own_names_and_logits(network, features, stages):
    classifier = randomize(torchvision(network, classes=5))
    reference = models.get_model(network, weights=None, num_classes=5).eval()
    reference.load_state_dict(classifier.network.model.state_dict(), strict=True)
    assert (classifier.image_size, classifier.classes, classifier.head.in_features) == (224, 5, features)
    image = torch.randn(2, 3, 224, 224)
    expected = reference(image)
    for model in (classifier, copy.deepcopy(classifier)):
        outputs = model(image)
        torch.testing.assert_close(outputs["logits"], expected)
        torch.testing.assert_close(model.head(outputs["feature"]), expected)
        assert blocks(outputs) == [(channels, side, side) for channels, side in stages]
    assert classifier.train()(image)["feature"].shape == (2, features)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())


def test_a_wrong_setting_raises_one_clear_line():
    wrong = [
        (lambda: CLASSIFIERS["resnet20"](1), "classes=1: expected at least 2"),
        (lambda: torchvision("resnet18", 0), "classes=0: expected at least 2"),
        (lambda: torchvision("resnet81"), "network=resnet81.*Did you mean 'resnet18'"),
        (lambda: CLASSIFIERS["digits_resnet"](depth=9), "depth=9: expected 6n"),
        (lambda: CLASSIFIERS["digits_resnet"](width=0), "width=0: expected at least 1"),
        (lambda: CLASSIFIERS["mobilenet_v2"](width=0.0), "width=0.0: expected a factor"),
        *((lambda name=name: torchvision(name), f"network={name}: not a supported") for name in UNSUPPORTED),
    ]
    for build, says in wrong:
        with pytest.raises(UserError, match=says) as caught:
            build()
        assert "\n" not in str(caught.value)
    assert set(UNSUPPORTED) <= set(models.list_models(module=models))
