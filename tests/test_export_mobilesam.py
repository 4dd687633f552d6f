import pytest
import torch
from torch import nn

from fmdistill.backbones.mobilesam_names import timm_names
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.tinyvit import TinyViTSAM, tinyvit_sam
from fmdistill.export import mobilesam
from fmdistill.mini.tinyvit import tinyvit_sam_mini
from fmdistill.registry import UserError

FULL = {
    "embed_dim": 256, "image_embedding_size": 64, "image_size": 1024, "mask_in_chans": 16, "transformer_depth": 2,
    "mlp_dim": 2048, "num_heads": 8, "iou_head_hidden_dim": 256, "iou_head_depth": 3, "num_multimask_outputs": 3,
}  # fmt: skip
MINI = FULL | {"embed_dim": 128, "image_embedding_size": 16, "image_size": 256, "mlp_dim": 128, "num_heads": 4}


def test_5m_writes_every_parameter_of_mobilesam(tmp_path):
    student = tinyvit_sam("5m")
    head = PromptHead.from_config(FULL)
    state = torch.load(mobilesam.export(student, head, tmp_path / "deep" / "out.pt"), weights_only=True)
    parts = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
    assert all(name.startswith(parts) for name in state)
    buffers = ("running_mean", "running_var", "num_batches_tracked", "gaussian_matrix")
    assert sum(v.numel() for k, v in state.items() if not k.endswith(buffers)) == 10_130_092
    assert state["image_encoder.head.weight"].shape == (1000, 320)
    assert not state["image_encoder.norm_head.weight"].any()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out.pt"]

    with torch.device("meta"):
        again = TinyViTSAM()
    again = again.to_empty(device="cpu")
    encoder = {k.removeprefix(parts[0]): v for k, v in state.items() if k.startswith(parts[0])}
    again.load_state_dict(timm_names(encoder), strict=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in student.state_dict().items())
    decoder = PromptHead.from_config(FULL)
    decoder.load_state_dict({k: v for k, v in state.items() if not k.startswith(parts[0])}, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), head.parameters(), strict=True))


def test_mini_export_reads_back_as_a_student(tmp_path, caplog):
    student = tinyvit_sam_mini()
    path = mobilesam.export(student.bfloat16(), PromptHead.from_config(MINI), tmp_path / "mini.pt")
    assert "quarter scale" in caplog.text
    state = torch.load(path, weights_only=True)
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}
    again = tinyvit_sam_mini(pretrained=str(path))
    assert all(torch.equal(a.float(), b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_the_list_of_shapes_is_mobilesam_s():
    shapes = mobilesam.official_shapes()
    assert mobilesam.parameters(shapes) == 10_130_092
    decoder = {name: tuple(value.shape) for name, value in PromptHead.from_config(FULL).state_dict().items()}
    assert decoder.items() <= shapes.items()
    assert shapes["image_encoder.layers.2.blocks.5.attn.attention_biases"] == (5, 196)  # 14 x 14 distances
    assert shapes["image_encoder.layers.2.downsample.conv3.bn.num_batches_tracked"] == ()


def test_another_size_logs_its_number_of_parameters(tmp_path, caplog):
    caplog.set_level("INFO")
    state = torch.load(
        mobilesam.export(tinyvit_sam("11m"), PromptHead.from_config(FULL), tmp_path / "11m.pt"), weights_only=True
    )
    buffers = ("running_mean", "running_var", "num_batches_tracked", "gaussian_matrix")
    count = sum(value.numel() for name, value in state.items() if not name.endswith(buffers))
    assert f"tiny_vit_11m_224: {count:,} parameters" in caplog.text and count > 10_130_092
    official = mobilesam.official_shapes()
    assert official.keys() == state.keys()  # the same map; the sizes differ in width alone


class Renamed(TinyViTSAM):
    """A student whose neck's first layer has another name."""

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name.replace("neck.0", "neck.9"): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("student", "config", "says"),
    [
        (nn.Linear(2, 2), MINI, "the student is a Linear"),
        (TinyViTSAM(image_size=256, out_channels=32), MINI, "channels 32 is not the decoder's 128"),
        (TinyViTSAM(image_size=512, out_channels=128), MINI, "image size 512 is not the decoder's 256"),
        (
            TinyViTSAM(),
            FULL | {"mlp_dim": 64},
            r"lin1.bias: \(64,\) in the student, \(2048,\) in MobileSAM .* and 10,130,092 parameters",
        ),
        (
            TinyViTSAM("tiny_vit_11m_224"),
            FULL | {"mlp_dim": 64},
            r"lin1.bias: \(64,\) in the student, \(2048,\) in MobileSAM",
        ),
        # another shape of one small tensor
        (TinyViTSAM(num_heads=(2, 8, 5, 10), window_sizes=(7, 7, 14, 7)), FULL, "attention_biases: "),
        (
            Renamed(),
            FULL,
            r"2 names or shapes differ.*neck.0.weight: absent in the student, \(256, 320, 1, 1\)",
        ),
    ],
)
def test_a_student_that_does_not_fit_raises_one_clear_line(tmp_path, student, config, says):
    with pytest.raises(UserError, match=says) as error:
        mobilesam.export(student, PromptHead.from_config(config), tmp_path / "out.pt")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_run_exports_the_decoder_beside_the_cache(tmp_path, monkeypatch):
    from fmdistill import export
    from fmdistill.export import source

    head = PromptHead.from_config(MINI)
    head.save(tmp_path / "cache")
    (tmp_path / "run").mkdir()
    settings = ["out: x", "images: {name: a}", "student: {name: a}", "task: {name: a}"]
    settings += ["optimizer: {name: a}", "schedule: {name: a}", "train: {steps: 1}"]
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text("\n".join([*settings, f"cache: {{root: {tmp_path / 'cache'}}}"]))
    monkeypatch.setattr(source, "load_student", lambda run, trust: tinyvit_sam_mini())
    monkeypatch.setattr(source.manifest, "read", lambda folder: {"family": "sam"})
    state = torch.load(export.run(tmp_path / "run", "mobilesam", tmp_path / "out.pt"), weights_only=True)
    assert torch.equal(state["mask_decoder.iou_token.weight"], head.mask_decoder.iou_token.weight)

    with pytest.raises(UserError, match="Did you mean 'mobilesam'"):
        export.run(tmp_path / "run", "mobile_sam", tmp_path / "out.pt")
    with pytest.raises(UserError, match="export.precision: no such setting"):
        export.run(tmp_path / "run", "mobilesam", tmp_path / "out.pt", settings={"precision": "int8"})
    recipe.write_text("\n".join(settings))
    with pytest.raises(UserError, match="set cache.root"):
        export.run(tmp_path / "run", "mobilesam", tmp_path / "out.pt")
