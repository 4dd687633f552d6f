"""A run that trained its own mask decoder: its embeddings are decoded by that, its teacher's by the teacher's."""

import io
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import served
import test_distill_refine as second_stage
import tiny
import torch
from nondegenerate import randomize
from safetensors.torch import load_file
from torch import Tensor, nn

import fmdistill
from fmdistill import cache, evaluate
from fmdistill import recipe as recipes
from fmdistill.backbones.iou_correction import NAME, CorrectedIouHead, IouCorrection
from fmdistill.backbones.promptable import PromptHead
from fmdistill.backbones.tinyvit import TinyViTSAM, load_pretrained
from fmdistill.distill import student as students
from fmdistill.distill.student import own_head
from fmdistill.evaluate import grid_cases, latency
from fmdistill.evaluate.grid_miou import GridMiou, grid_points
from fmdistill.evaluate.latency import Latency
from fmdistill.evaluate.segmenters import Segmenters
from fmdistill.evaluate.subjects import embed
from fmdistill.export import card, half, mobilesam, phone, sam_onnx
from fmdistill.export.source import FinishedRun
from fmdistill.mini.photos import photograph
from fmdistill.mini.tinyvit import SAM_TRUNK
from fmdistill.predict import run as predict_run
from fmdistill.predict.sam_layouts import LAYOUTS
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError
from fmdistill.report import examples
from fmdistill.report.rows import read_runs

CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def tinyvit(pretrained: str = "none") -> TinyViTSAM:
    """A TinyViT on the scale of the toy teacher, which loads `pretrained` itself as tinyvit_sam does."""
    student = TinyViTSAM(image_size=64, out_channels=tiny.CHANNELS, window_sizes=(16, 8, 4, 4), **SAM_TRUNK)
    load_pretrained(student, pretrained)
    return student


def load(folder: Path, name: str, *overrides: str) -> Recipe:
    own = ("student.name=test_own_head:tinyvit", f"out={folder}/{name}", "task.head=trained")
    return second_stage.load(folder, *own, *overrides)


def write_run(folder: Path, name: str, with_head: bool, *overrides: str) -> Path:
    """Write a finished run of random weights, and of a random mask decoder."""
    recipe = load(folder, name, f"task.head={'trained' if with_head else 'frozen'}", *overrides)
    network = randomize(tinyvit(), 1)
    if with_head:
        network.prompt_head = randomize(PromptHead.from_config(teacher_head(recipe).config), 7)
    recipes.save(recipe, recipe.out)
    students.save(network, Path(recipe.out))
    return Path(recipe.out)


def teacher_head(recipe: Recipe) -> PromptHead:
    return cache.open_cache(recipe).head()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, toy_cache) -> Path:
    """A folder with the toy cache and two runs of one student: `own` trained a mask decoder, `plain` did not."""
    path = tmp_path_factory.mktemp("own_head")
    (path / "cache").symlink_to(toy_cache)
    write_run(path, "own", True)
    write_run(path, "plain", False)
    return path


@pytest.fixture(scope="module")
def recipe(folder) -> Recipe:
    return load(folder, "own")


def opened(folder: Path) -> tuple[dict[str, nn.Module], dict[str, PromptHead]]:
    """Return both students, and the head of each subject."""
    models = {name: students.load_student(folder / name, trust=True) for name in ("own", "plain")}
    teacher = teacher_head(load(folder, "own"))
    trained = own_head(models["own"])
    assert trained is not None and own_head(models["plain"]) is None
    return models, {"teacher": teacher, "own": trained, "plain": teacher}


@torch.no_grad()
def best(head: PromptHead, embedding: Tensor, xy_P2: Tensor) -> Tensor:
    """Return logits (P, 1, n, n) of masks 1 to 3 with the highest predicted IoU."""
    logits, iou = head.decode(embedding, xy_P2[:, None].float(), torch.ones(len(xy_P2), 1))
    return logits[torch.arange(len(xy_P2)), iou.argmax(1)][:, None]


def others(heads: Mapping[str, PromptHead], name: str) -> PromptHead:
    """Return the head that would be wrong for a subject."""
    return heads["own" if name != "own" else "teacher"]


