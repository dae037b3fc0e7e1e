"""A mixture of experts at initialization: the feed-forward's covariance, weighted by how the router treats two tokens.

    y = Σ_{e ∈ top k} w_e E_e(n) + S(n),    w from a softmax of the logits z = W n

Experts are drawn independently. So for two tokens t and s only terms with the same expert remain,

    E[y_t y_s] = A_ts · E[E_e(n_t) E_e(n_s)],    A_ts = E[Σ_e w_e(t) w_e(s)],

and in the same way for the gradient through the experts. Through the router it is `M_ts · E[E_e(n_t) E_e(n_s)] g_ts`
at the logits, `M_ts = E[Σ_e w_e w'_e (1 − p_e − p'_e + Σ_j p_j p'_j)]`. Here w are the k largest entries of the
softmax p. Both are means over Gaussian logits of correlation ρ_ts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from spannorm.scaling import DepthRule
from spannorm.theory.body import Body, FeedForward
from spannorm.theory.covariance import Array, Covariance, normalized, outer

_CORRELATIONS = np.array([-0.3, 0.0, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97, 0.99, 1.0])
_VARIANCES = np.array([1e-6, 0.15, 0.4, 0.7, 1.0, 1.4, 2.0, 4.0])
_LOGITS = 64_000
"""Logits drawn for each point of the two grids. The error of A is about half a percent."""


@cache
def _overlaps(experts: int, k: int, norm_topk: bool) -> tuple[Array, Array]:
    """A and M by (variance, correlation) of the logits, from one seeded sample."""
    rng = np.random.default_rng(0)
    samples = max(1000, _LOGITS // experts)
    first, other = rng.standard_normal((2, samples, experts))
    a, m = np.empty((2, len(_VARIANCES), len(_CORRELATIONS)))
    for i, variance in enumerate(_VARIANCES):
        w, p = _weights(variance**0.5 * first, k, norm_topk)
        for j, rho in enumerate(_CORRELATIONS):
            second = rho * first + (1 - rho * rho) ** 0.5 * other
            v, q = _weights(variance**0.5 * second, k, norm_topk)
            both = w * v
            a[i, j] = both.sum(1).mean()
            m[i, j] = (both * (1 - p - q)).sum(1).mean() + (both.sum(1) * (p * q).sum(1)).mean()
    return a, np.maximum(m, 0.0)


def _weights(logits: Array, k: int, norm_topk: bool) -> tuple[Array, Array]:
    """The weights of the chosen experts, zero for the others, and the softmax, both (samples, experts)."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    chosen = logits >= np.partition(logits, -k, axis=1)[:, -k, None]
    if norm_topk:
        p = p * chosen
    p /= p.sum(1, keepdims=True)
    return p * chosen, p


def _between(table: Array, variance: Array, correlation: Covariance) -> Covariance:
    """A table's value for each pair of tokens, by linear interpolation. The variance is the pair's geometric mean."""
    spread = outer(np.sqrt(variance))
    at = np.clip(np.interp(spread, _VARIANCES, np.arange(len(_VARIANCES))), 0, len(_VARIANCES) - 1 - 1e-9)
    by = np.clip(np.interp(correlation, _CORRELATIONS, np.arange(len(_CORRELATIONS))), 0, len(_CORRELATIONS) - 1 - 1e-9)
    i, j, u, v = at.astype(int), by.astype(int), at % 1, by % 1
    low = (1 - v) * table[i, j] + v * table[i, j + 1]
    high = (1 - v) * table[i + 1, j] + v * table[i + 1, j + 1]
    return (1 - u) * low + u * high


@dataclass
class Mixture:
    """Top-k experts and a shared one: forward on covariances, then `backward`."""

    body: Body
    rule: DepthRule
    inner_norms: Mapping[str, str]
    reads: Covariance
    writes: Covariance = field(init=False)

    def __post_init__(self) -> None:
        b, common = self.body, (self.body, self.rule, self.inner_norms, self.reads)
        self.expert = FeedForward(*common, b.moe_intermediate_size)
        shared = b.shared_expert_intermediate_size
        self.shared = FeedForward(*common, shared) if shared else None
        self.router_power = b.power("router", b.hidden_size, b.num_experts, self.rule)
        correlation, std = normalized(self.reads)
        overlap, moved = _overlaps(b.num_experts, b.num_experts_per_tok, b.norm_topk_prob)
        logits = self.router_power * b.hidden_size * std**2
        self.overlap = _between(overlap, logits, correlation)
        self.moved = _between(moved, logits, correlation)
        self.writes = self.overlap * self.expert.writes
        if self.shared:
            self.writes = self.writes + self.shared.writes

    def backward(self, gradient: Covariance) -> Covariance:
        """The covariance of the gradient at what was read, from that at what was written."""
        experts = self.overlap * self.expert.backward(gradient)
        # at the logits the loss moves by g·E_e(n), a sum over channels
        logits = self.moved * self.expert.writes * gradient * self.body.hidden_size
        total = experts + self.router_power * logits
        return total + self.shared.backward(gradient) if self.shared else total
