"""Rotations that give every dimension the same variance: Hadamard matrices, and another one for other orders."""

# Legend: C dimensions.

import math

import numpy as np
from scipy.linalg import hadamard as sylvester


def rotation(variance_C: np.ndarray) -> np.ndarray:
    """Return an orthogonal Q (C, C), float64, for which Q diag(`variance_C`) Q^T has equal diagonal entries.

    Q is a normalised Hadamard matrix, which does so for any variances, or for an order without a known construction
    `levelling`, which depends on them.
    """
    order = len(variance_C)
    matrix = hadamard(order)
    return levelling(variance_C) if matrix is None else matrix / math.sqrt(order)


def hadamard(order: int) -> np.ndarray | None:
    """Return a Hadamard matrix (order, order) of entries 1.0 and -1.0, or None if no construction here has this order.

    Sylvester's for powers of two, else the Kronecker product of Sylvester's and the smallest possible one of Paley's
    for a prime (Paley, "On orthogonal matrices", 1933): 12 x 64 for 768 dimensions, 36 x 32 for 1152.
    """
    doublings = (order & -order).bit_length() - 1  # how often 2 divides the order
    for exponent in range(doublings, -1, -1):
        core = _core(order >> exponent)
        if core is not None:
            return np.kron(sylvester(1 << exponent).astype(float), core)
    return None


def levelling(variance_C: np.ndarray) -> np.ndarray:
    """Return an orthogonal Q (C, C) for which Q diag(`variance_C`) Q^T has equal diagonal entries, for any C.

    A sequence of C - 1 rotations of two dimensions each, of which one has more than the mean variance and one less; the
    first gets the mean. (Bendel and Mickey, "Population correlation matrices for sampling experiments", 1978.)
    """
    count, mean = len(variance_C), float(np.mean(variance_C))
    q_CC, covariance_CC = np.eye(count), np.diag(np.asarray(variance_C, float))
    for i in range(count - 1):
        excess_C = np.diag(covariance_CC) - mean
        if abs(excess_C[i]) <= 1e-15 * mean:
            continue
        j = i + 1 + int(np.argmin(np.sign(excess_C[i]) * excess_C[i + 1 :]))
        # The tangent t of the angle solves excess_j t^2 - 2 covariance_ij t + excess_i = 0.
        between = covariance_CC[i, j]
        root = math.sqrt(max(0.0, between**2 - excess_C[i] * excess_C[j]))
        largest = between + math.copysign(root, between)
        tangent = excess_C[i] / largest if largest else 0.0
        cosine = 1 / math.hypot(1, tangent)
        turn = cosine * np.array([[1, -tangent], [tangent, 1]])
        pair = [i, j]
        covariance_CC[pair] = turn @ covariance_CC[pair]
        covariance_CC[:, pair] = covariance_CC[:, pair] @ turn.T
        q_CC[pair] = turn @ q_CC[pair]
    return q_CC


def _core(order: int) -> np.ndarray | None:
    """Return a Hadamard matrix of this order by Paley's first or second construction, or None if neither makes one."""
    if order == 1:
        return np.ones((1, 1))
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        return np.eye(order) + _bordered(order - 1, -1)
    half = order // 2
    if order % 2 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        symmetric = np.kron(_bordered(half - 1, 1), [[1, 1], [1, -1]])
        return symmetric + np.kron(np.eye(half), [[1, -1], [-1, -1]])
    return None


def _bordered(prime: int, sign: int) -> np.ndarray:
    """Return Jacobsthal's matrix of quadratic residues with a first row of ones and a first column of `sign`."""
    residue = np.full(prime, -1.0)
    residue[[i * i % prime for i in range(1, prime)]] = 1
    residue[0] = 0
    index = np.arange(prime)
    bordered = np.zeros((prime + 1, prime + 1))
    bordered[0, 1:], bordered[1:, 0] = 1, sign
    bordered[1:, 1:] = residue[(index[:, None] - index) % prime]
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
