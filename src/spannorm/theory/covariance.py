"""Covariances between tokens, and the means over Gaussian fields and softmax weights that the theory needs.

A field has a vector at each token. After a wide layer with fresh Gaussian weights, its channels are independent draws
with a known covariance. So the theory describes a signal by its *covariance* alone: for two tokens at positions t and
s, the mean product over channels. It is `same` for a token with itself, `diff` for two distinct tokens. A gradient is
described in the same way.

A covariance is one array (n + 1, n): row 0 holds `same` at n positions, row 1 + t column s holds `diff` for t and s.
docs/theory.md derives every line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import erf, factorial, pi

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Covariance = NDArray[np.float64]

_erf = np.vectorize(erf, otypes=[float])


def _sigmoid(z: Array) -> Array:
    return 0.5 * (1 + np.tanh(z / 2))


def _bell(z: Array) -> Array:
    return np.exp(-z * z / 2) / (2 * pi) ** 0.5


ACTIVATIONS: Mapping[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "gelu": (lambda z: z * 0.5 * (1 + _erf(z / 2**0.5)), lambda z: 0.5 * (1 + _erf(z / 2**0.5)) + z * _bell(z)),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0).astype(float)),
}
"""The gate's activation and its derivative."""

_ORDER = 12
_ABSCISSAE, _WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
_HERMITE = np.stack(
    [np.polynomial.hermite_e.hermeval(_ABSCISSAE, np.eye(_ORDER)[k]) / factorial(k) ** 0.5 for k in range(_ORDER)], 1
)


def correlated_mean(f: Callable[[Array], Array], std: Array, correlation: Covariance) -> Covariance:
    """`E[f(a) f(b)]` for jointly Gaussian a, b with the given std by position and correlation by pair.

    Mehler's formula: with `f(σz) = Σ a_k(σ) h_k(z)` in normalized Hermite polynomials the mean is `Σ a_k a'_k ρᵏ`.
    What the first terms leave of the exact `E[f²]` goes to the next power.
    """
    values = f(std[:, None] * _ABSCISSAE)
    c = (values * _WEIGHTS) @ _HERMITE
    exact = values**2 @ _WEIGHTS
    rest = np.sqrt(np.maximum(exact - (c**2).sum(1), 0.0))
    c = np.concatenate([c, rest[:, None]], 1)
    rho = correlation[1:]
    products = c.T[:, :, None] * c.T[:, None]  # of each power's two coefficients, by pair
    total = products[_ORDER]
    for k in range(_ORDER - 1, -1, -1):
        total *= rho
        total += products[k]
    return np.concatenate([exact[None], total])


def cross(a: Array, b: Array) -> Covariance:
    """`a_t b_s` in a covariance's shape."""
    found = np.empty((len(a) + 1, len(a)))
    np.multiply(a, b, out=found[0])
    np.multiply(a[:, None], b, out=found[1:])
    return found


def outer(a: Array) -> Covariance:
    """`a_t a_s` in a covariance's shape: If a field is scaled by `a`, its covariance is multiplied by this."""
    return cross(a, a)


