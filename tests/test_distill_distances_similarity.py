"""Distances between similarities, and cosine with smooth L1, compared entry by entry with literal formulas."""

import numpy as np
import pytest
import torch
from ramps import compared, drawn
from test_distill_distances import distance, kl, smooth_l1, softmax


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_balanced_is_the_cosine_and_the_smooth_l1_of_each_patch_and_of_each_vector(beta):
    student, teacher = (2 * x for x in drawn((2, 5, 2, 3), (2, 5, 2, 3)))

    def expected(s: np.ndarray, t: np.ndarray) -> float:
        gap = np.mean([beta * smooth_l1((a - b) / beta) for a, b in zip(s, t, strict=True)])
        return 0.7 * (1 - cosine(s, t)) + 0.2 * gap

    of = distance("balanced", cosine=0.7, smooth_l1=0.2, beta=beta)
    s, t = student.flatten(2).numpy(), teacher.flatten(2).numpy()
    patches = [[expected(s[b, :, n], t[b, :, n]) for n in range(6)] for b in range(2)]
    np.testing.assert_allclose(of(compared(student, teacher)), patches, rtol=1e-12)
    vectors = [expected(s[b, :, 0], t[b, :, 0]) for b in range(2)]
    np.testing.assert_allclose(of(compared(student[..., 0, 0], teacher[..., 0, 0])), vectors, rtol=1e-12)
    alone = distance("balanced", cosine=1.0, smooth_l1=0.0)(compared(student, teacher))
    torch.testing.assert_close(alone, distance("cosine")(compared(student, teacher)))


def rows(x: np.ndarray) -> np.ndarray:
    gram = np.array([[a @ b for b in x] for a in x])
    return gram / np.sqrt((gram**2).sum(1, keepdims=True))


@pytest.mark.parametrize("padded", [False, True])
def test_similarity_preserving_is_the_formula_row_by_row(padded):
    student, teacher = drawn((5, 3, 2, 2), (5, 7, 2, 2))
    valid = torch.ones(5, 4, dtype=torch.bool)
    if padded:
        valid[:, 3], valid[0, 2] = False, False
    s, t = ((x.flatten(2) * valid[:, None]).flatten(1).numpy() for x in (student, teacher))
    expected = [sum((rows(s)[i, j] - rows(t)[i, j]) ** 2 for j in range(5)) / 5 for i in range(5)]
    np.testing.assert_allclose(distance("sp")(compared(student, teacher, valid=valid)), expected, rtol=1e-10)
    vectors = [x.flatten(1) * scale for x, scale in ((student, 3.0), (teacher, 0.1))]  # scale and width cancel
    s, t = (x.numpy() for x in vectors)
    expected = [((rows(s)[i] - rows(t)[i]) ** 2).sum() / 5 for i in range(5)]
    np.testing.assert_allclose(distance("sp")(compared(*vectors)), expected, rtol=1e-10)


def test_probabilistic_transfer_is_the_formula_row_by_row():
    student, teacher = drawn((5, 4), (5, 9))

    def neighbours(x: np.ndarray) -> np.ndarray:
        kernel = np.array([[(1 + cosine(a, b)) / 2 for b in x] for a in x])
        return np.array([row / row.sum() for row in kernel])

    ps, pt = neighbours(student.numpy()), neighbours(teacher.numpy())
    expected = [np.mean([pt[i, j] * np.log((pt[i, j] + 1e-7) / (ps[i, j] + 1e-7)) for j in range(5)]) for i in range(5)]
    np.testing.assert_allclose(distance("pkt")(compared(student, teacher)), expected, rtol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_token_similarity_is_the_divergence_patch_by_patch(padded, temperature):
    student, teacher = drawn((2, 3, 2, 3), (2, 8, 2, 3))
    valid = torch.ones(2, 6, dtype=torch.bool)
    if padded:
        valid[1, 4:] = False
    values = distance("token_similarity", temperature=temperature)(compared(student, teacher, valid=valid))
    for b in range(2):
        s, t = (x[b].flatten(1).numpy()[:, valid[b].numpy()].T for x in (student, teacher))
        for i in range(len(s)):
            ps, pt = (softmax(np.array([cosine(x[i], y) for y in x]) / temperature) for x in (s, t))
            np.testing.assert_allclose(values[b, i], kl(pt, ps), rtol=1e-8)
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("name", ["sp", "pkt", "token_similarity", "balanced"])
def test_equal_outputs_have_no_distance_and_a_finite_gradient(name):
    shape = (4, 5) if name == "pkt" else (4, 5, 2, 2)
    (teacher,) = drawn(shape)
    student = teacher.clone().requires_grad_()
    values = distance(name)(compared(student, teacher))
    values.sum().backward()
    np.testing.assert_allclose(values.detach(), 0, atol=1e-12)
    assert torch.isfinite(student.grad).all()
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    distance(name)(compared(zero, teacher)).sum().backward()
    assert torch.isfinite(zero.grad).all()
