"""The second stage: its prompts, masks and losses against one decoder call a prompt and literal formulas."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from fmdistill import cache, distill
from fmdistill import recipe as recipes
from fmdistill.backbones.promptable import PromptHead
from fmdistill.cache.batch import fill
from fmdistill.distill import prompts, refine, tasks
from fmdistill.distill.distances.mask import Mask, MaskChoice
from fmdistill.distill.student import load_student, own_head
from fmdistill.distill.weightings.masks import MaskArea
from fmdistill.files import write_whole
from fmdistill.recipe import Recipe
from fmdistill.registry import UserError

SIDE, CELLS = 64, 16


def load(folder: Path, *overrides: str, task: str = "{name: refine, prompts: 3}") -> Recipe:
    """The toy recipe with task refine."""
    text = tiny.RECIPE.format(folder=folder).replace("{name: distill}", task)
    start = text.index("objective:")
    text = (
        text[:start]
        + text[text.index("optimizer:") :]
        + ("objective: {masks: {output: masks, distance: {name: mask}, weighting: {name: uniform}}}\n")
    )
    write_whole(folder / "refine.yaml", text)  # several processes of a launcher write and read it
    return recipes.load(folder / "refine.yaml", overrides)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """A folder with the toy cache."""
    folder = tmp_path_factory.mktemp("refine")
    cache.run(load(folder))
    return folder


def job_and_batch(recipe: Recipe, images: int = 2) -> tuple:
    job = tasks.build(recipe)
    job.task.eval()
    batch = fill(job.train, [(0, 0, index) for index in range(images)])
    return job, job.complete(batch)


def test_masks_of_a_batch_equal_one_decoder_call_for_each_prompt(cached):
    recipe = load(cached, "task.rounds=2", "task.boxes=0.5", "seed=3")
    job, batch = job_and_batch(recipe)
    with torch.no_grad():
        seen = job.task.see(batch)
        embeddings = {"student": seen.outputs["student.embedding"], "sam": seen.teacher("embedding")}
    head, size = cache.open_cache(recipe).head(), SIDE // CELLS
    assert isinstance(head, PromptHead)
    answered = {name: [] for name in embeddings}
    boxed = 0
    for image in range(2):
        draws, (h, w) = batch["draws"][image], batch["sizes"][image].tolist()
        real = torch.zeros(CELLS, CELLS, dtype=torch.bool)
        real[: -(-h // size), : -(-w // size)] = True
        rounds: list[list[dict]] = [[], [], []]
        for x, y, box_draw, _, *later in draws.tolist():
            points, labels = [[min(int(x * w), w - 1), min(int(y * h), h - 1)]], [1]
            with torch.no_grad():
                logits, iou = head.decode_all(embeddings["sam"][image], as_points(points), torch.tensor([labels]))
            mask = (logits[0, iou[0].argmax()] > 0) & real
            box = None
            if mask.any() and box_draw < 0.5:
                rows, columns = np.nonzero(mask.any(1).numpy())[0], np.nonzero(mask.any(0).numpy())[0]
                corners = [columns[0] * 4, rows[0] * 4, columns[-1] * 4 + 3, rows[-1] * 4 + 3]
                box, points, labels = torch.tensor([corners]).float(), [], []
                boxed += 1
            for number in range(3):
                answer = {}
                for name, embedding in embeddings.items():
                    given = (as_points(points), torch.tensor([labels])) if points else (None, None)
                    with torch.no_grad():
                        answer[name], iou = head.decode_all(embedding[image], *given, boxes=box)
                rounds[number].append(answer)
                best = iou[0].argmax()  # the teacher's, asked last
                wanted, made = answer["sam"][0, best] > 0, answer["student"][0, best] > 0
                pool = (wanted != made) & real
                pool = pool if pool.any() else wanted & real
                pool = pool if pool.any() else real
                if number < 2:
                    row, column = pool.nonzero()[int(np.float32(later[number]) * np.float32(pool.sum()))].tolist()
                    points = [*points, [column * 4 + 1.5, row * 4 + 1.5]]
                    labels = [*labels, int(wanted[row, column])]
        for name in embeddings:
            answered[name].append(torch.cat([answer[name][0] for answers in rounds for answer in answers]))
    assert 0 < boxed < 6
    for name, masks in answered.items():
        made = seen.student("masks") if name == "student" else seen.teacher("masks")
        torch.testing.assert_close(made, torch.stack(masks), rtol=1e-4, atol=1e-4)


def as_points(points: list) -> torch.Tensor:
    """Points as the decoder takes them."""
    return torch.tensor([points]).float()


def test_the_best_masks_are_those_whose_iou_the_teacher_predicts_highest(cached):
    settings = ("task.rounds=0", "task.boxes=0")
    job, batch = job_and_batch(load(cached, *settings))
    best_job, _ = job_and_batch(load(cached, *settings, "task.masks=best"))
    with torch.no_grad():
        every, best = job.task.see(batch), best_job.task.see(batch)
    head, chosen = cache.open_cache(load(cached)).head(), []
    for image in range(2):
        for x, y, *_ in batch["draws"][image].tolist():
            h, w = batch["sizes"][image].tolist()
            with torch.no_grad():
                _, iou = head.decode_all(
                    every.teacher("embedding")[image], as_points([[int(x * w), int(y * h)]]), torch.ones(1, 1)
                )
            chosen.append(int(iou.argmax()))
    assert len(set(chosen)) > 1
    for which in ("student", "teacher"):
        four = getattr(every, which)("masks").unflatten(1, (3, 4)).flatten(0, 1)
        torch.testing.assert_close(
            getattr(best, which)("masks").flatten(0, 1), four[torch.arange(6), torch.tensor(chosen)]
        )
    assert every.teacher("mask_tokens").shape == (2, tiny.CHANNELS, 3, 4)
    assert best.teacher("mask_tokens").shape == (2, tiny.CHANNELS, 3, 1)


def test_prompts_depend_on_seed_epoch_and_key_alone(cached):
    images = tasks.build(load(cached)).train
    first = images.item(0, 1, 2)
    assert torch.equal(first["draws"], images.item(0, 1, 2)["draws"])
    others = [images.item(1, 1, 2), images.item(0, 1, 3), tasks.build(load(cached, "seed=1")).train.item(0, 1, 2)]
    assert all(not torch.equal(first["draws"], other["draws"]) for other in others)
    batches = [fill(images, [(0, 1, 1), (0, 1, 2)]), fill(images, [(0, 1, 2)])]
    assert torch.equal(batches[0]["draws"][1], batches[1]["draws"][0])


def test_points_are_pixels_of_the_image_and_uniform():
    draws = torch.rand(1, 20000, 5, generator=torch.Generator().manual_seed(0))
    draws[0, 0, :2], draws[0, 1, :2] = 0.0, 1 - 1e-8
    xy = prompts.points(draws, torch.tensor([[6, 10]]))[0]
    assert xy[0].tolist() == [0, 0] and xy[1].tolist() == [9, 5]
    assert torch.equal(xy, xy.round())
    counts = torch.bincount((xy[:, 1] * 10 + xy[:, 0]).long(), minlength=60)
    assert counts.min() > 250 and counts.max() < 420  # 333 each, 5 deviations


def test_boxes_enclose_the_cells_of_a_mask():
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 5:8], masks[1, 7, 0] = True, True
    corners, has = prompts.boxes(masks, 4.0)
    assert corners[:2].tolist() == [[20, 8, 31, 15], [0, 28, 3, 31]] and has.tolist() == [True, True, False]


def test_a_correction_is_wrong_else_wanted_else_real():
    real = torch.ones(3, 4, 4, dtype=torch.bool)
    real[:, :, 3] = False
    wanted, wrong = torch.zeros_like(real), torch.zeros_like(real)
    wanted[:2, 1, 1:] = True
    wrong[0, 3, :] = wrong[0, 1, 2] = True
    draw = torch.tensor([0.99, 0.0, 0.5])
    xy, label = prompts.corrections(wrong, wanted, real, draw, 4.0)
    # the wrong real cells of the first are (1, 2), (3, 0), (3, 1), (3, 2), row and column; the last has 12 real cells
    assert xy[:, 0].tolist() == [[9.5, 13.5], [5.5, 5.5], [1.5, 9.5]]
    assert label[:, 0].tolist() == [0, 1, 0]
    everywhere, _ = prompts.corrections(wrong[:1].expand(400, -1, -1), wanted[:1].expand(400, -1, -1),
                                        real[:1].expand(400, -1, -1), torch.arange(400) / 400, 4.0)  # fmt: skip
    _, counts = everywhere[:, 0].unique(dim=0, return_counts=True)
    assert counts.tolist() == [100] * 4


def test_small_masks_are_drawn_in_proportion_to_a_power_of_their_area():
    draws = torch.rand(30000, 2, 5, generator=torch.Generator().manual_seed(1))
    area = torch.tensor([[16.0, 1.0]]).expand(30000, 2)
    chosen = prompts.favour_small(draws, area, 1, 0.5)
    assert float(chosen.float().mean()) == pytest.approx(4 / 5, abs=0.01)  # 1^-.5 against 16^-.5
    both = prompts.favour_small(draws, area, 2, 0.5)
    assert torch.equal(both, torch.tensor([[0, 1]]).expand(30000, 2))


def test_candidates_become_the_prompts_that_they_are_chosen_as(cached):
    job, batch = job_and_batch(load(cached, "task.candidates=3", "task.small=1.0", "task.rounds=0", "task.boxes=0"))
    assert batch["draws"].shape == (2, 9, 4)
    with torch.no_grad():
        seen = job.task.see(batch)
    every, _ = job_and_batch(load(cached, "task.prompts=9", "task.rounds=0", "task.boxes=0"))
    with torch.no_grad():
        all_masks = every.task.see(batch).teacher("masks").unflatten(1, (9, 4))
    for image in range(2):
        for masks in seen.teacher("masks")[image].unflatten(0, (3, 4)):
            assert sum(torch.allclose(masks, other, rtol=1e-3, atol=1e-3) for other in all_masks[image]) >= 1


def test_losses_equal_a_literal_formula_over_the_real_cells(cached):
    job, batch = job_and_batch(load(cached, "task.rounds=0"))
    losses = job.task(batch)
    seen = job.task.see(batch)
    z, t, expected = seen.student("masks").double(), seen.teacher("masks").double(), []
    for image in range(2):
        rows, columns = (-(-int(n) // 4) for n in batch["sizes"][image])
        for mask in range(12):
            logit, target = z[image, mask, :rows, :columns], (t[image, mask, :rows, :columns] > 0).double()
            p = torch.sigmoid(logit)
            bce = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
            dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
            expected.append(bce + dice)
    assert losses["loss"].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_patches_have_the_mean_loss_of_their_cells(cached):
    terms = "objective={pixels: {output: mask_patches, distance: {name: mask_patches}, weighting: {name: uniform}}}"
    job, batch = job_and_batch(load(cached, "task.rounds=0", terms))
    distance, weight, seen = job.task.objective.terms["pixels"].measure(job.task.see(batch))
    z, y = seen.student("mask_patches"), (seen.teacher("mask_patches") > 0).float()
    loss = nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1)
    assert distance.shape == weight.shape == (2, 16)
    patch = loss[1, 4:8, 8:12].mean()  # row 1, column 2: wholly inside
    assert distance[1, 6].item() == pytest.approx(patch.item(), rel=1e-4)


def test_the_distance_of_choices_equals_a_literal_divergence(cached):
    terms = {"a": {"output": "mask_iou", "distance": {"name": "mask_choice", "temperature": 0.01},
                   "weighting": {"name": "uniform"}}}  # fmt: skip
    recipe = replace(load(cached, "task.rounds=1"), objective=terms)
    job, batch = job_and_batch(recipe)
    distance, _, seen = job.task.objective.terms["a"].measure(job.task.see(batch))
    s, t = (v[1, 0, 4, 1:].double().tolist() for v in (seen.student("mask_iou"), seen.teacher("mask_iou")))
    q, p = ([np.exp(v / 0.01) / sum(np.exp(w / 0.01) for w in values) for v in values] for values in (s, t))
    assert distance.shape == (2, 6)
    assert distance[1, 4].item() == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-3)
    best, batch = job_and_batch(replace(recipe, task={**recipe.task, "masks": "best"}))
    with pytest.raises(UserError, match="use output=mask_iou with task.masks=all"):
        best.task(batch)


def test_tokens_and_predicted_iou_are_compared_for_each_mask(cached):
    terms = {
        name: {"output": name, "distance": {"name": "mse"}, "weighting": {"name": "mask_area"}}
        for name in ("mask_tokens", "mask_iou")
    }
    recipe = replace(load(cached, "task.rounds=1", "task.boxes=0"), objective=terms)
    job, batch = job_and_batch(recipe)
    measured = {name: term.measure(job.task.see(batch)) for name, term in job.task.objective.items()}
    head, seen = cache.open_cache(recipe).head(), measured["mask_iou"][2]
    x, y, *_ = batch["draws"][1, 2].tolist()
    h, w = batch["sizes"][1].tolist()
    prompt = (as_points([[int(x * w), int(y * h)]]), torch.ones(1, 1))
    iou = [head.decode_all(seen.outputs[f"{name}.embedding"][1], *prompt)[1][0] for name in ("student", "sam")]
    torch.testing.assert_close(measured["mask_iou"][0][1, 8:12], (iou[0] - iou[1]) ** 2, rtol=1e-3, atol=1e-5)
    gap = seen.student("mask_tokens") - seen.teacher("mask_tokens")
    torch.testing.assert_close(measured["mask_tokens"][0], gap.square().mean(1).flatten(1))
    assert measured["mask_tokens"][1].shape == (2, 24)
    job.task(batch)["loss"].backward()


WEIGHTINGS = {
    "hard_mask": {"name": "hard_mask"},
    "mask_area": {"name": "mask_area", "power": 0.5},
    "srw": {"name": "srw", "temperature": 0.5, "feature": "mask_tokens"},
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_of_masks_equal_a_literal_formula(cached, name):
    terms = {"masks": {"output": "masks", "distance": {"name": "mask"}, "weighting": WEIGHTINGS[name]}}
    recipe = replace(load(cached, "task.rounds=0"), objective=terms)
    job, batch = job_and_batch(recipe)
    distance, weight, seen = job.task.objective.terms["masks"].measure(job.task.see(batch))
    raw = torch.zeros(2, 12)
    tokens = seen.teacher("mask_tokens").flatten(2)
    for image in range(2):
        rows, columns = (-(-int(n) // 4) for n in batch["sizes"][image])
        for mask in range(12):
            student = seen.student("masks")[image, mask, :rows, :columns] > 0
            teacher = seen.teacher("masks")[image, mask, :rows, :columns] > 0
            both, either = float((student & teacher).sum()), float((student | teacher).sum())
            unit = nn.functional.normalize(tokens[image], dim=0)
            raw[image, mask] = {
                "hard_mask": torch.sigmoid(torch.tensor(1 / ((both / either if either else 1.0) + 1e-6) - 1)),
                "mask_area": max(1.0, float(teacher.sum())) ** -0.5,
                "srw": torch.exp(-(unit[:, mask] @ unit).mean() / 0.5),
            }[name]
    torch.testing.assert_close(weight, raw / raw.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert float(weight.std()) > 1e-3
    assert distance.requires_grad and not weight.requires_grad


def test_the_second_stage_starts_from_a_run_trains_resumes_and_never_opens_the_encoder(cached, tmp_path, monkeypatch):
    first = distill.run(recipes.load(tiny.write(cached), [f"out={tmp_path}/first"]))
    from fmdistill import teachers

    monkeypatch.setattr(teachers, "build", lambda *_: pytest.fail("the teacher was built"))
    whole = load(cached, f"student.pretrained={first}", f"out={tmp_path}/second", "train.steps=6")
    run = distill.run(whole)
    before, after = load_student(first, trust=True).state_dict(), load_student(run, trust=True).state_dict()
    assert before.keys() == after.keys() and own_head(load_student(run, trust=True)) is None
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.prompts=0"], "task.prompts=0: expected at least 1"),
        (["task.boxes=1.5"], "task.boxes=1.5: expected a share"),
        (["task.rounds=-1"], "task.rounds=-1: expected 0 or more"),
        (["task.candidates=2"], "task.candidates=2, task.small=0.0: each is ignored without the other"),
        (["task.masks=some"], "task.masks='some': unknown"),
        (["teacher.live=true", "cache=null"], "task.name=refine: decodes the teacher's cached embeddings"),
        (["teacher={name: clip_mini}"], "teacher.name=clip_mini: is no SAM"),
        (["cache.trim=true"], "cache.trim=true: stores no padded tokens"),
        (["objective.masks.output=embedding", "objective.masks.distance={name: mse}"], "no term of the objective has"),
        (["task={name: distill}"], "objective.masks.output=masks: only task refine makes masks"),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_read(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        tasks.check(load(tmp_path, *overrides))


def test_components_refuse_values_that_mean_nothing():
    with pytest.raises(UserError, match=r"weighting.power=0: expected a power above 0; use uniform"):
        MaskArea(0)
    with pytest.raises(UserError, match=r"distance.temperature=0: expected an IoU above 0"):
        MaskChoice(0)
    with pytest.raises(UserError, match=r"distance.bce=0, distance.dice=0: expected weights of at least 0"):
        Mask(0, 0)


def test_a_weighting_of_masks_refuses_an_embedding(cached):
    terms = {"a": {"output": "embedding", "distance": {"name": "mse"}, "weighting": {"name": "hard_mask"}}}
    recipe = replace(load(cached), objective={**load(cached).objective, **terms})
    job, batch = job_and_batch(recipe)
    with pytest.raises(UserError, match="weighs masks, but the term has output=embedding"):
        job.task(batch)


def test_the_trained_head_is_the_run_s_own_and_the_teacher_s_stays_as_it_is(cached, tmp_path):
    recipe = load(cached, "task.head=trained", f"out={tmp_path}/run", "train.steps=4")
    run = distill.run(recipe)
    student, teacher = load_student(run, trust=True), cache.open_cache(recipe).head()
    head = own_head(student)
    assert head is not None
    changed = {n for n, v in head.state_dict().items() if not torch.equal(v, teacher.state_dict()[n])}
    assert any(name.startswith("mask_decoder.transformer") for name in changed)
    assert not any(name.startswith("prompt_encoder") for name in changed)
    assert not any("iou_prediction_head" in name for name in changed)
    again = load(cached, "task.head=trained", f"student.pretrained={run}", f"out={tmp_path}/third")
    torch.testing.assert_close(dict(own_head(tasks.build(again).student).state_dict()), dict(head.state_dict()))
    assert refine.mask_terms(recipe) == ["masks"]