@dataclass(frozen=True)
class Softmax:
    """Means over a softmax of t keys with independent logits N(0, s²), by quadrature.

    `1/Z^k = ∫ u^(k−1) e^(−uZ) du / Γ(k)` with `Z = Σ exp z_i` turns a mean over all t logits into powers of one-logit
    means, `E[p_1^a p_2^b] = ∫ u^(a+b−1) φ_a(u) φ_b(u) φ_0(u)^(t−2) du / Γ(a+b)`, `φ_k(u) = E[e^(kz) exp(−u e^z)]`.
    """

    variances: Array
    """s², the grid of both tables."""
    overlap: Array
    """`E[Σ p_i²]`, by s² and t."""
    moved: Array
    """`E[Σ p_i² (1 − 2 p_i + Σ p_k²)]`: how much a change of the logits changes the mean, by s² and t."""

    @classmethod
    def over(cls, t: Array) -> Softmax:
        variances = np.linspace(0.0, 1.5, 16) ** 2
        z, weight = np.polynomial.hermite_e.hermegauss(48)
        z = variances[:, None] ** 0.5 * z  # (variance, z)
        weight = weight / weight.sum()
        x = np.linspace(-16.0, 9.0, 150)  # ln u
        u = np.exp(x)
        e = np.exp(-u[:, None] * np.exp(z)[:, None, :])  # (variance, u, z)
        phi = [(e * np.exp(k * z)[:, None, :]) @ weight for k in range(5)]

        def mean(*powers: int) -> Array:
            k, others = sum(powers), np.maximum(t - len(powers), 0)[:, None]
            body = np.prod([phi[p] for p in powers], axis=0)[:, None] * phi[0][:, None] ** others
            return (body * u**k).sum(-1) * (x[1] - x[0]) / factorial(k - 1)

        square, cube, fourth = (t * mean(k) for k in (2, 3, 4))
        two = t * (t - 1) * mean(2, 2)
        return cls(variances, square, np.maximum(square - 2 * cube + fourth + two, 0.0))

    def at(self, table: Array, variance: Array) -> Array:
        """A table's value at each position's variance."""
        grid, t = self.variances, np.arange(len(variance))
        inside = np.minimum(variance, grid[-1])
        i = np.minimum(np.searchsorted(grid, inside, side="right"), len(grid) - 1) - 1
        low, high = table[i, t], table[i + 1, t]
        return low + (inside - grid[i]) / (grid[i + 1] - grid[i]) * (high - low)


class Positions:
    """At most `nodes` positions that represent a sequence: bins whose width grows with the distance from the start.

    `count`: the tokens at or before a node, which are a query's keys. `weight`: the bin's share of the sequence.
    Without a causal mask all positions are equal, and one node represents them.
    """

    def __init__(self, length: int, nodes: int = 20, causal: bool = True) -> None:
        edges = np.unique(np.round(np.geomspace(1, length + 1, nodes + 1)).astype(int)) if length > 1 else [1, 2]
        if not causal:
            edges = np.array([1, length + 1])
        first, last = np.asarray(edges[:-1]), np.asarray(edges[1:]) - 1
        self.size = len(first)
        self.count = (first + last) / 2.0
        sizes = last - first + 1.0
        self.weight = sizes / length
        node = self.count[:, None]
        # tokens of bin i at or before node t (keys[t, i]), and tokens of bin t at or after node i (queries[i, t])
        self.keys = np.clip(node - first + 1, 0, sizes)
        self.keys[np.diag_indices(self.size)] = (sizes + 1) / 2
        self.queries = np.clip(last - node + 1, 0, sizes)
        self.queries[np.diag_indices(self.size)] = (sizes + 1) / 2
        if not causal:
            self.keys = self.queries = np.array([[float(length)]])
        self.count = self.keys.sum(1)
        order = np.arange(self.size)
        self._low = np.concatenate([order[None], np.minimum.outer(order, order)])
        self._high = np.concatenate([order[None], np.maximum.outer(order, order)])
        self.shared = self.count[self._low]
        self.pairs = outer(self.count) - self.shared
        self.softmax = Softmax.over(self.count)

    def mean(self, per_position: Array) -> float:
        """Mean over the tokens of a sequence."""
        return float(self.weight @ per_position)

    def over_keys(self, k: Covariance) -> tuple[Covariance, Covariance]:
        """For queries t, s: the sum of `same` over keys that both see, and of `diff` over their other pairs of keys."""
        return self._gather(k, self.keys, self._low)

    def over_queries(self, k: Covariance) -> tuple[Covariance, Covariance]:
        """For keys i, j: the same sums over the queries that see them."""
        return self._gather(k, self.queries, self._high)

    @staticmethod
    def _gather(k: Covariance, m: Array, common: NDArray[np.int64]) -> tuple[Covariance, Covariance]:
        full = m @ k[1:] @ m.T
        pairs = np.concatenate([np.diagonal(full)[None], full])
        return (m @ k[0])[common], pairs - (m @ np.diagonal(k[1:]))[common]


def normalized(k: Covariance, on: bool = True) -> tuple[Covariance, Array]:
    """The covariance of the field divided by its std, and the std by position. With `on` false: unchanged, and 1."""
    if not on:
        return k, np.ones(k.shape[1])
    std = np.sqrt(np.maximum(k[0], 1e-300))
    return k / outer(std), std
