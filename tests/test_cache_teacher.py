"""Teachers compared with segment_anything's own predictor, at full size, with no weight at zero."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from nondegenerate import randomize, tiny_sam
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling.image_encoder import Attention

from fmdistill.backbones.device import has_bf16, pick_device
from fmdistill.cache.manifest import claim
from fmdistill.export import half
from fmdistill.mini.photos import photograph
from fmdistill.mini.sam import sam_mini, sam_mini_student
from fmdistill.registry import UserError
from fmdistill.teachers import check, identity
from fmdistill.teachers.compute import own_device, state_hash
from fmdistill.teachers.sam import SamTeacher, sam_vit_b


@pytest.fixture(scope="module")
def vit_b():
    return randomize(sam_model_registry["vit_b"](), 3)


def teacher_embedding(sam, image: np.ndarray, exact: bool = False, pil: bool = True) -> torch.Tensor:
    teacher = SamTeacher(sam, name="sam_vit_b", device="cpu", dtype="fp32", batch=1, workers=1, exact=exact)
    preprocess = replace(teacher.preprocess, exact=True) if pil else teacher.preprocess
    pixels, size = preprocess.prepare(Image.fromarray(image))
    return teacher(pixels[None], torch.tensor([size]))["embedding"][0]


@pytest.mark.slow
def test_vit_b_equals_sam_predictor_s_embedding_but_not_without_a_relative_position(vit_b):
    image = photograph("coffee")  # 400 x 600, 3:2
    assert image.shape[1] * 2 == image.shape[0] * 3
    predictor = SamPredictor(vit_b)
    predictor.set_image(image)
    expected = predictor.features[0]
    scale = expected.abs().max()
    for exact in (False, True):
        actual = teacher_embedding(vit_b, image, exact)
        assert actual.shape == (256, 64, 64) and expected.std() > 0.1
        assert (actual - expected).abs().max() <= 1e-4 * scale
    actual = teacher_embedding(vit_b, image, pil=False)  # pixels of torch's resize, within one grey level
    assert torch.cosine_similarity(actual, expected, 0).min() > 0.9999
    for module in vit_b.modules():
        if isinstance(module, Attention):
            module.use_rel_pos = False
    assert (teacher_embedding(vit_b, image) - expected).abs().max() > 1e-2 * scale


def test_the_fingerprint_differs_by_weights_and_precision():
    def fingerprint(seed: int, dtype: str, **settings) -> dict:
        made = SamTeacher(tiny_sam(seed), name="tiny", device="cpu", dtype=dtype, batch=1, workers=1, **settings)
        return made.fingerprint()

    assert fingerprint(0, "fp32") == fingerprint(0, "fp32")
    assert fingerprint(0, "fp32")["weights"] != fingerprint(1, "fp32")["weights"]
    assert fingerprint(0, "fp32") != fingerprint(0, "bf16")
    assert fingerprint(0, "fp32") != fingerprint(0, "fp32", exact=True)
    assert fingerprint(0, "fp32")["weights"] == fingerprint(0, "bf16")["weights"]  # of the weights, not of a copy
    assert fingerprint(0, "auto", exact=True)["dtype"] == "fp32"
    assert fingerprint(0, "bf16", exact=True)["dtype"] == "bf16"


def test_the_state_hash_depends_on_names_shapes_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(3.0)}
    others = [
        {**base, "a": torch.arange(6.0).reshape(2, 3)},
        {**base, "b": torch.tensor(4.0)},
        {"a": base["a"], "c": base["b"]},
        {**base, "a": base["a"].half()},
    ]
    hashes = {state_hash(state) for state in (base, *others)}
    assert len(hashes) == 5 and state_hash(dict(reversed(base.items()))) in hashes


def test_a_missing_device_raises():
    with pytest.raises(UserError, match=r"teacher\.device=gpu: not a device"):
        pick_device("gpu", "teacher.device")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device is visible"):
            pick_device("cuda", "teacher.device")
    assert pick_device("cpu", "x").type == "cpu"


def test_each_launched_process_uses_its_own_gpu_if_the_device_is_auto(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert own_device("auto").index is None
    for local, index in (("0", 0), ("3", 3), ("5", 1)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert own_device("auto") == torch.device("cuda", index)
        assert own_device("cuda:2") == torch.device("cuda", 2) and own_device("cpu").type == "cpu"


EXACTLY, AS_SET = (False, "highest"), (True, "medium")


@pytest.mark.parametrize(
    "dtype, exact, during", [("fp32", False, EXACTLY), ("fp32", True, EXACTLY), ("bf16", True, AS_SET)]
)
def test_an_fp32_teacher_computes_without_tf32_and_restores_the_settings(dtype, exact, during):
    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    teacher = SamTeacher(tiny_sam(0), name="tiny", device="cpu", dtype=dtype, batch=1, workers=1, exact=exact)
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


def test_sam_mini_loads_a_run_or_its_file(tmp_path):
    half.export(sam_mini_student(), tmp_path / "student.safetensors")
    by_run, by_file, packaged = (
        sam_mini(str(weights), device="cpu").fingerprint()["weights"]
        for weights in (tmp_path, tmp_path / "student.safetensors", "packaged")
    )
    assert by_run == by_file != packaged
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(UserError, match=r"student\.safetensors: no such file"):
        sam_mini(str(tmp_path))


def test_both_paths_and_precisions_agree_on_the_embedding():
    pixels, sizes = (
        torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8),
        torch.tensor([[64, 64], [43, 64], [64, 43]]),
    )

    def embedding(dtype: str, exact: bool) -> torch.Tensor:
        return tiny.teacher(dtype=dtype, exact=exact)(pixels, sizes)["embedding"]

    expected = embedding("fp32", True)
    assert expected.dtype == torch.float32 and expected.std() > 0.1
    torch.testing.assert_close(embedding("fp32", False), expected, atol=1e-5, rtol=1e-5)
    for exact in (False, True):
        actual = embedding("bf16", exact)
        assert actual.dtype == torch.float32 and not torch.equal(actual, expected)
        assert torch.cosine_similarity(actual, expected, dim=1).min() > 0.999


def test_a_compiled_teacher_has_one_batch_size_and_runs_uncompiled_if_compiling_fails(caplog):
    teacher, seen = tiny.teacher(batch=4), []
    pixels, sizes = (
        torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8),
        torch.tensor([[64, 64], [43, 64], [64, 43]]),
    )
    expected = teacher(pixels, sizes)["embedding"]

    def noted(x):
        seen.append(len(x))
        return teacher.encoder(x)

    teacher.compiled, teacher._run = True, noted
    actual = teacher(pixels, sizes)["embedding"]
    assert seen == [4] and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    def broken(x):
        raise RuntimeError("no C compiler")

    teacher._run = broken
    torch.testing.assert_close(teacher(pixels, sizes)["embedding"], expected, atol=1e-5, rtol=1e-5)
    assert not teacher.compiled and "not compiled, so slower: no C compiler" in caplog.text
    teacher._run = broken
    with pytest.raises(RuntimeError, match="no C compiler"):
        teacher(pixels, sizes)


def test_auto_is_bf16_only_if_the_cpu_multiplies_bf16(monkeypatch):
    for flags, expected in (("fma avx512_bf16", True), ("amx_bf16", True), ("avx2 avx512f", False), ("", False)):
        monkeypatch.setattr("pathlib.Path.read_text", lambda self, f=flags: f"processor : 0\nflags\t\t: {f}\n")
        monkeypatch.setattr("pathlib.Path.is_file", lambda self: True)
        assert has_bf16(torch.device("cpu")) is expected
        assert not has_bf16(torch.device("cuda"))
        monkeypatch.undo()
    monkeypatch.setattr("fmdistill.teachers.sam.build_sam", lambda kind, weights: tiny_sam(0))
    for has in (True, False):
        monkeypatch.setattr("fmdistill.teachers.sam.has_bf16", lambda device, has=has: has)
        assert sam_vit_b("x", "cpu").dtype == ("bf16" if has else "fp32")
        assert sam_vit_b("x", "cpu", exact=True).dtype == sam_vit_b("x", "cpu", "fp32").dtype == "fp32"
        assert sam_mini(device="cpu").dtype == "fp32"


REST = {"family": "sam", "head": True, "outputs": {}, "images": {}}


def test_a_cache_of_the_other_path_raises_an_error_with_the_matching_settings(tmp_path):
    claim(tmp_path, {**REST, "teacher": tiny.teacher(exact=True).fingerprint()})
    with pytest.raises(
        UserError, match=r"'segment_anything' there and 'fast' here;.* here. Go on with it by teacher.exact=true;"
    ):
        claim(tmp_path, {**REST, "teacher": tiny.teacher().fingerprint()})
    both = r"Go on with it by teacher.dtype=fp32 teacher.exact=true; or choose another cache.root"
    with pytest.raises(UserError, match=both):
        claim(tmp_path, {**REST, "teacher": tiny.teacher(dtype="bf16").fingerprint()})
    with pytest.raises(UserError, match=r"here. Choose another cache.root"):  # no setting brings other weights back
        claim(tmp_path, {**REST, "teacher": tiny.teacher(seed=1).fingerprint()})
    fast, exact = (identity({"name": "sam_vit_b", "exact": choice}) for choice in (False, "true"))
    assert fast == {"name": "sam_vit_b", "path": "fast"}
    assert exact == {"name": "sam_vit_b", "path": "segment_anything", "dtype": "fp32"}


@pytest.mark.parametrize("name", ["sam_vit_h", "sam_mini", "open_clip", "clip_mini", "classifier"])
def test_a_batch_or_workers_that_cannot_work_are_named_for_every_family(name):
    given = {"name": name, **({"network": {"name": "x"}, "weights": "x"} if name == "classifier" else {})}
    check({**given, "batch": "1", "workers": "0"})
    with pytest.raises(UserError, match=r"teacher\.batch=0: expected 1 or more"):
        check({**given, "batch": "0"})
    with pytest.raises(UserError, match=r"teacher\.workers=-2: expected 0 or more"):
        check({**given, "workers": "-2"})
