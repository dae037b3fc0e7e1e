"""The theory of a top-k mixture against what is known of it."""

from __future__ import annotations

import numpy as np
import pytest

from spannorm import theory
from spannorm.scaling import depth_rule
from spannorm.theory.body import FeedForward
from spannorm.theory.covariance import normalized
from spannorm.theory.mixture import Mixture, _overlaps

RULE = depth_rule("none", 1)


def mixture(reads: np.ndarray, **experts) -> Mixture:
    length = reads.shape[1]
    return Mixture(theory.Body(sequence_length=length, **{"moe_intermediate_size": 64, **experts}), RULE, {}, reads)


def test_two_experts_weigh_as_the_logistic_of_the_difference_of_their_logits():
    # w = σ(Δ), 1 − σ(Δ) with Δ ~ N(0, 2): E[Σ w²] = ½ (1 + E tanh²(Δ/2))
    x, weight = np.polynomial.hermite_e.hermegauss(100)
    exact = 0.5 * (1 + (weight * np.tanh(2**0.5 * x / 2) ** 2).sum() / weight.sum())
    both = mixture(np.ones((2, 1)), num_experts=2, num_experts_per_tok=2)
    assert both.overlap[0, 0] == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("experts,k,on,sampled", [
    # E[Σ w²] from 10⁶ draws of torch.randn(experts).softmax(-1).topk(k)
    (8, 2, True, 0.5539), (32, 4, True, 0.2919), (64, 8, True, 0.1555), (128, 2, True, 0.5243), (8, 2, False, 0.1875),
])  # fmt: skip
def test_the_chosen_experts_weights_add_up_in_square_to_what_sampling_gives(experts, k, on, sampled):
    found = mixture(np.ones((2, 1)), num_experts=experts, num_experts_per_tok=k, norm_topk_prob=on)
    assert found.overlap[0, 0] == pytest.approx(sampled, rel=0.015)


def test_two_tokens_that_have_nothing_in_common_share_an_expert_by_chance():
    # Σ_e E[w_e]² = 1/N where the weights add up to one
    reads = np.concatenate([np.ones((1, 2)), np.zeros((2, 2))])
    found = mixture(reads, num_experts=16, num_experts_per_tok=2)
    assert found.overlap[1, 1] == pytest.approx(1 / 16, rel=0.05)


def test_one_expert_is_the_dense_feed_forward_and_its_router_learns_nothing():
    reads = np.concatenate([np.ones((1, 3)), np.full((3, 3), 0.4)])
    found = mixture(reads, num_experts=1, num_experts_per_tok=1)
    dense = FeedForward(found.body, RULE, {}, reads, 64)
    gradient = normalized(reads)[0]
    np.testing.assert_allclose(found.writes, dense.writes)
    np.testing.assert_allclose(found.backward(gradient), dense.backward(gradient))


def test_what_moves_the_logits_is_the_softmaxs_jacobian():
    # all experts chosen: Σ_e,j E[(p_e (δ_ej − p_j))²]
    _, moved = _overlaps(4, 4, True)
    p = np.exp(np.random.default_rng(5).standard_normal((200_000, 4)))
    p /= p.sum(1, keepdims=True)
    jacobian = p[:, :, None] * (np.eye(4) - p[:, None, :])
    # unit variance is the grid's fifth, correlation one its last
    assert moved[4, -1] == pytest.approx((jacobian**2).sum((1, 2)).mean(), rel=0.02)
