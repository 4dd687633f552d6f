"""Distances without parameters, compared with published values and sample by sample with literal formulas."""

import numpy as np
import pytest
import torch
from ramps import FEATURES, LABEL, LOGITS, MAPS, compared, double, drawn

from fmdistill.distill.distances import DISTANCES
from fmdistill.distill.objective import Objective
from fmdistill.distill.seen import Seen
from fmdistill.registry import UserError, bind


def distance(name: str, **arguments):
    return bind({"name": name, **arguments}, DISTANCES, "distance")()


@pytest.mark.parametrize(
    "name, arguments, pair, value",
    [
        ("kd", {"temperature": 4.0}, LOGITS, 2.360295534133911),  # mdistiller
        ("kd", {"temperature": 4.0}, LOGITS, 2.360295295715332),  # RepDistiller
        ("kd", {"temperature": 1.0}, LOGITS, 1.7785564661026),
        ("dkd", {"alpha": 1.0, "beta": 8.0}, LOGITS, 19.500078201293945),
        ("dkd", {"alpha": 1.0, "beta": 2.0}, LOGITS, 5.027826309204102),
        ("dkd", {"alpha": 1.0, "beta": 1.0}, LOGITS, 2.615783929824829),
        ("at", {}, MAPS, 0.014981545507907867),  # mdistiller and RepDistiller
        ("rkd", {}, FEATURES, 0.9751436710357666),  # mdistiller and RepDistiller
        ("rkd", {"distance": 1.0, "angle": 0.0}, FEATURES, 0.013571546413004398),
        ("rkd", {"distance": 0.0, "angle": 1.0}, FEATURES, 0.012717099860310555),
        ("sp", {}, MAPS, 0.013011765666306019),  # mdistiller and RepDistiller
        ("pkt", {}, FEATURES, 0.002023063600063324),  # mdistiller
        ("mse", {}, FEATURES, 0.5688256621360779),
    ],
)
def test_the_mean_is_the_reference_implementations_value(name, arguments, pair, value):
    values = distance(name, **arguments)(compared(*pair, label=LABEL))
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.mean().item(), value, rtol=2e-6)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def brute_dkd(s: np.ndarray, t: np.ndarray, y: int, alpha: float, beta: float, temperature: float) -> float:
    """Exclude the label as the reference code does: subtract 1000."""
    ps, pt = softmax(s / temperature), softmax(t / temperature)
    target = kl(np.array([pt[y], 1 - pt[y]]), np.array([ps[y], 1 - ps[y]]))
    without = 1000 * (np.arange(len(s)) == y)
    other = kl(softmax(t / temperature - without), softmax(s / temperature - without))
    return temperature**2 * (alpha * target + beta * other)


def test_logit_distances_are_the_formulas_sample_by_sample():
    s, t = (x.double().numpy() for x in LOGITS)
    seen = compared(*double(LOGITS), label=LABEL)
    for temperature in (0.7, 4.0):
        expected = [
            temperature**2 * kl(softmax(b / temperature), softmax(a / temperature)) for a, b in zip(s, t, strict=True)
        ]
        np.testing.assert_allclose(distance("kd", temperature=temperature)(seen), expected, rtol=1e-10)
        decoupled = distance("dkd", alpha=0.5, beta=3.0, temperature=temperature)(seen)
        expected = [brute_dkd(s[i], t[i], int(LABEL[i]), 0.5, 3.0, temperature) for i in range(8)]
        np.testing.assert_allclose(decoupled, expected, rtol=1e-9)
    for smoothing in (0.0, 0.1):
        targets = [(1 - smoothing) * (np.arange(10) == y) + smoothing / 10 for y in LABEL.numpy()]
        expected = [-(w * np.log(softmax(a))).sum() for w, a in zip(targets, s, strict=True)]
        np.testing.assert_allclose(distance("cross_entropy", smoothing=smoothing)(seen), expected, rtol=1e-10)