def test_the_heads_answer_differently(folder):
    _, heads = opened(folder)
    embedding = torch.randn(tiny.CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    own, teacher = (best(heads[name], embedding, torch.tensor([[20, 30]])) > 0 for name in ("own", "teacher"))
    assert 0 < own.float().mean() < 1 and (own != teacher).float().mean() > 0.05


def test_protocols_of_prompts_decode_each_subject_by_its_head(folder, recipe):
    models, heads = opened(folder)
    image = next(Segmenters.open(recipe, models, device="cpu").images())
    assert set(image.segmenters) == {"teacher", "own", "plain"}
    for name, segmenter in image.segmenters.items():
        points, labels = np.array([[[20.0, 30.0]], [[40.0, 12.0]]]), np.ones((2, 1))
        scale = torch.tensor(segmenter.resized[::-1]) / torch.tensor(segmenter.original[::-1])
        given = (segmenter.embedding, torch.from_numpy(points).float() * scale, torch.ones(2, 1))
        with torch.no_grad():
            right, wrong = heads[name].decode(*given), others(heads, name).decode(*given)
        for made, expected, other in zip(segmenter.decode(points, labels), right, wrong, strict=True):
            torch.testing.assert_close(made, expected, **CLOSE)
            assert (made - other).abs().max() > 0.1


def test_students_with_heads_of_their_own_need_no_cache_for_other_images(folder, recipe, monkeypatch):
    models, heads = opened(folder)
    monkeypatch.setattr("fmdistill.evaluate.segmenters.teacher_side", lambda *_: pytest.fail("asked for the teacher"))
    subjects = Segmenters.open(recipe, {"own": models["own"]}, images=recipe.images, device="cpu")
    image = next(subjects.images())
    assert list(image.segmenters) == ["own"] and image.segmenters["own"].head is heads["own"]
    cached = Segmenters.open(recipe, {"own": models["own"]}, device="cpu")
    right = next(cached.images([image.name])).segmenters["own"].embedding
    torch.testing.assert_close(image.segmenters["own"].embedding, right, **CLOSE)


def test_grid_miou_compares_the_own_head_s_masks_and_floors_by_the_teacher_s(folder, recipe):
    models, heads = opened(folder)
    protocol = GridMiou(grids=(3,), images=2, floors=True, write_masks=True, device="cpu")
    _, details = protocol.judge(recipe, models)
    judged = {(entry["key"], entry["subject"]): entry["miou"]["3x3"] for entry in details["images"]}
    cases = grid_cases.cases(cache.open_cache(recipe), recipe, models, True, torch.device("cpu"))
    differences = []
    for case, _ in zip(cases, range(2), strict=False):
        xy = torch.from_numpy(grid_points(3, case.original)) * torch.tensor(case.resized[::-1])
        xy = xy / torch.tensor(case.original[::-1])

        def masks(head, embedding, case=case, xy=xy):
            return head.upsample(best(head, embedding, xy), case.resized, case.original)[:, 0] > 0

        teacher = masks(heads["teacher"], case.teacher)
        for name, embedding in case.students.items():
            by_head = {}
            for kind in ("own", "teacher"):
                made = masks(heads[kind], embedding)
                union = (made | teacher).flatten(1).sum(1)
                iou = torch.where(union > 0, (made & teacher).flatten(1).sum(1) / union.clamp(min=1), 1.0)
                by_head[kind] = float(iou.mean())
            right, wrong = (by_head[kind] for kind in (("own", "teacher") if name == "own" else ("teacher", "own")))
            assert judged[case.key, name] == pytest.approx(right, abs=1e-4), name
            differences.append(abs(right - wrong))
        first = next(entry for entry in details["masks"] if entry["key"] == case.key)
        assert first["own"] != first["plain"]  # the same embedding
    assert sorted(differences)[len(differences) // 2] > 0.005


def test_runs_judged_together_keep_their_heads(folder, tmp_path):
    (tmp_path / "grid.yaml").write_text("name: grid_miou\ngrids: [3]\nimages: 2\ndevice: cpu\n")
    for name in ("own", "plain"):
        shutil.copytree(folder / name, tmp_path / name)
    runs = [tmp_path / "plain", tmp_path / "own"]
    alone = [evaluate.run(tmp_path / "grid.yaml", run, ["trust=true"]) for run in runs]
    for run in runs:
        shutil.rmtree(run / "evaluation")
    evaluate.run_together(tmp_path / "grid.yaml", runs, trust=True)
    together = [evaluate.run(tmp_path / "grid.yaml", run, ["trust=true"]) for run in runs]
    assert together == alone
    values = [next(row["value"] for row in rows if row["metric"] == "miou") for rows in alone]
    assert abs(values[0] - values[1]) > 0.01


def test_latency_measures_the_own_head_and_an_encoder_without_it(folder, recipe, monkeypatch):
    models, heads = opened(folder)
    measured, decoder = [], latency.decoder
    monkeypatch.setattr(latency, "decoder", lambda head, device: measured.append(head) or decoder(head, device))
    rows, _ = Latency(rounds=1, warm_up=0, device="cpu").judge(recipe, models)
    assert measured[0] is heads["own"] and measured[1] is not heads["own"]
    parameters = {(row["subject"], row["part"]): row["value"] for row in rows if row["metric"] == "parameters"}
    assert parameters["own", "encoder"] == parameters["plain", "encoder"]
    assert parameters["own", "decoder"] == sum(p.numel() for p in heads["own"].parameters()) / 1e6


def answers(folder: Path, name: str) -> tuple[tuple, tuple, tuple]:
    """Return what a run's predictor answers to a point, and what the right and the wrong head do."""
    _, heads = opened(folder)
    predictor = fmdistill.load(folder / name, device="cpu", trust=True)
    predictor.set_image(photograph("coffee"))
    point = np.array([[200.0, 150.0]])
    _, iou, low = predictor.predict(point, [1])
    xy = torch.from_numpy(predictor.transform.apply_coords(point, predictor.original_size)).float()
    with torch.no_grad():
        both = [head.decode(predictor.get_image_embedding()[0], xy[None], torch.ones(1, 1))
                for head in (heads[name], others(heads, name))]  # fmt: skip
    right, wrong = ((logits[0].numpy(), scores[0].numpy()) for logits, scores in both)
    return (low, iou), right, wrong


@pytest.mark.parametrize("name", ["own", "plain"])
def test_load_predicts_by_the_run_s_head(folder, name, monkeypatch):
    if name == "own":
        monkeypatch.setattr(predict_run, "teacher_side", lambda *_: pytest.fail("asked for the teacher"))
    made, right, wrong = answers(folder, name)
    for values, expected, other in zip(made, right, wrong, strict=True):
        np.testing.assert_allclose(values, expected, **CLOSE)
        assert np.abs(values - other).max() > 0.1


def test_a_stored_correction_is_of_the_own_head(folder, tmp_path):
    run = tmp_path / "own"
    shutil.copytree(folder / "own", run)
    before = fmdistill.load(run, device="cpu", trust=True)
    IouCorrection(0.5).store(run, run / students.WEIGHTS, {})
    after = fmdistill.load(run, device="cpu", trust=True)
    scores = []
    for predictor in (before, after):
        predictor.set_image(photograph("coffee"))
        scores.append(predictor.predict([[200, 150]], [1])[1])
    np.testing.assert_allclose(scores[1], np.sign(scores[0]) * np.abs(scores[0]) ** 0.5, rtol=1e-4)
    assert (run / NAME).is_file()
    source = FinishedRun.of(run, trust=True)
    assert isinstance(source.head().mask_decoder.iou_prediction_head, CorrectedIouHead)
    right = {n.removeprefix("prompt_head."): v for n, v in load_file(run / students.WEIGHTS).items()}
    assert all(torch.equal(value, right[name]) for name, value in source.head().state_dict().items())


def same_head(made: nn.Module, expected: nn.Module) -> bool:
    states = made.state_dict(), expected.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], v) for n, v in states[1].items())


