"""Attention and feed-forward at initialization, as maps on the covariance between tokens (see covariance.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from spannorm.errors import InputError, unknown
from spannorm.norms import NORMS, DyT
from spannorm.scaling import BASE_INITS, DepthRule, Role, base_std, cut_std
from spannorm.theory.covariance import ACTIVATIONS, Covariance, Positions, correlated_mean, normalized, outer


@dataclass(frozen=True)
class Body:
    """The sublayers at init: all that the theory knows about a network, except its placement and its depth.

    Args:
        hidden_size: d.
        intermediate_size: channels inside the gated feed-forward.
        num_attention_heads, head_dim: heads and their size; None means d / heads.
        sequence_length: T, tokens of a sequence.
        repeat: the probability that two positions of a sequence hold the same token, which correlates embeddings and
            targets; 0 for tokens drawn from a large vocabulary.
        causal: whether a token attends only to itself and earlier tokens, or to all.
        gated: whether the feed-forward is `W_down(φ(W_gate n) ⊙ W_up n)`, or `W_down φ(W_up n)`.
        hidden_act: φ: silu, gelu or relu.
        qk_norm: a norm on each head's queries and keys.
        rope_theta: RoPE's base; None means no rotation of queries and keys.
        base_init, initializer_range, tied: as in `spannorm.scaling.base_std`.
        embedding_multiplier: what the embedding is multiplied with.
        norm: the norms' kind. LayerNorm is treated as RMSNorm, because a wide field has mean 0.
        eps: the norms' epsilon.
        num_experts, num_experts_per_tok, moe_intermediate_size: as in `spannorm.models.SpanNormConfig`; 0 experts make
            a dense model.
        norm_topk_prob, shared_expert_intermediate_size, decoder_sparse_step: as there.
        num_layers: L, which only base init `tiny` uses; `predict` fills it in.
    """

    hidden_size: int = 256
    intermediate_size: int = 688
    num_attention_heads: int = 4
    head_dim: int | None = None
    sequence_length: int = 128
    repeat: float = 0.0
    causal: bool = True
    gated: bool = True
    hidden_act: str = "silu"
    qk_norm: bool = False
    rope_theta: float | None = 10000.0
    base_init: str = "fan_in"
    initializer_range: float = 0.02
    tied: bool = False
    embedding_multiplier: float = 1.0
    norm: str = "rmsnorm"
    eps: float = 1e-6
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int | None = None
    decoder_sparse_step: int = 1
    num_layers: int = 1

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise unknown("activation", self.hidden_act, ACTIVATIONS)
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if self.base_init not in BASE_INITS:
            raise unknown("base_init", self.base_init, BASE_INITS)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "sequence_length"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"`hidden_size` ({self.hidden_size}) must be divisible by `num_attention_heads` "
                f"({self.num_attention_heads}), or give `head_dim`."
            )
        if not 0 <= self.repeat < 1:
            raise InputError(f"`repeat` is a probability below 1; got {self.repeat}.")

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a block's feed-forward is a mixture of experts."""
        return self.num_experts > 0 and (layer_idx + 1) % self.decoder_sparse_step == 0

    @cached_property
    def attention_size(self) -> int:
        """Channels of all heads together."""
        return self.num_attention_heads * (self.head_dim or self.hidden_size // self.num_attention_heads)

    @cached_property
    def positions(self) -> Positions:
        return Positions(self.sequence_length, causal=self.causal)

    def power(self, role: Role, fan_in: int, fan_out: int, rule: DepthRule | None = None) -> float:
        """The variance of a matrix's entries, with the depth rule's factor."""
        std = base_std(role, fan_in, fan_out, width=self.hidden_size, base_init=self.base_init,
                       initializer_range=self.initializer_range, tied=self.tied,
                       num_layers=self.num_layers)  # fmt: skip
        cut = BASE_INITS[self.base_init]
        return float((std * (cut_std(cut) if cut else 1.0) * (rule.init.get(role, 1.0) if rule else 1.0)) ** 2)

    def embedding(self) -> Covariance:
        """The embedding's covariance: two tokens are the same with probability `repeat`, and independent otherwise."""
        variance = self.power("embedding", self.hidden_size, self.hidden_size) * self.embedding_multiplier**2
        return variance * self.coincidence()

    def coincidence(self) -> Covariance:
        """1 for a token with itself, `repeat` for two tokens."""
        n = self.positions.size
        return np.concatenate([np.ones((1, n)), np.full((n, n), self.repeat)])

    @cached_property
    def rotation(self) -> tuple[Covariance, Covariance]:
        """How much RoPE reduces the product of a query's and a key's common part, for two queries t and s.

        For one key that both see it is `mean_θ cos θ(t−s)`. For two keys it is that mean, also over the keys."""
        n = self.positions.size
        if self.rope_theta is None:
            return np.ones((n + 1, n)), np.ones((n + 1, n))
        half = max(1, self.attention_size // self.num_attention_heads // 2)
        theta = self.rope_theta ** (-np.arange(half) / half)
        count = self.positions.count
        same = np.cos(theta * (count[:, None, None] - count[:, None])).mean(-1)
        # the mean over keys 0 … t of the rotation back from the query, a geometric sum
        phase = (1 - np.exp(-1j * np.outer(count, theta))) / (1 - np.exp(-1j * theta)) / count[:, None]
        both = (phase @ phase.conj().T).real / half
        return np.concatenate([np.ones((1, len(count))), same]), np.concatenate([np.diagonal(both)[None], both])


@dataclass
class Attention:
    """Causal attention: forward on its input's covariance, then `backward` on the gradient's covariance.

    Queries and keys give Gaussian logits z. A mean over softmax weights is approximated by the ratio of means
    (`E[p_i p_j] ∝ E[exp(z_i + z_j)]`, the annealed mean). The logits' covariance has one value for a shared key and
    one for two keys.
    """

    body: Body
    rule: DepthRule
    inner_norms: Mapping[str, str]
    reads: Covariance
    writes: Covariance = field(init=False)

    def __post_init__(self) -> None:
        b, p = self.body, self.body.positions
        d, inner = b.hidden_size, b.attention_size
        self.q_power, self.k_power = b.power("q", d, inner, self.rule), b.power("k", d, inner, self.rule)
        self.v_power = b.power("v", d, inner, self.rule)
        self.out_power = b.power("attn_out", inner, d, self.rule)
        on_q, on_k = ("q" in self.inner_norms or b.qk_norm), ("k" in self.inner_norms or b.qk_norm)
        self.q, self.q_std = normalized(self.q_power * d * self.reads, on_q)
        self.k, self.k_std = normalized(self.k_power * d * self.reads, on_k)
        self.v, self.v_std = normalized(self.v_power * d * self.reads, "v" in self.inner_norms)

        same_key, two_keys = p.over_keys(self.k)
        self.k_same, self.k_diff = same_key / p.shared, two_keys / np.maximum(p.pairs, 1e-9)
        rotated_same, rotated_diff = b.rotation
        # how much more likely two queries attend to one key than to two: exp of the difference of covariances in the
        # annealed mean, scaled so that for one query it equals the quadrature's value
        covariance = self.q * (rotated_same * self.k_same - rotated_diff * self.k_diff)
        variance = np.maximum(covariance[0], 1e-9)
        exact = p.softmax.at(p.softmax.overlap, variance)
        self.moved = p.softmax.at(p.softmax.moved, variance)
        growth = np.log(np.maximum(exact * (p.count - 1), 1e-300) / np.maximum(1 - exact, 1e-300)) / variance
        growth[p.count <= 1] = 1.0
        self.ratio = np.exp(covariance * np.sqrt(outer(np.maximum(growth, 0.0))))
        self.total = self.ratio * p.shared + p.pairs
        v_same, v_diff = p.over_keys(self.v)
        self.v_spread = v_same / p.shared - np.where(p.pairs > 0, v_diff / np.maximum(p.pairs, 1e-9), 0.0)
        mixed = (self.ratio * v_same + v_diff) / self.total
        self.mixed, self.mixed_std = normalized(mixed, "attn_out" in self.inner_norms)
        self.writes = self.out_power * inner * self.mixed

    def backward(self, gradient: Covariance) -> Covariance:
        """The covariance of the gradient at what was read, from that at what was written."""
        b, p = self.body, self.body.positions
        d, inner = b.hidden_size, b.attention_size
        g = self.out_power * d * gradient / outer(self.mixed_std)
        # through the values: a key's gradient is a sum over the queries that see it
        weighed = g / self.total
        same, diff = p.over_queries(self.ratio * weighed)
        alone, apart = p.over_queries(weighed)
        values = np.concatenate([(same[0] + diff[0])[None], (alone + apart)[1:]])
        # through the logits: dz_i = p_i g·(v_i − Σ p_k v_k); the common part of keys and of values cancels
        through_q, through_k = self.passed
        same, diff = p.over_queries(through_k * weighed)
        found = self.v_power * values / outer(self.v_std) + through_q * g
        found[0] += self.k_power * (same[0] + diff[0]) / self.k_std**2
        return inner * found

    @cached_property
    def passed(self) -> tuple[Covariance, Covariance]:
        """What the gradient at the mixed values is multiplied with on its way through the logits into the queries, and
        into the keys before it is summed over queries."""
        p, (rotated_same, rotated_diff) = self.body.positions, self.body.rotation
        k_spread = self.k_same - rotated_diff * self.k_diff
        overlap = self.ratio * p.shared / self.total
        moved = overlap * (1 - overlap)
        moved[0] = self.moved
        moved *= self.v_spread
        into_k = self.ratio * self.q * rotated_same * moved / np.maximum(overlap, 1e-300)
        return self.q_power * k_spread * moved / outer(self.q_std), into_k


@dataclass
class Squash:
    """DyT, `weight · tanh(alpha · x) + bias`: forward on covariances, then `backward`.

    All channels have the same weight and the same bias.
    """

    norm: DyT
    reads: Covariance
    writes: Covariance = field(init=False)

    def __post_init__(self) -> None:
        alpha, self.power, shift = (p.item() for p in (self.norm.alpha, self.norm.weight.square(), self.norm.bias))
        correlation, std = normalized(self.reads)
        self.alpha, self.std, self.correlation = alpha, alpha * std, np.clip(correlation, -1, 1)
        self.writes = self.power * correlated_mean(np.tanh, self.std, self.correlation) + shift**2

    def backward(self, gradient: Covariance) -> Covariance:
        """The covariance of the gradient at what was read, from that at what was written."""
        slope = correlated_mean(lambda z: 1 - np.tanh(z) ** 2, self.std, self.correlation)
        return self.power * self.alpha**2 * slope * gradient


@dataclass
class FeedForward:
    """The feed-forward `W_down(φ(W_gate n) ⊙ W_up n)`, or without a gate `W_down φ(W_up n)`.

    Forward on covariances, then `backward`.
    """

    body: Body
    rule: DepthRule
    inner_norms: Mapping[str, str]
    reads: Covariance
    intermediate_size: int
    writes: Covariance = field(init=False)

    def __post_init__(self) -> None:
        b = self.body
        d, inner = b.hidden_size, self.intermediate_size
        self.gate_power = b.power("ffn_gate" if b.gated else "ffn_up", d, inner, self.rule)
        self.up_power = b.power("ffn_up", d, inner, self.rule)
        self.down_power = b.power("ffn_down", inner, d, self.rule)
        correlation, std = normalized(self.reads)
        self.gate_std, self.correlation = (self.gate_power * d) ** 0.5 * std, np.clip(correlation, -1, 1)
        self.up = self.up_power * d * self.reads if b.gated else np.ones_like(self.reads)
        self.gate = correlated_mean(ACTIVATIONS[b.hidden_act][0], self.gate_std, self.correlation)
        inside, self.inside_std = normalized(self.gate * self.up, "ffn_down" in self.inner_norms)
        self.writes = self.down_power * inner * inside

    def backward(self, gradient: Covariance) -> Covariance:
        """The covariance of the gradient at what was read, from that at what was written."""
        b = self.body
        g = self.down_power * b.hidden_size * gradient / outer(self.inside_std)
        return self.intermediate_size * g * self.passed

    @cached_property
    def passed(self) -> Covariance:
        """What the gradient inside the feed-forward is multiplied with on its way to what was read."""
        slope = correlated_mean(ACTIVATIONS[self.body.hidden_act][1], self.gate_std, self.correlation)
        through_up = self.up_power * self.gate if self.body.gated else 0.0
        return through_up + self.gate_power * slope * self.up
