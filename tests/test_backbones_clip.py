"""CLIP compared with open_clip's own transform, towers and tokenizer; wrong and damaged files."""

import json
import pickle
from pathlib import Path

import clips
import open_clip
import pytest
import torch
from nondegenerate import randomize
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from fmdistill.backbones.clip import ClipPreprocess, TextHead, build_clip, load_clip
from fmdistill.backbones.clip_tags import ClipSettings
from fmdistill.cache.codec import CODECS
from fmdistill.mini.photos import photograph
from fmdistill.registry import UserError
from fmdistill.teachers.clip import open_clip as open_clip_teacher
from fmdistill.teachers.output import Output

SIZES = ((400, 600), (600, 400), (224, 224), (100, 90), (301, 1000), (57, 500))


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(photograph("coffee")).resize((width, height), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", [{}, {"resize_mode": "squash"}, {"interpolation": "bilinear", "size": 97}])
def test_the_two_halves_equal_open_clip_s_transform_bit_for_bit(size, settings):
    cfg = PreprocessCfg(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), **settings)
    preprocess = ClipPreprocess.from_config({**vars(cfg)}, 1)
    pixels, resized = preprocess.prepare(picture(*size))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, cfg.size, cfg.size) and resized == (cfg.size,) * 2
    normalized = preprocess.normalize(pixels[None], torch.tensor([resized]))[0]
    assert torch.equal(normalized, image_transform_v2(cfg, is_train=False)(picture(*size)))
    assert ClipPreprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


def test_every_token_of_a_crop_is_valid_and_other_preprocessing_raises():
    preprocess = ClipPreprocess(64, 16)
    valid = preprocess.valid(torch.tensor([[64, 64], [64, 64]]))
    assert valid.shape == (2, 4, 4) and valid.all()
    for wrong in ({"resize": "longest, PIL bicubic"}, {"resize": "shortest"}, {"fill": 0}, {"mean": None}):
        with pytest.raises(UserError, match="preprocessing"):
            ClipPreprocess.from_json({**preprocess.to_json(), **wrong})
    with pytest.raises(UserError, match="resize_mode=longest.*shortest, squash"):
        ClipPreprocess.from_config({**clips.PREPROCESS_CFG, "resize_mode": "longest"}, 8)
    with pytest.raises(UserError, match=r"size=\[32, 64\]: only squares"):
        ClipPreprocess.from_config({**clips.PREPROCESS_CFG, "size": [32, 64]}, 8)
    with pytest.raises(UserError, match="not the 'clip' preprocessing"):
        ClipPreprocess.from_json({"name": "dino"})


@pytest.mark.slow
def test_vit_b_32_equals_encode_image_on_open_clip_s_own_images_and_encode_text_bit_for_bit(monkeypatch):
    """At full size: the teacher from a checkpoint file, with QuickGELU by its name; a planted GELU fails."""
    made, _, transform = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained_text=False)
    randomize(made, 3)
    monkeypatch.setattr("fmdistill.backbones.clip_weights.read_state", lambda *_: made.state_dict())
    monkeypatch.setattr("fmdistill.backbones.clip_weights.Path.is_file", lambda self: True)  # 600 MB less to write
    teacher = open_clip_teacher("ViT-B-32-quickgelu", "weights.safetensors", device="cpu", dtype="fp32")
    monkeypatch.undo()
    pictures = [picture(*size) for size in SIZES[:4]]
    with torch.no_grad():
        expected = made.encode_image(torch.stack([transform(p) for p in pictures]))
    prepared = [teacher.preprocess.prepare(p) for p in pictures]
    pixels, sizes = torch.stack([p for p, _ in prepared]), torch.tensor([size for _, size in prepared])
    outputs = teacher(pixels, sizes)
    assert outputs.keys() == {"embedding"} and teacher.outputs == {"embedding": Output((512,))} and expected.std() > 0.1
    assert (outputs["embedding"] - expected).norm() <= 1e-5 * expected.norm()
    fp16 = CODECS["fp16"]
    stored_BD = fp16.decode(fp16.pack(outputs["embedding"].numpy()), expected.shape)
    assert (abs(stored_BD - expected.numpy()) <= 2.0**-11 * expected.abs().numpy() + 1e-5 * expected.std().item()).all()
    texts = ["a photo of a cat", "", "Ein Mops & 7 Äpfel"]
    with torch.no_grad():
        text = made.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
    assert torch.equal(teacher.head().encode_text(texts), text)
    for block in made.visual.transformer.resblocks:
        block.mlp.gelu = torch.nn.GELU()
    teacher.visual.load_state_dict(made.visual.state_dict())
    teacher.visual.transformer = made.visual.transformer
    assert (teacher(pixels, sizes)["embedding"] - expected).norm() > 1e-3 * expected.norm()


