"""Teachers against segment_anything's own predictor, at full size, with weights that leave nothing at zero."""

import numpy as np
import pytest
import torch
from nondegenerate import randomize
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling.image_encoder import Attention

from fmdistill.backbones.device import pick_device
from fmdistill.backbones.mini import sam_mini_student
from fmdistill.cache.teacher import SamTeacher, own_device, sam_mini, state_hash
from fmdistill.export import half
from fmdistill.images.photos import photograph
from fmdistill.registry import UserError


@pytest.fixture(scope="module")
def vit_b():
    return randomize(sam_model_registry["vit_b"](), 3)


def ours(sam, image: np.ndarray) -> torch.Tensor:
    teacher = SamTeacher(sam, name="sam_vit_b", device="cpu", dtype="fp32", batch=1, workers=1)
    pixels, size = teacher.preprocess.prepare(Image.fromarray(image))
    return teacher(pixels[None], torch.tensor([size]))["embedding"][0]


@pytest.mark.slow
def test_vit_b_gives_sam_predictor_s_embedding_and_a_dropped_relative_position_does_not(vit_b):
    image = photograph("coffee")  # 400 x 600, 3:2
    assert image.shape[1] * 2 == image.shape[0] * 3
    predictor = SamPredictor(vit_b)
    predictor.set_image(image)
    expected = predictor.features[0]
    found = ours(vit_b, image)
    scale = expected.abs().max()
    assert found.shape == (256, 64, 64) and expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-4 * scale
    for module in vit_b.modules():
        if isinstance(module, Attention):
            module.use_rel_pos = False
    assert (ours(vit_b, image) - expected).abs().max() > 1e-2 * scale


def test_the_fingerprint_tells_weights_and_precision_apart():
    from nondegenerate import tiny_sam

    def fingerprint(seed: int, dtype: str) -> dict:
        return SamTeacher(tiny_sam(seed), name="tiny", device="cpu", dtype=dtype, batch=1, workers=1).fingerprint()

    assert fingerprint(0, "fp32") == fingerprint(0, "fp32")
    assert fingerprint(0, "fp32")["weights"] != fingerprint(1, "fp32")["weights"]
    assert fingerprint(0, "fp32") != fingerprint(0, "bf16")


def test_the_state_hash_sees_names_shapes_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(3.0)}
    others = [
        {**base, "a": torch.arange(6.0).reshape(2, 3)},
        {**base, "b": torch.tensor(4.0)},
        {"a": base["a"], "c": base["b"]},
        {**base, "a": base["a"].half()},
    ]
    hashes = {state_hash(state) for state in (base, *others)}
    assert len(hashes) == 5 and state_hash(dict(reversed(base.items()))) in hashes


def test_a_device_that_is_not_there_is_said():
    with pytest.raises(UserError, match=r"teacher\.device=gpu: not a device"):
        pick_device("gpu", "teacher.device")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device is visible"):
            pick_device("cuda", "teacher.device")
    assert pick_device("cpu", "x").type == "cpu"


def test_each_launched_process_takes_its_own_gpu_where_the_recipe_leaves_it_open(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert own_device("auto").index is None
    for local, index in (("0", 0), ("3", 3), ("5", 1)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert own_device("auto") == torch.device("cuda", index)
        assert own_device("cuda:2") == torch.device("cuda", 2) and own_device("cpu").type == "cpu"


@pytest.mark.parametrize("dtype, during", [("fp32", (False, "highest")), ("bf16", (True, "medium"))])
def test_an_fp32_teacher_computes_without_tf32_and_leaves_the_settings_as_they_were(monkeypatch, dtype, during):
    from nondegenerate import tiny_sam

    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    teacher = SamTeacher(tiny_sam(0), name="tiny", device="cpu", dtype=dtype, batch=1, workers=1)
    seen, before = [], settings()
    teacher.encoder.register_forward_hook(lambda *_: seen.append(settings()))
    pixels, sizes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]])
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("medium")
        teacher(pixels, sizes)
        assert seen == [during] and settings() == (True, "medium")
        with pytest.raises(RuntimeError):
            teacher(pixels[:, :, :32], sizes)
        assert settings() == (True, "medium")
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_sam_mini_takes_a_run_of_yours_or_its_file(tmp_path):
    half.export(sam_mini_student(), tmp_path / "student.safetensors")
    by_run, by_file, packaged = (
        sam_mini(str(weights), device="cpu").fingerprint()["weights"]
        for weights in (tmp_path, tmp_path / "student.safetensors", "packaged")
    )
    assert by_run == by_file != packaged
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(UserError, match=r"student\.safetensors: no such file"):
        sam_mini(str(tmp_path))
