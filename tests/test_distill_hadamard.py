"""Hadamard matrices and the rotations that level variances."""

import numpy as np
import pytest

from fmdistill.distill.hadamard import hadamard, levelling, rotation
from fmdistill.distill.standardize import phi_s


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 60, 96, 128, 192, 384, 768, 1152])
def test_rows_of_a_hadamard_matrix_are_signs_and_orthogonal(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order) and set(np.unique(matrix)) <= {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 5, 6, 30, 50, 92])
def test_other_orders_have_none(order):
    assert hadamard(order) is None


@pytest.mark.parametrize("order", [1, 2, 3, 5, 6, 30, 92])
def test_levelling_gives_each_dimension_the_mean_variance(order):
    for seed in range(3):
        variance = np.random.default_rng(seed).gamma(0.3, size=order)
        variance[: order // 3] = 0
        q = levelling(variance)
        np.testing.assert_allclose(q @ q.T, np.eye(order), atol=1e-12)
        np.testing.assert_allclose(np.diag(q @ np.diag(variance) @ q.T), variance.mean(), rtol=1e-9)
    assert np.array_equal(levelling(np.full(order, 2.0)), np.eye(order))


@pytest.mark.parametrize("order, rank", [(32, 32), (32, 5), (12, 12), (48, 20), (30, 30), (30, 4)])
def test_phi_s_is_orthogonal_inverts_and_levels_the_variances_of_any_covariance(order, rank):
    factor = np.random.default_rng(order + rank).normal(size=(order, rank)) * np.geomspace(1, 100, rank)
    covariance = factor @ factor.T
    scale, turn = phi_s(covariance)
    np.testing.assert_allclose(turn @ turn.T, np.eye(order), atol=1e-12)
    np.testing.assert_allclose(turn.T @ turn, np.eye(order), atol=1e-12)
    np.testing.assert_allclose(np.diag(turn @ covariance @ turn.T) / scale**2, 1, rtol=1e-9)
    assert scale == pytest.approx(np.sqrt(np.trace(covariance) / order), rel=1e-9)


def test_the_rotation_is_the_hadamard_matrix_of_its_order_if_it_has_one():
    variance = np.arange(12.0)
    assert np.array_equal(rotation(variance), hadamard(12) / np.sqrt(12))
    assert np.array_equal(rotation(variance[:6]), levelling(variance[:6]))