@pytest.mark.parametrize("name", ["own", "plain"])
def test_exports_take_the_run_s_head(folder, name, tmp_path):
    _, heads = opened(folder)
    source = FinishedRun.of(folder / name, trust=True)
    assert same_head(source.head(), heads[name]) and source.family == "sam"
    for layout in ("onnx", "anylabeling", "labelme", "openvino", "transformers", "web"):
        export = sam_onnx.export_of(source, tmp_path / layout, layout, LAYOUTS["onnx" if layout == "web" else layout])
        assert same_head(export.head, heads[name])
        assert not any("prompt_head" in part for part in export.student.state_dict())
    format = phone.PhoneFormat("toy", ".toy", False, lambda *_: None)
    parts = {part.name: part.network for part in phone.sam_parts(source, 3, format)}
    assert same_head(parts["MaskDecoder"].decoder, heads[name].mask_decoder)


def test_a_file_of_mobilesam_holds_the_own_head_and_no_other(folder, tmp_path):
    _, heads = opened(folder)
    mobilesam.run(FinishedRun.of(folder / "own", trust=True), tmp_path / "own.pt")
    mobilesam.run(FinishedRun.of(folder / "plain", trust=True), tmp_path / "plain.pt")
    own, plain = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("own", "plain"))
    assert own.keys() == plain.keys()
    assert all(torch.equal(own[name], value) for name, value in heads["own"].state_dict().items())
    assert all(torch.equal(plain[name], value) for name, value in heads["teacher"].state_dict().items())
    assert all(torch.equal(own[name], plain[name]) for name in own if name.startswith("image_encoder."))