def test_decoupled_distillation_equals_plain_if_beta_is_the_teacher_s_share_of_the_others():
    seen = compared(*double(LOGITS), label=LABEL)
    target, other = (distance("dkd", alpha=a, beta=1 - a, temperature=2.0)(seen) for a in (1.0, 0.0))
    certain = (LOGITS[1].double() / 2).softmax(1)[torch.arange(8), LABEL]
    torch.testing.assert_close(target + (1 - certain) * other, distance("kd", temperature=2.0)(seen))


def test_decoupled_distillation_from_a_certain_teacher_is_finite():
    student, teacher = LOGITS[0].clone().requires_grad_(), 1000 * torch.eye(10)[LABEL]
    values = distance("dkd", temperature=1.0)(compared(student, teacher, label=LABEL))
    values.sum().backward()
    assert torch.isfinite(values).all() and torch.isfinite(student.grad).all() and (values > 0).all()


def test_cross_entropy_needs_no_teacher():
    alone = Seen({"student.logits": LOGITS[0]}, label=LABEL)
    term = {"distance": {"name": "cross_entropy"}, "weighting": {"name": "uniform"}, "output": "logits"}
    losses, _ = Objective({"label": term}, shapes={"student.logits": (10,)})(alone)
    torch.testing.assert_close(losses["label"], torch.nn.functional.cross_entropy(LOGITS[0], LABEL))


def brute_attention(feature_CHW: np.ndarray, size: int, p: float, valid: np.ndarray) -> np.ndarray:
    c, h, w = feature_CHW.shape
    pooled = feature_CHW.reshape(c, size, h // size, size, w // size).mean((2, 4))
    flat = (np.abs(pooled) ** p).mean(0).ravel() * valid
    return flat / np.sqrt((flat**2).sum())


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_transfer_is_the_formula_patch_by_patch(p, swapped, padded):
    student, teacher = double(MAPS)[::-1] if swapped else double(MAPS)
    valid = torch.ones(8, 16, dtype=torch.bool)
    if padded:
        valid[:, 12:] = False
    values = distance("at", p=p)(compared(student, teacher, valid=valid))
    assert values.shape == (8, 16)
    for b in range(8):
        a_s, a_t = (brute_attention(x[b].numpy(), 4, p, valid[b].numpy()) for x in (student, teacher))
        np.testing.assert_allclose(values[b], (a_s - a_t) ** 2, rtol=1e-9, atol=1e-15)


def test_attention_transfer_pools_the_larger_map_along_each_axis():
    student, teacher = drawn((2, 3, 8, 2), (2, 5, 4, 4))
    assert distance("at")(compared(student, teacher)).shape == (2, 4 * 2)


def smooth_l1(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def brute_distances(x: np.ndarray) -> np.ndarray:
    distances = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in x] for a in x])
    return distances / distances[distances > 0].mean()


def brute_cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
    u, v = x[j] - x[i], x[k] - x[i]
    return 0.0 if i in (j, k) else u @ v / np.linalg.norm(u) / np.linalg.norm(v)


def test_relational_distillation_is_the_formula_anchor_by_anchor():
    student, teacher = drawn((6, 5), (6, 9))
    s, t = 3 * student.numpy(), teacher.numpy()  # their dimensions may differ; the scale cancels in the distances
    ds, dt = brute_distances(s), brute_distances(t)
    rows = np.array([np.mean([smooth_l1(ds[i, j] - dt[i, j]) for j in range(6)]) for i in range(6)])
    triples = [[(j, k) for j in range(6) for k in range(6)]] * 6
    angles = np.array(
        [np.mean([smooth_l1(brute_cosine(s, i, *jk) - brute_cosine(t, i, *jk)) for jk in triples[i]]) for i in range(6)]
    )
    for near, angle in ((25.0, 50.0), (1.0, 0.0), (0.0, 2.0)):
        values = distance("rkd", distance=near, angle=angle)(compared(3 * student, teacher))
        np.testing.assert_allclose(values, near * rows + angle * angles, rtol=1e-9)


