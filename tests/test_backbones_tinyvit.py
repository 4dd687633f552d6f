import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fmdistill.backbones.mobilesam_names import mobilesam_names, timm_names
from fmdistill.backbones.tinyvit import TinyViTSAM, load_pretrained, tinyvit_sam
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.registry import UserError


def conv_bn(name, *shape):
    statistics = {f"{name}.bn.{k}": (shape[0],) for k in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.c.weight": shape, **statistics, f"{name}.bn.num_batches_tracked": ()}


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def mobilesam_encoder(dims=(64, 128, 160, 320), depths=(2, 2, 6, 2), heads=(2, 4, 5, 10), windows=(7, 7, 14, 7)):
    """Return the names and shapes of MobileSAM's image_encoder, derived from its module tree (tiny_vit_sam.py)."""
    first = dims[0]
    state = conv_bn("patch_embed.seq.0", first // 2, 3, 3, 3) | conv_bn("patch_embed.seq.2", first, first // 2, 3, 3)
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            if i == 0:
                state |= conv_bn(f"{block}.conv1", 4 * dim, dim, 1, 1)
                state |= conv_bn(f"{block}.conv2", 4 * dim, 1, 3, 3)
                state |= conv_bn(f"{block}.conv3", dim, 4 * dim, 1, 1)
                continue
            state |= {f"{block}.attn.attention_biases": (heads[i], windows[i] ** 2)}
            state |= affine(f"{block}.attn.norm", dim) | affine(f"{block}.mlp.norm", dim)
            state |= affine(f"{block}.attn.qkv", 3 * dim, dim) | affine(f"{block}.attn.proj", dim, dim)
            state |= affine(f"{block}.mlp.fc1", 4 * dim, dim) | affine(f"{block}.mlp.fc2", dim, 4 * dim)
            state |= conv_bn(f"{block}.local_conv", dim, 1, 3, 3)
        if i < 3:
            merge, wide = f"layers.{i}.downsample", dims[i + 1]
            state |= conv_bn(f"{merge}.conv1", wide, dim, 1, 1) | conv_bn(f"{merge}.conv2", wide, 1, 3, 3)
            state |= conv_bn(f"{merge}.conv3", wide, wide, 1, 1)
    state |= affine("norm_head", dims[-1]) | affine("head", 1000, dims[-1])
    state |= {"neck.0.weight": (256, dims[-1], 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    return state | affine("neck.1", 256) | affine("neck.3", 256)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and BatchNorm statistic: at initialisation the attention biases are zero, the scales one."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.data = 1 + 0.2 * noise.abs()
        elif value.ndim > 1 and not name.endswith("attention_biases"):
            value.data = noise / value[0].numel() ** 0.5
        else:
            value.data = 0.5 * noise
    return module


def test_5m_has_mobilesams_parameters():
    student = tinyvit_sam("5m")
    assert sum(p.numel() for p in student.trunk.parameters()) == 5_071_124
    assert sum(p.numel() for p in student.neck.parameters()) == 672_768
    assert (student.image_size, student.out_channels) == (1024, 256)


def test_5m_loads_mobilesams_state_dict():
    shapes = mobilesam_encoder()
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.rand(s, generator=generator) if s else torch.tensor(7) for k, s in shapes.items()}
    student = tinyvit_sam("5m")
    student.load_state_dict(timm_names(state), strict=True)
    back = mobilesam_names(student.state_dict())
    heads = {"norm_head.weight", "norm_head.bias", "head.weight", "head.bias"}
    assert back.keys() == shapes.keys() - heads
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize(
    ("size", "dims", "heads"),
    [("11m", (64, 128, 256, 448), (2, 4, 8, 14)), ("21m", (96, 192, 384, 576), (3, 6, 12, 18))],
)
def test_larger_sizes_have_mobilesams_names(size, dims, heads):
    with torch.device("meta"):
        own_names = mobilesam_names(TinyViTSAM(f"tiny_vit_{size}_224").state_dict())
    mobilesam_shapes = mobilesam_encoder(dims, heads=heads)
    assert {k: tuple(v.shape) for k, v in own_names.items()} == {
        k: s for k, s in mobilesam_shapes.items() if "head." not in k
    }


def test_the_embedding_has_stride_16():
    image = torch.zeros(1, 3, 64, 64)
    assert TinyViTSAM(image_size=64)(image)["embedding"].shape == (1, 256, 4, 4)
    assert TinyViTSAM(image_size=64, last_stride=2)(image)["embedding"].shape == (1, 256, 2, 2)


def test_mini_is_a_quarter_and_small():
    student = tinyvit_sam_mini()
    assert student(torch.zeros(1, 3, 256, 256))["embedding"].shape == (1, student.out_channels, 16, 16)
    assert student.image_size == 256 and student.out_channels == 128
    assert 300_000 < sum(p.numel() for p in student.parameters()) < 900_000


def test_every_parameter_learns():
    student = randomise(TinyViTSAM(image_size=64))
    student(torch.randn(2, 3, 64, 64))["embedding"].square().sum().backward()
    silent = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_zeroed_attention_biases_change_the_embedding():
    student = randomise(TinyViTSAM(image_size=128)).eval()
    image = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        before = student(image)["embedding"]
        state = {k: torch.zeros_like(v) if "attention_biases" in k else v for k, v in student.state_dict().items()}
        student.load_state_dict(state)  # in eval mode, where timm has kept the old biases
        after = student(image)["embedding"]
    assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize("names", ["timm", "mobilesam", "fmdistill"])
def test_pretrained_path_fills_the_student(tmp_path, names):
    source = randomise(tinyvit_sam_mini())
    state = source.state_dict()
    if names == "timm":
        trunk = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
        state = trunk | {"head.fc.weight": torch.ones(5, 96)}
    if names == "mobilesam":
        state = {f"image_encoder.{k}": v for k, v in mobilesam_names(state).items()}
        state |= {"image_encoder.head.bias": torch.zeros(1000), "mask_decoder.iou_token.weight": torch.zeros(1, 64)}
    path = tmp_path / ("state.pth" if names == "mobilesam" else "state.safetensors")
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    student = tinyvit_sam_mini(pretrained=str(path))
    prefix = "trunk." if names == "timm" else ""
    expected = {k: v for k, v in source.state_dict().items() if k.startswith(prefix)}
    assert all(torch.equal(student.state_dict()[k], v) for k, v in expected.items())


def test_pretrained_errors_have_one_line(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    other = tmp_path / "other.safetensors"
    save_file({"stages.0.weight": torch.zeros(1)}, other)
    bomb = tmp_path / "bomb.pth"
    torch.save({"model": print}, bomb)
    student = tinyvit_sam("5m")
    monkeypatch.setattr("fmdistill.backbones.tinyvit.timm.create_model", offline)
    for pretrained, says in {
        "in22k_ft_in1k": "Did you mean 'dist_in22k_ft_in1k'",
        "dist_in22k_ft_in1k": "could not download",
        str(tmp_path / "absent.pth"): "no such file",
        str(other): "does not fit tiny_vit_5m_224 at 1024 px",
        str(bomb): "not a readable checkpoint of plain tensors",
    }.items():
        with pytest.raises(UserError, match=says) as error:
            load_pretrained(student, pretrained)
        assert "\n" not in str(error.value) and pretrained in str(error.value)