def test_the_half_export_holds_the_own_head_and_opens_as_a_student(folder, recipe, tmp_path, caplog):
    _, heads = opened(folder)
    path = half.run(FinishedRun.of(folder / "own", trust=True), tmp_path / "half.safetensors")
    again = students.load_checkpoint(recipe.student, path)
    for name, value in own_head(again).state_dict().items():
        torch.testing.assert_close(value, heads["own"].state_dict()[name].half().float(), rtol=0, atol=0)
    half.run(FinishedRun.of(folder / "plain", trust=True), tmp_path / "plain" / "half.safetensors")
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["half.safetensors"]
    with pytest.raises(UserError, match="contains a student with its own mask decoder.*load the run that trained it"):
        fmdistill.load(path)


def test_the_card_says_whose_decoder_it_is(folder, tmp_path):
    texts = [card.write_card(tmp_path, FinishedRun.of(folder / name, trust=True), {}).read_text()
             for name in ("own", "plain")]  # fmt: skip
    assert "| Mask decoder | the student's own, trained with it |" in texts[0] and "Mask decoder" not in texts[1]
    assert "the mask decoder was trained with it; the prompt encoder is the teacher's" in texts[0]
    assert "prompt encoder and mask decoder are the teacher's" in texts[1]
    counts = [line for text in texts for line in text.splitlines() if line.startswith("| Student's parameters")]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_onnx_files_answer_as_the_own_head_and_are_judged_by_it(folder, recipe, tmp_path):
    run, out = folder / "own", tmp_path / "onnx"
    sam_onnx.onnx(FinishedRun.of(run, trust=True), out)
    (low, iou), _, wrong = answers(folder, "own")
    predictor = fmdistill.load(out)
    predictor.set_image(photograph("coffee"))
    _, made_iou, made_low = predictor.predict(np.array([[200.0, 150.0]]), np.ones(1))
    np.testing.assert_allclose(made_low, low, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(made_iou, iou, rtol=1e-2, atol=1e-2)
    assert np.abs(made_low - wrong[0]).max() > 0.1
    (tmp_path / "grid.yaml").write_text("name: grid_miou\ngrids: [3]\nimages: 2\ndevice: cpu\n")
    rows = evaluate.run(tmp_path / "grid.yaml", out, [f"recipe={run}/recipe.yaml", "trust=true"])
    shutil.copytree(run, tmp_path / "run")
    right = evaluate.run(tmp_path / "grid.yaml", tmp_path / "run", ["trust=true"])
    assert [row["value"] for row in rows] == pytest.approx([row["value"] for row in right], abs=0.01)
    shutil.copy(tmp_path / "grid.yaml", tmp_path / "again.yaml")
    with pytest.raises(UserError, match="trained a mask decoder of its own.*recipe=RUN/recipe.yaml"):
        evaluate.run(tmp_path / "again.yaml", out, [f"recipe={folder}/plain/recipe.yaml", "trust=true"])


def test_a_report_shows_each_run_s_masks_by_its_head_and_weights_of_mask_patches(folder, tmp_path):
    (tmp_path / "cache").symlink_to(folder / "cache")
    weighting = "{name: srw, temperature: 0.5, feature: embedding}"
    term = f"{{output: mask_patches, distance: {{name: mask_patches}}, weighting: {weighting}}}"
    for name in ("own", "plain"):
        write_run(tmp_path, name, name == "own", f"objective={{pixels: {term}}}")
    models, heads = opened(tmp_path)
    heads = {**heads, "teacher": heads["teacher"]}
    shown, _ = examples.gather(read_runs([str(tmp_path / "own"), str(tmp_path / "plain")]), trust=True)
    preprocess, compared = cache.open_cache(load(tmp_path, "own")).preprocess, 0
    for example in shown:
        h, w = example.image.shape[:2]
        pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        pixels[0, :, :h, :w] = torch.from_numpy(example.image).permute(2, 0, 1)
        assert set(example.weights) == {"own", "plain"}
        for prompt in example.prompts.values():
            for name, model in models.items():
                embedding = embed(model, preprocess, pixels, torch.tensor([[h, w]]))[0]
                right, wrong = (
                    head.upsample(best(head, embedding, torch.tensor([prompt.point])), (h, w), (h, w))[0, 0] > 0
                    for head in (heads[name], others(heads, name))
                )
                made = torch.from_numpy(prompt.masks[name])
                assert (made != right).float().mean() < 2e-3
                compared += int((made != wrong).float().mean() > 0.02)
    assert compared


def test_the_page_shows_each_run_s_masks_by_its_head(folder):
    page = served.client([str(folder / name) for name in ("own", "plain")])
    file = io.BytesIO()
    PIL.Image.fromarray(photograph("coffee")).resize((300, 200)).save(file, "PNG")
    image = served.answer(page.post("/api/images?name=mine.png", content=file.getvalue()))
    for name in ("teacher", "own", "plain"):
        served.answer(page.post(f"/api/images/{image['image']}/embedding", params={"subject": name}))
    prompt = {"points": [[0.4, 0.6, 1]], "box": None, "mask": "auto"}
    made = served.answer(page.post(f"/api/images/{image['image']}/masks", json=prompt))
    models, heads = opened(folder)
    preprocess = cache.open_cache(load(folder, "own")).preprocess
    pixels, (h, w) = preprocess.prepare(np.array(PIL.Image.open(io.BytesIO(file.getvalue())).convert("RGB")))
    for entry in made["masks"][1:]:
        name = entry["subject"]
        embedding = embed(models[name], preprocess, pixels[None], torch.tensor([[h, w]]))[0]
        xy = torch.tensor([[0.4 * w, 0.6 * h]])
        right, wrong = (
            heads[kind].upsample(best(heads[kind], embedding, xy), (h, w), made["size"])[0, 0] > 0
            for kind in (name, "own" if name == "plain" else "teacher")
        )
        shown = served.mask(entry, made["size"])
        assert (shown != right).float().mean() < 1e-3 and (shown != wrong).float().mean() > 0.02
    session = served.answer(page.get("/api/session"))["subjects"]
    assert session[1]["parameters"] == session[2]["parameters"]


def test_a_file_of_weights_needs_the_sizes_beside_it(folder, recipe, tmp_path):
    _, heads = opened(folder)
    weights = folder / "own" / students.WEIGHTS
    again = students.load_checkpoint(recipe.student, weights)
    assert same_head(own_head(again), heads["own"]) and not again.training
    copied = tmp_path / "copied.safetensors"
    shutil.copy(weights, copied)
    missing = rf"copied.safetensors: contains the mask decoder .* but {tmp_path}/prompt_head.json, .* is missing; copy"
    with pytest.raises(UserError, match=missing):
        students.load_checkpoint(recipe.student, copied)
    with pytest.raises(UserError, match=f"student.pretrained={missing}".replace("=copied", f"={tmp_path}/copied")):
        students.check_start({**recipe.student, "pretrained": str(copied)})
    shutil.copy(folder / "own" / students.HEAD, tmp_path)
    assert same_head(own_head(students.load_checkpoint(recipe.student, copied)), heads["own"])
    (tmp_path / students.HEAD).write_text("[")
    with pytest.raises(UserError, match="prompt_head.json: not the sizes of a mask decoder"):
        students.load_checkpoint(recipe.student, copied)


def test_a_student_that_loads_no_weights_itself_opens_with_its_head_too(folder, tmp_path):
    network = randomize(tiny.Student(), 3)
    network.prompt_head = randomize(PromptHead.from_config(teacher_head(load(folder, "own")).config), 8)
    students.save(network, tmp_path)
    again = students.load_checkpoint({"name": "tiny:Student"}, tmp_path / students.WEIGHTS)
    assert same_head(again, network)
    (tmp_path / students.HEAD).unlink()
    with pytest.raises(UserError, match="prompt_head.json, which states the decoder's sizes, is missing"):
        students.load_checkpoint({"name": "tiny:Student"}, tmp_path / students.WEIGHTS)


def test_parts_of_a_mask_decoder_are_not_frozen_by_name(recipe):
    for name in ("prompt_head", "prompt_head.mask_decoder.transformer"):
        with pytest.raises(
            UserError, match=f"student.freeze: '{name}' is of the student's own mask decoder.*task.head"
        ):
            students.check({**recipe.student, "freeze": [name]})
