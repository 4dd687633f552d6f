"""The student equals open_clip's timm tower name by name and bit by bit, and starts from the same files as SAM's."""

import pytest
import torch
from nondegenerate import randomize
from open_clip.timm_model import TimmModel
from safetensors.torch import save_file
from torch import nn

from fmdistill.backbones.mobilesam_names import mobilesam_names
from fmdistill.backbones.tinyvit import tinyvit_sam
from fmdistill.backbones.tinyvit_clip import TinyViTCLIP, tinyvit_clip
from fmdistill.mini.tinyvit import tinyvit_clip_mini
from fmdistill.registry import UserError


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("size", "millions"), [("5m", 5.07 + 0.16), ("11m", 10.55 + 0.23), ("21m", 20.62 + 0.295)])
def test_every_size_has_open_clips_names_and_shapes(size, millions):
    with torch.device("meta"):
        student = TinyViTCLIP(f"tiny_vit_{size}_224", 512)
        reference = TimmModel(f"tiny_vit_{size}_224", 512, 224, pool="avg", proj="linear")
    assert shapes(student) == shapes(reference)
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert (student.image_size, student.out_channels, student.timm_name) == (224, 512, f"tiny_vit_{size}_224")


def test_open_clip_computes_the_same_embedding_from_the_state_bit_by_bit():
    student = randomize(tinyvit_clip("5m", embed_dim=48, image_size=64))
    reference = TimmModel("tiny_vit_5m_224", 48, 64, pool="avg", proj="linear").eval()
    reference.load_state_dict(student.state_dict(), strict=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        embedding = student(image)["embedding"]
        assert embedding.shape == (2, 48) and torch.equal(embedding, reference(image))
        reference.trunk.stages[2].blocks[0].attn.attention_biases.zero_()
        reference.train().eval()  # timm keeps the old biases in eval mode
        assert not torch.allclose(embedding, reference(image), atol=1e-3)


def test_a_state_loaded_in_eval_mode_takes_effect():
    student, image = randomize(tinyvit_clip_mini()), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = student(image)["embedding"]
        state = {k: torch.zeros_like(v) if "attention_biases" in k else v for k, v in student.state_dict().items()}
        student.load_state_dict(state)
        assert (student(image)["embedding"] - before).abs().max() > 1e-3


def test_mini_is_small_and_every_parameter_learns():
    student = randomize(tinyvit_clip_mini()).train()
    assert 1_500_000 < sum(p.numel() for p in student.parameters()) < 2_000_000
    assert (student.image_size, student.out_channels, student.timm_name) == (64, 128, None)
    embedding = student(torch.randn(4, 3, 64, 64))["embedding"]
    assert embedding.shape == (4, 128)
    embedding.square().sum().backward()
    silent = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def renamed(state: dict[str, torch.Tensor], names: str) -> dict[str, torch.Tensor]:
    """Return the state of a CLIP student under the names of other programs."""
    trunk = {name.removeprefix("trunk."): value for name, value in state.items() if name.startswith("trunk.")}
    if names == "timm":
        return trunk | {"head.fc.weight": torch.ones(5, 192), "head.fc.bias": torch.ones(5)}
    if names == "microsoft":
        body = mobilesam_names({f"trunk.{k}": v for k, v in trunk.items() if not k.startswith("head.")})
        return body | {"norm_head.weight": torch.ones(192), "head.bias": torch.zeros(1000)}
    if names == "open_clip":
        return {f"visual.{k}": v for k, v in state.items()} | {"ln_final.bias": torch.ones(8)}
    return state


@pytest.mark.parametrize("names", ["timm", "microsoft", "open_clip", "fmdistill"])
def test_pretrained_path_fills_the_student(tmp_path, names):
    source = randomize(tinyvit_clip_mini()).state_dict()
    save_file(renamed(source, names), tmp_path / "state.safetensors")
    state = tinyvit_clip_mini(pretrained=str(tmp_path / "state.safetensors")).state_dict()
    given = {"timm": "trunk.", "microsoft": ("trunk.patch_embed.", "trunk.stages.")}.get(names, "")
    assert all(torch.equal(state[k], v) == k.startswith(given) or k.endswith("tracked") for k, v in source.items())


def test_weights_that_do_not_fit_raise(tmp_path):
    save_file(tinyvit_sam("5m").state_dict(), tmp_path / "sam.safetensors")
    with pytest.raises(UserError, match=r"does not fit tiny_vit_5m_224 at 224 px, .*first head\.proj\.weight"):
        tinyvit_clip("5m", pretrained=str(tmp_path / "sam.safetensors"))
    with pytest.raises(UserError, match="neither a file .* nor a timm tag of tiny_vit_11m_224"):
        tinyvit_clip("11m", pretrained="dist_in22k_ft")
    with pytest.raises(UserError, match=r"student\.image_size=100: expected .* multiple of TinyViT's stride 32"):
        tinyvit_clip(image_size=100)