def test_the_text_head_equals_open_clip_s_before_and_after_saving(tmp_path):
    made = clips.model()
    head, texts = TextHead.from_clip(made, clips.CONFIG), [f"a photo of {n} cats" for n in range(7)]
    with torch.no_grad():
        expected = made.encode_text(open_clip.SimpleTokenizer(context_length=16)(texts))
    assert torch.equal(head.encode_text(texts), expected) and expected.norm(dim=1).std() > 0
    assert torch.allclose(head.encode_text(texts, batch=2), expected, atol=1e-5)
    assert head.scale == pytest.approx(float(made.logit_scale.exp()))
    names = {name for name in made.state_dict() if not name.startswith("visual.")}
    assert set(head.state_dict()) == names and {"logit_scale", "text_projection", "token_embedding.weight"} <= names
    head.save(tmp_path)
    loaded = TextHead.load(tmp_path)
    assert torch.equal(loaded.encode_text(texts), expected) and not loaded.training
    assert loaded.config == head.config == json.loads(json.dumps(clips.CONFIG))
    made.visual(torch.zeros(1, 3, 32, 32))  # the model keeps its image tower


@pytest.mark.parametrize("how", ["gone", "cut", "other config", "no json"])
def test_a_damaged_text_head_raises_one_line(tmp_path, how):
    TextHead.from_clip(clips.model(), clips.CONFIG).save(tmp_path)
    if how == "gone":
        (tmp_path / "head.safetensors").unlink()
    elif how == "cut":
        (tmp_path / "head.safetensors").write_bytes((tmp_path / "head.safetensors").read_bytes()[:3000])
    elif how == "other config":
        (tmp_path / "head.json").write_text('{"model_cfg": {}}')
    else:
        (tmp_path / "head.json").write_text("[")
    with pytest.raises(UserError, match="no readable text head") as error:
        TextHead.load(tmp_path)
    assert "\n" not in str(error.value)


def test_custom_text_towers_have_their_own_names(tmp_path):
    made = randomize(open_clip.CustomTextCLIP(**clips.MODEL_CFG), 1)
    config = {**clips.CONFIG, "model_cfg": {**clips.MODEL_CFG, "custom_text": True}}
    head = TextHead.from_clip(made, config)
    head.save(tmp_path)
    with torch.no_grad():
        expected = made.encode_text(open_clip.SimpleTokenizer(context_length=16)(["a cat"]))
    assert "text.token_embedding.weight" in head.state_dict()
    assert torch.equal(TextHead.load(tmp_path).encode_text(["a cat"]), expected)


def test_a_local_folder_determines_weights_quick_gelu_and_preprocessing(tmp_path):
    name = clips.folder(tmp_path / "toy", seed=4)
    made, config = load_clip(name)
    reference, image = clips.model(4), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.encode_image(image)
        assert torch.equal(made.encode_image(image), expected)
        without = clips.model(4, quick_gelu=False).encode_image(image)
    assert (without - expected).norm() > 1e-3 * expected.norm() and config["model_cfg"]["quick_gelu"]
    assert not made.training and tuple(config["preprocess_cfg"]["mean"]) == (0.5, 0.4, 0.3)