@pytest.mark.parametrize("student", [torch.zeros(1, 4), torch.zeros(3, 4), torch.eye(4)[[0, 0, 1]]])
def test_relational_distillation_of_coinciding_images_is_finite(student):
    student.requires_grad_()
    values = distance("rkd")(compared(student, torch.eye(4)[: len(student)].requires_grad_()))
    values.sum().backward()
    assert torch.isfinite(values).all() and student.grad.abs().max() < 1e3
    assert (len(student) > 1) == bool(values.sum() > 0)  # one image alone has no relations


def test_the_teacher_s_relations_get_no_gradient():
    student, teacher = (x.requires_grad_() for x in drawn((4, 3), (4, 3)))
    distance("rkd")(compared(student, teacher)).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


MAPS_TOO = ("at", "sp", "balanced", "token_similarity")


@pytest.mark.parametrize("name", ["cross_entropy", "kd", "dkd", "rkd", "pkt", *MAPS_TOO])
def test_gradients_are_those_of_finite_differences(name):
    shape = (4, 3, 3, 2) if name in MAPS_TOO else (4, 5)
    student, teacher = drawn(shape, shape)
    of = distance(name)
    assert torch.autograd.gradcheck(lambda s: of(compared(s, teacher, label=LABEL[:4])), student.requires_grad_())


@pytest.mark.parametrize("name", ["cross_entropy", "kd", "dkd", "rkd", "pkt"])
def test_vectors_have_one_value_per_sample_and_maps_raise(name):
    student, teacher = drawn((4, 5), (4, 5))
    assert distance(name)(compared(student, teacher, label=LABEL[:4])).shape == (4,)
    student, teacher = drawn((4, 5, 2, 2), (4, 5, 2, 2))
    says = "choose the pooled output" if name in ("rkd", "pkt") else "the channels of a map .5, 2, 2. are not classes"
    with pytest.raises(UserError, match=f"distance.name={name}: .*{says}"):
        distance(name)(compared(student, teacher, label=LABEL[:4]))


def test_outputs_that_cannot_be_compared_raise():
    for name in ("cross_entropy", "dkd"):
        with pytest.raises(UserError, match=f"distance.name={name}: learns from labels, but these images have none"):
            distance(name)(compared(*LOGITS))
    with pytest.raises(UserError, match=r"has shape \(10,\), the teacher's \(7,\)"):
        distance("kd")(compared(LOGITS[0], LOGITS[1][:, :7]))
    for pair, shapes in ((FEATURES, r"\(16,\)"), (MAPS, r"\(6, 8, 8\), the teacher's \(12, 4, 4\)")):
        with pytest.raises(UserError, match=f"distance.name=token_similarity: .* on one grid, .*{shapes}"):
            distance("token_similarity")(compared(*pair))
    with pytest.raises(UserError, match=r"distance.name=at: attention is over the patches .* vector \(16,\)"):
        distance("at")(compared(*FEATURES))
    for name, arguments, says in [
        ("kd", {"temperature": 0}, "distance.temperature=0.0: expected a number above 0"),
        ("dkd", {"temperature": -1}, "distance.temperature=-1.0: expected"),
        ("cross_entropy", {"smoothing": 1}, "distance.smoothing=1.0: expected a share"),
        ("at", {"p": 0.5}, "distance.p=0.5: expected a power of at least 1"),
        ("rkd", {"distance": 0, "angle": 0}, "distance.distance=0.0, distance.angle=0.0: expected weights"),
        ("balanced", {"cosine": 0, "smooth_l1": 0}, "distance.cosine=0.0, distance.smooth_l1=0.0, .*expected weights"),
        ("balanced", {"beta": 0}, "distance.beta=0.0: expected weights of at least 0, .* a beta above 0"),
        ("token_similarity", {"temperature": 0}, "distance.temperature=0.0: expected a number above 0"),
    ]:
        with pytest.raises(UserError, match=says):
            distance(name, **arguments)
