"""The theory against closed forms: integrals by Monte Carlo, and stacks of one token, where every branch is known."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from facts import FACTS

from spannorm import theory
from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS, Stack, build_placement
from spannorm.scaling import depth_rule
from spannorm.theory.body import Attention, FeedForward
from spannorm.theory.covariance import ACTIVATIONS, Positions, Softmax, correlated_mean
from spannorm.theory.recursion import Walk

module = import_module("spannorm.theory.predict")  # the package's `predict` is the function
ONE = theory.Body(sequence_length=1, eps=0.0)
"""A lone token attends to itself: attention is two matrices, v_a = u_a = 1 under fan-in init."""
V_F, U_F = 0.35578, 0.73526  # SwiGLU under fan-in init: E[silu²], and that plus E[silu'²]


def test_swiglu_has_the_published_gains():
    ffn = FeedForward(ONE, depth_rule("none", 1), {}, np.ones((2, 1)), 688)
    assert ffn.writes[0, 0] == pytest.approx(V_F, abs=1e-5)
    assert ffn.backward(np.ones((2, 1)))[0, 0] == pytest.approx(U_F, abs=1e-5)


def test_deepnorms_beta_enters_gate_up_and_down():
    beta = (8 * 12) ** -0.25
    z, w = np.polynomial.hermite_e.hermegauss(120)
    silu = beta * z / (1 + np.exp(-beta * z))
    ffn = FeedForward(ONE, depth_rule("deepnorm", 12), {}, np.ones((2, 1)), 688)
    # β² each from up and down; the gate's β is inside the activation
    assert ffn.writes[0, 0] == pytest.approx(beta**4 * (silu**2 * w).sum() / w.sum(), rel=1e-6)


def closed_form(placement: str, depth: int, v_a: float, u_a: float, v_f: float, u_f: float) -> tuple[float, float]:
    """ln of skip and total gain by the power recursion, block by block, for one token that starts at unit variance."""
    skip = total = 0.0
    if placement == "pre":
        q = 1.0
        for _ in range(depth):
            total += math.log((1 + u_a / q) * (1 + u_f / (q + v_a))) / 2
            q += v_a + v_f
    elif placement == "post":
        skip = -depth * math.log((1 + v_a) * (1 + v_f)) / 2
        total = depth * math.log((1 + u_a) * (1 + u_f) / ((1 + v_a) * (1 + v_f))) / 2
    elif placement == "span":
        skip = -depth * math.log(1 + v_f) / 2
        total = depth * math.log((1 + u_f * (1 + u_a) / (1 + v_a)) / (1 + v_f)) / 2
    elif placement == "deepnorm":
        root = math.sqrt(2 * depth)
        skip = -depth * (math.log(1 + v_a / root) + math.log(1 + v_f / root)) / 2
        total = depth * math.log((root + u_a) * (root + u_f) / ((root + v_a) * (root + v_f))) / 2
    return skip, total


@pytest.mark.parametrize("depth", [1, 2, 7, 64])
@pytest.mark.parametrize("rule", ["none", "1/sqrt(L)", "1/sqrt(2L):ffn", "1/L:forward"])
@pytest.mark.parametrize("placement", ["pre", "post", "span", "deepnorm"])
def test_a_lone_token_follows_the_power_recursion(placement, rule, depth):
    factor = {"n": 1.0, "1/sqrt(L)": 1 / depth, "1/sqrt(2L):ffn": 1 / (2 * depth), "1/L:forward": depth**-2}
    c = factor[rule if rule in factor else "n"]
    a = 1.0 if rule.endswith(":ffn") else c
    p = theory.predict(placement, depth, depth_rule=rule, body=ONE)
    skip, total = closed_form(placement, depth, a, a, c * V_F, c * U_F)
    assert p.log_skip_gain == pytest.approx(skip, rel=1e-4, abs=1e-6)
    assert p.log_total_gain == pytest.approx(total, rel=1e-4, abs=1e-6)
    # every block takes the same factor from the skip path, from the last block down to the first
    assert p.log_skip == pytest.approx([skip * (depth - i) / depth for i in range(depth)], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name,power", [("post", 1 / 4), ("span", 1 / 2)])
def test_spannorms_skip_path_decays_half_as_fast_as_postnorms_in_the_idealization(name, power, monkeypatch):
    # v = u = 1: a unit FFN too. A norm before down-projection brings the branch to unit variance.
    monkeypatch.setattr(PLACEMENTS[name], "inner_norms", {"ffn_down": "width"})
    walk = Walk(ONE, Stack(name, 2, "none"), 1, {(0, 0): np.ones((2, 1))})
    assert walk.backward({(0, 0): np.ones((2, 1))}, ("attn", "ffn"))[0, 0][0, 0] == pytest.approx(power)


@pytest.mark.parametrize("rule,limit", [("1/sqrt(L)", -0.5), ("1/sqrt(2L)", -0.25)])
def test_scale_init_bounds_spannorms_skip_path_for_every_depth(rule, limit):
    # the idealization's e^(-1/2) and e^(-1/4), with SwiGLU's v_f = 0.356 in the exponent
    for depth in (100, 10_000):
        p = theory.predict("span", depth, depth_rule=rule, body=ONE)
        assert p.log_skip_gain == pytest.approx(limit * V_F, rel=0.01)


def test_the_feed_forwards_share_of_the_amplitude_falls_with_the_root_of_the_depth():
    # spec: the part of the gradient's amplitude that passes one block's FFN is about (L+1)^-1/2 where v = u = 1
    p = theory.predict("span", 64, body=ONE)
    for share in p.ffn_share:
        assert share == pytest.approx(U_F / (64 + U_F), rel=0.02)


@pytest.mark.parametrize("variance", [0.04, 0.5, 1.0])
def test_the_softmax_quadrature_agrees_with_sampling(variance):
    counts = np.array([1.0, 2.0, 3.0, 17.0])
    table = Softmax.over(counts)
    overlap = table.at(table.overlap, np.full(4, variance))
    moved = table.at(table.moved, np.full(4, variance))
    rng = np.random.default_rng(0)
    for i, count in enumerate(counts):
        p = np.exp(rng.normal(0, variance**0.5, (200_000, int(count))))
        p /= p.sum(1, keepdims=True)
        square = (p**2).sum(1)
        assert overlap[i] == pytest.approx(square.mean(), rel=0.01)
        assert moved[i] == pytest.approx((square - 2 * (p**3).sum(1) + square**2).mean(), rel=0.02, abs=1e-6)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.3, 0.9, 1.0])
def test_correlated_means_agree_with_a_double_integral(activation, rho):
    f, slope = ACTIVATIONS[activation]
    x, w = np.polynomial.hermite_e.hermegauss(100)
    w = w / w.sum()
    a, b = np.meshgrid(x, x, indexing="ij")
    weights = np.outer(w, w)
    std = np.array([0.7, 1.6])
    correlation = np.concatenate([np.ones((1, 2)), np.full((2, 2), rho)])
    for function in (f, slope):
        found = correlated_mean(function, std, correlation)
        second = rho * a + math.sqrt(1 - rho**2) * b
        exact = (weights * function(std[0] * a) * function(std[1] * second)).sum()
        # a kink or a step is what a polynomial series is worst at
        assert found[1, 1] == pytest.approx(exact, abs=0.02 if activation == "relu" else 2e-3)
        assert found[0, 1] == pytest.approx((w * function(std[1] * x) ** 2).sum(), rel=1e-2)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_slopes_are_the_activations_derivatives(activation):
    f, slope = ACTIVATIONS[activation]
    z = np.linspace(-3, 3, 40)
    np.testing.assert_allclose((f(z + 1e-5) - f(z - 1e-5)) / 2e-5, slope(z), atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 20, 64, 4096])
def test_positions_stand_for_the_whole_sequence(length):
    p = Positions(length)
    assert p.weight.sum() == pytest.approx(1.0)
    assert p.mean(p.count) == pytest.approx((length + 1) / 2, rel=1e-9)  # keys of a query, on average
    np.testing.assert_allclose(p.keys.sum(1), p.count)
    # a query sees a key as often as the key is seen
    assert (p.weight * p.keys.sum(1)).sum() == pytest.approx((p.weight * p.queries.sum(1)).sum())


def test_attention_to_equal_tokens_returns_their_value():
    body = replace(ONE, sequence_length=16)
    n = body.positions.size
    attention = Attention(body, depth_rule("none", 1), {}, np.ones((n + 1, n)))
    np.testing.assert_allclose(attention.writes, 1.0, rtol=1e-6)


def test_attention_to_independent_tokens_with_flat_logits_averages_them():
    # q and k of (almost) no size: weights 1/t, so v_a(t) = 1/t and cov(a_t, a_s) = 1/max(t, s)
    body = replace(ONE, sequence_length=16, base_init="normal", initializer_range=1e-6)
    n = body.positions.size
    attention = Attention(body, depth_rule("none", 1), {"v": "head"}, np.eye(n + 1, n))
    independent = np.concatenate([np.ones((1, n)), np.zeros((n, n))])
    attention = Attention(body, depth_rule("none", 1), {"v": "head"}, independent)
    count = body.positions.count
    np.testing.assert_allclose(attention.mixed[0], 1 / count, rtol=1e-6)
    later = np.maximum.outer(count, count)
    off = ~np.eye(n, dtype=bool)
    np.testing.assert_allclose(attention.mixed[1:][off], (1 / later)[off], rtol=1e-6)


FOLLOWED = {name: fact.theory for name, fact in FACTS.items() if fact.theory is not None}
"""Placements, each with the options with which fields can go through it."""


@pytest.mark.parametrize("name", [name for name, fact in FACTS.items() if fact.theory != {}])
def test_what_the_theory_cannot_follow_is_refused_by_name(name):
    with pytest.raises(theory.NoRule, match=rf"placement '{name}': the theory has no rule for the operation"):
        theory.predict(name, 3)


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_theory_reads_every_norm_of_every_placement(name):
    options = FOLLOWED[name]
    blocks = [build_placement(name, hidden_size=8, layer_idx=i, num_layers=4, **options) for i in range(4)]
    p = theory.predict(name, 4, body=ONE, **options)
    assert p.depth_rule == FACTS[name].rule
    norms = {norm for block in blocks for norm in block.norms()}
    assert set(p.variance) - {"output"} == norms
    for norm in norms:
        there = [norm in block.norms() for block in blocks]
        assert [not math.isnan(v) for v in p.variance[norm]] == there


@pytest.mark.parametrize("name", [name for name in FOLLOWED if FACTS[name].options])
def test_the_theory_takes_every_option(name):
    scaled = replace(ONE, embedding_multiplier=3.0)
    options = {**FOLLOWED[name], **FACTS[name].options}
    given, plain = (theory.predict(name, 4, body=scaled, **o) for o in (options, FOLLOWED[name]))
    same = name in ("parallel", "hc")  # before training two norms are alike, and streams that are equal, however many
    assert (given.total_attention_share == plain.total_attention_share) == same


@pytest.mark.parametrize("rule", [pytest.param("none", marks=pytest.mark.slow), "1/sqrt(L)"])
@pytest.mark.parametrize("placement", [
    pytest.param(name, marks=[pytest.mark.slow] if FACTS[name].state(1) == (4,) else [])
    for name in FOLLOWED if not FACTS[name].opens  # a state that grows is worked out block by block, at any depth
])  # fmt: skip
def test_stretches_agree_with_block_by_block(placement, rule, monkeypatch):
    body, options = theory.Body(sequence_length=16), FOLLOWED[placement]
    exact = theory.predict(placement, 200, depth_rule=rule, body=body, **options)
    assert exact.blocks == tuple(range(200))
    monkeypatch.setattr(module, "EXACT", 10)
    module.clear()
    stretched = theory.predict(placement, 200, depth_rule=rule, body=body, **options)
    module.clear()
    assert len(stretched.blocks) < 190
    for name in ("log_skip_gain", "log_total_gain"):
        assert getattr(stretched, name) == pytest.approx(getattr(exact, name), rel=0.02, abs=0.01)


def test_ten_thousand_blocks_are_worked_out_as_a_few_hundred():
    p = theory.predict("pre", 10_000, depth_rule="none", body=theory.Body(sequence_length=32))
    assert len(p.blocks) < 800
    assert p.blocks[-1] == 9_999


def test_refusals():
    with pytest.raises(InputError, match="unknown placement"):
        theory.predict("spam", 4)
    with pytest.raises(InputError, match="depth rule"):
        theory.predict("span", 4, depth_rule="1/sqrt(l)")
    with pytest.raises(InputError, match="activation"):
        theory.Body(hidden_act="tanh")
    with pytest.raises(InputError, match="repeat"):
        theory.Body(repeat=1.5)
    with pytest.raises(InputError, match="no option"):
        theory.predict("pre", 4, initial_norm="none")


def test_verdicts_follow_from_the_gain():
    body = theory.Body(sequence_length=16)
    for placement, rule in (("span", "1/sqrt(L)"), ("span", "none"), ("pre", "none"), ("post", "none")):
        p = theory.predict(placement, 64, depth_rule=rule, body=body)
        judged = theory.verdict(p, body)
        within = abs(p.log_total_gain) <= math.log(2)
        assert (judged.kind == "keeps") == within == (judged.from_depth is None)
        if judged.from_depth is not None:
            at = [
                abs(theory.predict(placement, depth, depth_rule=rule, body=body).log_total_gain)
                for depth in (judged.from_depth - 1, judged.from_depth)
            ]
            assert at[0] <= math.log(2) < at[1]
    assert theory.verdict(theory.predict("span", 64, depth_rule="none", body=body), body).kind == "explodes"
    assert theory.verdict(theory.predict("pre", 64, depth_rule="none", body=body), body).kind == "grows"
    assert theory.advised_rule("span", 64, body) == "1/sqrt(L)"


@pytest.mark.parametrize("gain,text", [(1.0, "×1"), (2.5, "×2.5"), (4e5, "×4·10⁵"), (3e-27, "×3·10⁻²⁷")])
def test_gains_in_words(gain, text):
    assert theory.times(math.log(gain)) == text