def test_a_tag_that_needs_quick_gelu_has_it_and_its_preprocessing(monkeypatch, tmp_path):
    passed = {}

    def create(name, **settings):
        passed.update(settings, name=name)
        made = clips.model(5, quick_gelu=settings["force_quick_gelu"])
        made.visual.preprocess_cfg = {**clips.PREPROCESS_CFG, **settings["force_preprocess_cfg"]}
        return made

    weights = tmp_path / "w.safetensors"
    save_file(clips.model(6).state_dict(), weights)
    monkeypatch.setattr("fmdistill.backbones.clip_weights.download_pretrained", lambda tag: str(weights))
    monkeypatch.setattr(open_clip, "create_model", create)
    for model, tag, quick in (
        ("ViT-B-32", "openai", True),
        ("ViT-B/16", "openai", True),
        ("ViT-B-32", "laion2b_e16", False),
    ):
        made, config = load_clip(model, tag)
        assert passed["force_quick_gelu"] is quick is bool(config["model_cfg"].get("quick_gelu"))
        assert passed["name"] == model.replace("/", "-") and config["preprocess_cfg"]["interpolation"] == "bicubic"
        assert torch.equal(made.state_dict()["visual.proj"], clips.model(6).state_dict()["visual.proj"])


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("model", "pretrained", "says"),
    [
        ("ViT-B-33", "openai", r"teacher\.model=ViT-B-33: .*no such model.* Did you mean 'ViT-B-32'"),
        ("ViT-B-32", "opnai", r"teacher\.pretrained=opnai: neither a file nor a tag.* Did you mean 'openai'"),
        ("ViT-B-32", "{}/none.pt", "none.pt: neither a file nor a tag of ViT-B-32"),
        ("ViT-B-32", "{}/other.safetensors", r"not a checkpoint of ViT-B-32 \(Error\(s\) in loading"),
        ("ViT-B-32", "{}/bomb.pt", "not a readable checkpoint of plain tensors .*nothing in it was executed"),
        ("ViT-B-32", "{}/script.pt", "not a readable checkpoint of plain tensors .*nothing in it was executed"),
        ("ViT-B-32", "{}/text.pt", "not a readable checkpoint of plain tensors"),
        ("local-dir:{}/missing", "none", r"has no open_clip_config\.json"),
        ("local-dir:{}/bare", "none", "not a readable open_clip folder"),
        ("local-dir:{}/torn", "none", "not a readable open_clip folder"),
        ("local-dir:{}/toy", "openai", "contains its own weights; set it to none"),
        ("roberta-ViT-B-32", "none", "text tower roberta-base is a transformers model"),
        ("hf-hub:laion/x", "none", "no such model"),
    ],
)
def test_a_wrong_setting_raises_one_clear_line(tmp_path, monkeypatch, model, pretrained, says):
    clips.folder(tmp_path / "toy")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/open_clip_config.json").write_text(json.dumps(clips.CONFIG))
    clips.folder(tmp_path / "torn")
    (tmp_path / "torn/open_clip_model.safetensors").write_bytes(b"x" * 100)
    save_file(clips.model().state_dict(), tmp_path / "other.safetensors")
    torch.save({"w": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    if model == "ViT-B-32":  # the network itself does not matter; a small one is made faster
        made = clips.model()
        made.visual.proj = torch.nn.Parameter(torch.zeros(3, 3))
        made.visual.preprocess_cfg = clips.PREPROCESS_CFG
        monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: made)
    settings = ClipSettings(as_tag="laion2b_e16") if pretrained.startswith("{}") else ClipSettings()
    with pytest.raises(UserError, match=says) as error:
        build_clip(model.format(tmp_path), pretrained.format(tmp_path), settings)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    assert not (tmp_path / "ran").exists()
    with pytest.raises(pickle.UnpicklingError):  # the bomb is one
        torch.load(tmp_path / "bomb.pt", weights_only=True)


def test_openai_s_own_file_is_recognised_by_its_hash_and_uses_quick_gelu(tmp_path, monkeypatch):
    class Weights(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Parameter(torch.arange(6.0).view(2, 3).half())
            self.register_buffer("context_length", torch.tensor(77))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.proj

    from fmdistill.backbones import clip_weights

    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(Weights()).save(path)
    assert not clip_weights.is_openai(path)
    known = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    monkeypatch.setattr(clip_weights, "file_hash", lambda _: known)
    assert clip_weights.is_openai(path)
    config = open_clip.get_model_config("ViT-B-32")
    assert clip_weights._resolve("ViT-B-32", str(path), config, ClipSettings())[2] is True
    state = clip_weights._openai_state(path)
    assert list(state) == ["proj"] and state["proj"].dtype == torch.float32 and state["proj"][1, 2] == 5


def test_an_untrained_model_is_the_same_every_time_and_does_not_change_the_generator_or_logging(caplog):
    torch.manual_seed(1)
    first, drawn = build_clip("ViT-S-32"), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first.visual.proj, build_clip("ViT-S-32").visual.proj) and not first.training
    assert set(caplog.messages) == {"ViT-S-32 is untrained: teacher.pretrained=none"}
