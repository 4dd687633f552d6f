"""Distances of images to their captions, compared entry by entry with literal formulas, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from ramps import drawn, ramp
from torch.autograd import gradcheck

from fmdistill import pipeline
from fmdistill import recipe as recipes
from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.distances.texts import LogitScale
from fmdistill.distill.objective import SHAPES, Objective
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError, bind, complete

NAMES = ("affinity", "icl", "crd", "contrastive")
SCALE = 20.0  # the teacher's own
CONTEXT = (*SHAPES, "logit_scale")


def made(name: str, logit_scale: float | None = SCALE, shapes: dict | None = None, **settings):
    known = {"logit_scale": logit_scale, "shapes": shapes}
    distance = complete(bind({"name": name, **settings}, DISTANCES, "distance", CONTEXT), known, "distance")
    return distance.double() if isinstance(distance, torch.nn.Module) else distance


def compared(student: torch.Tensor, teacher: torch.Tensor, text: torch.Tensor) -> Seen:
    whole = {"clip.embedding": teacher, "clip.caption": text}
    return Seen({"student.embedding": student, **whole}, output="embedding", whole=whole)


def three(count: int = 6, width: int = 5, seed: int = 0) -> list[torch.Tensor]:
    """The student's and the teacher's images, and texts of which the second and the last are one caption."""
    student, teacher, text = drawn((count, width), (count, width), (count, width), seed=seed)
    text[-1] = 3 * text[1]
    return [student, teacher, text]


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits)
    return raised / raised.sum()


def literal(name: str, student, teacher, text, teacher_scale: float, student_scale: float) -> list[float]:
    """The value of each image, by loops over images and captions."""
    s, u, t = ([row / np.sqrt((row**2).sum()) for row in x.numpy()] for x in (student, teacher, text))
    count = range(len(s))
    values = []
    for i in count:
        p_image = softmax(np.array([teacher_scale * u[i] @ t[j] for j in count]))
        q_image = softmax(np.array([student_scale * s[i] @ t[j] for j in count]))
        p_text = softmax(np.array([teacher_scale * u[j] @ t[i] for j in count]))
        q_text = softmax(np.array([student_scale * s[j] @ t[i] for j in count]))
        right = [j for j in count if np.allclose(t[i], t[j])]
        found, finding = (-np.mean([np.log(q[j]) for j in right]) for q in (q_image, q_text))
        values.append(
            {
                "affinity": -sum(p_image[j] * np.log(q_image[j]) + p_text[j] * np.log(q_text[j]) for j in count) / 2,
                "crd": sum(
                    p[j] * np.log(p[j] / q[j]) / 2 for p, q in ((p_image, q_image), (p_text, q_text)) for j in count
                ),
                "icl": found,
                "contrastive": (found + finding) / 2,
            }[name]
        )
    return values


@pytest.mark.parametrize("name", NAMES)
def test_each_image_has_the_value_of_the_formula(name):
    one = {"icl": "scale", "contrastive": "scale"}.get(name, "student_scale")
    first = {"affinity": 50.0}.get(name, 1 / 0.07)
    for seed, settings, scales in (
        (0, {}, (SCALE, first)),
        (1, {one: 7.0}, (SCALE, 7.0)),
        (2, {"teacher_scale": 3.0} if one == "student_scale" else {"learned": False}, (3.0, first)),
    ):
        inputs = three(seed=seed)
        values = made(name, **settings)(compared(*inputs))
        assert values.shape == (6,) and values.dtype == torch.float64
        np.testing.assert_allclose(values.detach(), literal(name, *inputs, *scales), rtol=1e-6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("affinity", 13.275059310451098),
        ("icl", 7.343789645083049),
        ("crd", 3.672566372565546),
        ("contrastive", 7.565847279521673),
    ],
)
def test_the_means_of_fixed_inputs_stay_the_same(name, value):
    inputs = ramp((8, 16), 0.29, 0.2), ramp((8, 16), 0.41, 1.1), ramp((8, 16), 0.53, 0.7)
    values = made(name)(compared(*(x.double() for x in inputs)))
    np.testing.assert_allclose(values.mean().item(), value, rtol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    student, teacher, text = three()
    distance = made(name, **({"student_scale": 5.0} if name == "affinity" else {}))
    assert gradcheck(lambda s: distance(compared(s, teacher, text)), student.requires_grad_())
    if name != "affinity":
        parameter = distance.scale.log_scale
        distance(compared(student.detach(), teacher, text)).sum().backward()
        gradient, step, values = parameter.grad.item(), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
                values.append(distance(compared(student.detach(), teacher, text)).sum().item())
                parameter.sub_(sign * step)
        assert gradient == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_crd_of_the_teachers_own_images_is_zero_and_has_the_gradient_of_affinity():
    student, teacher, text = three()
    same = made("crd", student_scale=SCALE)(compared(teacher, teacher, text))
    np.testing.assert_allclose(same.detach(), 0, atol=1e-12)
    gradients = []
    for distance in (made("affinity", student_scale=9.0), made("crd", student_scale=9.0)):
        own = student.clone().requires_grad_()
        distance(compared(own, teacher, text)).sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


def test_icl_finds_its_captions_among_those_of_the_whole_step():
    student, teacher, text = three()
    own, whole = {"clip.embedding": teacher[2:4], "clip.caption": text[2:4]}, {"clip.caption": text}
    seen = Seen({"student.embedding": student[2:4], **own}, output="embedding", whole=whole, first=2)
    values = made("icl")(seen).detach()
    np.testing.assert_allclose(values, literal("icl", student, teacher, text, SCALE, 1 / 0.07)[2:4], rtol=1e-6)


def test_a_learned_scale_starts_as_clips_and_never_exceeds_a_hundred():
    scale = made("icl").scale
    assert scale().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        scale.log_scale.fill_(9.0)
    assert scale().item() == pytest.approx(100) and scale.log_scale.item() == pytest.approx(math.log(100))
    fixed = LogitScale(30.0, False, "distance.scale")
    assert fixed() == 30.0 and not list(fixed.parameters())
    for name, settings in (
        ("icl", {"scale": 0.0}),
        ("affinity", {"student_scale": -1.0}),
        ("crd", {"teacher_scale": 0.0}),
    ):
        with pytest.raises(UserError, match=r"scale=.*: expected a number above 0"):
            made(name, **settings)
    with pytest.raises(UserError, match=r"distance\.scale=200.0: a learned scale is 100 at most"):
        made("contrastive", scale=200.0)
    with pytest.raises(UserError, match="the teacher's own logit scale is not known"):
        made("affinity", logit_scale=None)(compared(*three()))


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_without_captions_and_maps_are_refused(name):
    shapes = {"student.embedding": (5,), "clip.embedding": (5,)}
    with pytest.raises(UserError, match=rf"distance\.name={name}: .*none are cached; cache .*teacher\.captions=1"):
        made(name, shapes=shapes)
    student, teacher, text = three()
    with pytest.raises(UserError, match=r"teacher\.captions=1"):
        made(name)(Seen({"student.embedding": student, "clip.embedding": teacher}, output="embedding"))
    maps = [x[..., None, None] for x in (student, teacher)]
    with pytest.raises(UserError, match=rf"distance\.name={name}: compares images with each other"):
        made(name)(compared(*maps, text))
    term = {"distance": {"name": name}, "weighting": {"name": "uniform"}}
    with pytest.raises(UserError, match=r"teacher\.captions=1"):
        Objective({"embedding": term}, shapes, logit_scale=SCALE)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_without_captions_or_that_alters_the_embeddings_is_refused_before_anything_is_spent(name):
    start = ["recipes/demo/clip_mse.yaml", [f"objective.embedding.distance={{name: {name}}}"]]
    with pytest.raises(UserError, match=rf"objective\.embedding\.distance={name}: .*teacher\.captions=1; set it"):
        pipeline.check(recipes.load(*start))
    start[1].append("teacher.captions=1")
    pipeline.check(recipes.load(*start))
    for setting, part in (("standardize=channel", "standardize"), ("rectify={name: krd_representation}", "rectify")):
        with pytest.raises(UserError, match=rf"objective\.embedding\.{part}: distance {name} compares"):
            pipeline.check(recipes.load(start[0], [*start[1], f"objective.embedding.{setting}"]))


def test_weights_multiply_the_value_of_each_image():
    inputs = three()
    for name in NAMES:
        weighting = {"name": "srw", "temperature": 0.1}
        objective = Objective({"t": {"distance": {"name": name}, "weighting": weighting}}, logit_scale=SCALE).double()
        loss = objective(compared(*inputs))[0]["t"].item()
        unit_ND = inputs[1].numpy() / np.linalg.norm(inputs[1].numpy(), axis=1, keepdims=True)
        weights_N = softmax(-(unit_ND @ unit_ND.T).mean(1) / 0.1)
        first = 50.0 if name == "affinity" else 1 / 0.07
        assert loss == pytest.approx(weights_N @ literal(name, *inputs, SCALE, first), rel=1e-5)
