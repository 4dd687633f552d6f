"""Distances with learned parts, compared with published values and patch by patch with literal formulas."""

import numpy as np
import pytest
import torch
from ramps import FEATURES, LOG_VARIANCE, compared, double, drawn, made
from torch import nn

from fmdistill.distill.distances.cc import CC
from fmdistill.distill.distances.pad import attenuated
from fmdistill.distill.distances.vid import VID
from fmdistill.registry import UserError

BATCH = 6


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def batch_norm(x: np.ndarray, layer: nn.Module) -> np.ndarray:
    axes = (0, 2, 3)[: max(1, x.ndim - 1)]
    shape = (1, -1, 1, 1)[: x.ndim]
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * array(layer.weight).reshape(shape) + array(layer.bias).reshape(shape)


def convolution(x: np.ndarray, weight_OIhw: np.ndarray, stride: int, padding: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    kh, kw = weight_OIhw.shape[2:]
    rows, columns = range(0, x.shape[2] - kh + 1, stride), range(0, x.shape[3] - kw + 1, stride)
    windows = [
        [np.einsum("bihw,oihw->bo", x[:, :, r : r + kh, c : c + kw], weight_OIhw) for c in columns] for r in rows
    ]
    return np.array(windows).transpose(2, 3, 0, 1)


def transposed_convolution(x: np.ndarray, weight_IOhw: np.ndarray) -> np.ndarray:
    """Stride 2, padding 1: every input pixel stamps a 4 x 4 patch."""
    b, _, h, w = x.shape
    out = np.zeros((b, weight_IOhw.shape[1], 2 * h + 2, 2 * w + 2))
    for r in range(h):
        for c in range(w):
            out[:, :, 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] += np.einsum("bi,iohw->bohw", x[:, :, r, c], weight_IOhw)
    return out[:, :, 1:-1, 1:-1]


def test_the_mean_is_the_published_formula_s_value():
    congruence = CC((16,), (16,), width=None)(compared(*FEATURES))
    np.testing.assert_allclose(congruence.mean().item(), 5.365040302276611, rtol=2e-6)  # RepDistiller
    vid = VID((16,), (16,), initial=5.0)
    vid.regressor = nn.Identity()
    np.testing.assert_allclose(vid(compared(*FEATURES)).mean().item(), 0.8616015911102295, rtol=2e-6)
    student, teacher = FEATURES
    pad = attenuated((student - teacher).square(), LOG_VARIANCE, 1e-6)
    np.testing.assert_allclose(pad.mean().item(), 0.6018011569976807, rtol=2e-6)  # torchdistill


@pytest.mark.parametrize(
    "student, teacher", [((3, 4, 4), (2, 2, 2)), ((3, 2, 2), (2, 4, 4)), ((3, 4, 3), (2, 2, 3)), ((3, 2, 2), (2, 2, 2))]
)
@pytest.mark.parametrize("relu", [None, False])
def test_fitnet_is_the_formula_patch_by_patch(student, teacher, relu):
    s, t = drawn((BATCH, *student), (BATCH, *teacher))
    fitnet = made("fitnet", {"relu": relu}, student, teacher)
    kernel, norm = fitnet.projection[0], fitnet.projection[1]
    norm.weight.data, norm.bias.data = (0.5 + x.abs() for x in drawn((2,), (2,), seed=1))
    if student[1] == 2 * teacher[1] and student[2] == 2 * teacher[2]:
        projected = convolution(s.numpy(), array(kernel.weight), 2, 1)
    elif 2 * student[1] == teacher[1]:
        projected = transposed_convolution(s.numpy(), array(kernel.weight))
    else:
        projected = convolution(s.numpy(), array(kernel.weight), 1, 0)
    projected = batch_norm(projected, norm)
    projected = projected if relu is False else np.maximum(projected, 0)
    expected = ((projected - t.numpy()) ** 2).mean(1).reshape(BATCH, -1)
    np.testing.assert_allclose(array(fitnet(compared(s, t))), expected, rtol=1e-9)


def test_fitnet_projects_vectors_by_one_linear_layer():
    s, t = drawn((BATCH, 3), (BATCH, 5))
    fitnet = made("fitnet", {}, (3,), (5,))
    (linear,) = fitnet.projection
    expected = ((s.numpy() @ array(linear.weight).T + array(linear.bias) - t.numpy()) ** 2).mean(1)
    np.testing.assert_allclose(array(fitnet(compared(s, t))), expected, rtol=1e-9)


@pytest.mark.parametrize("width", [None, 4])
def test_congruence_is_the_formula_image_by_image(width):
    s, t = (x.numpy() for x in double(FEATURES))
    cc = made("cc", {"width": width}, (16,), (16,))
    values = array(cc(compared(*double(FEATURES))))
    if width:
        s, t = (x @ array(e.weight).T + array(e.bias) for x, e in ((s, cc.embed_student), (t, cc.embed_teacher)))
    gap = np.abs(s - t)
    pairs = [sum(gap[i, d] * gap[i + 1, d] for d in range(gap.shape[1])) for i in range(7)]
    expected = [pairs[0] / 2, *((a + b) / 2 for a, b in zip(pairs, pairs[1:], strict=False)), pairs[-1] / 2]
    np.testing.assert_allclose(values, np.array(expected) * 8 / 7, rtol=1e-9)
    np.testing.assert_allclose(values.mean(), np.mean(pairs), rtol=1e-9)
    alone = cc(compared(*(x[:1] for x in double(FEATURES))))
    assert alone.shape == (1,) and alone.item() == 0


def pooled(x: np.ndarray, size: int) -> np.ndarray:
    """Return averages (B, C, N) over size x size equal windows; a vector (B, C) is one window."""
    if x.ndim == 2:
        return x[:, :, None]
    b, c, h, w = x.shape
    return x.reshape(b, c, size, h // size, size, w // size).mean((3, 5)).reshape(b, c, -1)


@pytest.mark.parametrize("student, teacher", [((3, 4, 4), (5, 2, 2)), ((3, 2, 2), (5, 4, 4)), ((3,), (5,))])
def test_vid_is_the_formula_patch_by_patch(student, teacher):
    s, t = drawn((BATCH, *student), (BATCH, *teacher))
    vid = made("vid", {"initial": 2.0, "hidden": 4}, student, teacher)
    np.testing.assert_allclose(array(vid.variance()), 2.0, rtol=1e-6)
    assert [len(layer.weight) for layer in vid.regressor[::2]] == [4, 4, 5]
    (vid.before_softplus_C.data,) = drawn((5,), seed=1)
    variance = np.log(1 + np.exp(array(vid.before_softplus_C))) + 1e-5
    s_BCN, t_BCN = pooled(s.numpy(), 2), pooled(t.numpy(), 2)
    values = array(vid(compared(s, t))).reshape(BATCH, -1)
    assert values.shape[1] == t_BCN.shape[2]
    for b, n in np.ndindex(values.shape):
        hidden = s_BCN[b, :, n]
        for i, layer in enumerate(vid.regressor[::2]):
            hidden = array(layer.weight).reshape(len(layer.weight), -1) @ hidden + array(layer.bias)
            hidden = np.maximum(hidden, 0) if i < 2 else hidden
        expected = np.mean(0.5 * ((hidden - t_BCN[b, :, n]) ** 2 / variance + np.log(variance)))
        np.testing.assert_allclose(values[b, n], expected, rtol=1e-9)


def attention(x: np.ndarray) -> np.ndarray:
    flat = (pooled(x, 2) ** 2).mean(1)
    return flat / np.sqrt((flat**2).sum(1, keepdims=True))


@pytest.mark.parametrize("clamp", [10.0, 0.5])
@pytest.mark.parametrize(
    "base, student, teacher",
    [
        ("l2", (3, 2, 2), (3, 2, 2)),
        ("l2", (3,), (3,)),
        ("fitnet", (3, 4, 4), (2, 2, 2)),
        ("fitnet", (3,), (2,)),
        ("at", (3, 4, 4), (5, 2, 2)),
    ],
)
def test_pad_is_the_formula_patch_by_patch(base, student, teacher, clamp):
    seen = compared(*drawn((BATCH, *student), (BATCH, *teacher)))
    pad = made("pad", {"base": base, "clamp": clamp, "eps": 1e-3}, student, teacher)
    weight, norm = array(pad.branch[0].weight), pad.branch[1]
    norm.weight.data, norm.bias.data = drawn(norm.weight.shape, norm.bias.shape, seed=1)
    s, t = seen.student(), seen.teacher("embedding")
    if base == "at":
        s, t = (attention(x.numpy()) for x in (s, t))
    else:
        s, t = array(pad.projection(s)), t.numpy()
    linear = s @ weight.T if s.ndim == 2 else convolution(s, weight, 1, 0)
    log_variance = np.clip(batch_norm(linear, norm), -clamp, clamp)
    expected = (s - t) ** 2 / (1e-3 + np.exp(log_variance)) + log_variance
    variance = np.exp(log_variance)
    if base != "at":
        expected, variance = (x.mean(1).reshape(BATCH, *([-1] if x.ndim > 2 else [])) for x in (expected, variance))
    np.testing.assert_allclose(array(pad(seen)), expected, rtol=1e-9)
    assert not pad.variance(seen).requires_grad
    np.testing.assert_allclose(pad.variance(seen), variance, rtol=1e-9)


def test_unembedded_vectors_of_different_length_raise():
    with pytest.raises(UserError, match=r"has shape \(3,\), the teacher's \(4,\)"):
        CC((3,), (4,), width=None)(compared(torch.ones(2, 3), torch.ones(2, 4)))
