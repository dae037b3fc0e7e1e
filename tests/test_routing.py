"""The routers' losses and measures, against their definitions written as loops, and at the ends of their ranges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spannorm.routing import RoutingMeter, RoutingRecord, auxiliary_losses, load_balancing_loss, router_z_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def by_loop(logits: Tensor, k: int, counted: Tensor) -> tuple[float, float]:
    """Load-balancing loss and z-loss of one sequence (tokens, E)."""
    experts, tokens = logits.shape[1], [t for t in range(len(logits)) if counted[t]]
    f, p, z = [0.0] * experts, [0.0] * experts, 0.0
    for t in tokens:
        weights = [math.exp(x) for x in logits[t].tolist()]
        for e in sorted(range(experts), key=lambda e: -weights[e])[:k]:
            f[e] += 1 / (k * len(tokens))
        for e in range(experts):
            p[e] += weights[e] / sum(weights) / len(tokens)
        z += math.log(sum(weights)) ** 2 / len(tokens)
    return experts * sum(a * b for a, b in zip(f, p, strict=True)), z


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_losses_are_their_definitions_padding_left_out(k):
    logits = random_logits(3, 8, 6)
    counted = torch.ones(3, 8)
    counted[1, :5] = 0
    wanted = [by_loop(logits[s], k, counted[s]) for s in range(3)]
    mask = counted.double()
    assert load_balancing_loss(logits, k, mask).tolist() == pytest.approx([b for b, _ in wanted], rel=1e-12)
    assert router_z_loss(logits, mask).tolist() == pytest.approx([z for _, z in wanted], rel=1e-12)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    layers = [logits.flatten(0, 1), logits.flatten(0, 1).flip(1)]
    balance, z = auxiliary_losses(layers, k, counted, weights, "sequence")
    share = weights.tolist()
    assert balance.item() == pytest.approx(2 * sum(w * b for w, (b, _) in zip(share, wanted, strict=True)), rel=1e-12)
    assert z.item() == pytest.approx(2 * sum(w * v for w, (_, v) in zip(share, wanted, strict=True)), rel=1e-12)
    whole = by_loop(logits.flatten(0, 1), k, counted.flatten())
    pooled = auxiliary_losses(layers[:1], k, counted, weights, "batch")
    assert [x.item() for x in pooled] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (32, 4)])
def test_an_even_load_costs_1_and_a_collapsed_one_experts_by_k(experts, k):
    mask = torch.ones(1, experts, dtype=torch.float64)
    even = 60.0 * sum(torch.eye(experts, dtype=torch.float64).roll(j, 1) for j in range(k))[None]
    assert load_balancing_loss(even, k, mask).item() == pytest.approx(1.0)
    collapsed = torch.zeros(1, experts, experts, dtype=torch.float64)
    collapsed[..., :k] = 60.0
    assert load_balancing_loss(collapsed, k, mask).item() == pytest.approx(experts / k)


def test_the_z_loss_of_logits_that_do_not_care_is_the_square_of_ln_e():
    assert router_z_loss(torch.zeros(1, 4, 8), torch.ones(1, 4)).item() == pytest.approx(math.log(8) ** 2)


def test_health_by_definition():
    logits = torch.tensor([[9.0, 5, 1, 0], [9, 1, 5, 0], [9, 5, 1, 0], [5, 9, 1, 0]], dtype=torch.float64)
    flat = torch.zeros(4, 4, dtype=torch.float64)
    flat += 1e-9 * torch.eye(4)  # each token's own expert, and else no preference
    meter = RoutingMeter(top_k=1)
    meter.add([logits, flat])
    record = meter.take()
    assert record.load == [[0.75, 0.25, 0, 0], [0.25, 0.25, 0.25, 0.25]]
    assert record.dead_experts == [2, 0]
    assert record.max_violation == pytest.approx([2.0, 0.0])
    p = logits.softmax(-1)
    assert record.entropy == pytest.approx([-(p * p.log()).sum(-1).mean().item(), math.log(4)])
    assert record.logit_rms == pytest.approx([math.sqrt(107 / 4), 0.0], abs=1e-8)
    assert record.summary() == pytest.approx(
        {
            "router_entropy": sum(record.entropy) / 2,
            "router_logit_rms": math.sqrt(107 / 8),
            "max_violation": 2.0,
            "dead_experts": 2,
        }
    )
    assert RoutingRecord(**record.to_dict()) == record


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_a_meter_over_parts_reads_as_over_the_whole(parts):
    layers = [random_logits(16, 6) for _ in range(3)]
    whole, split = RoutingMeter(2), RoutingMeter(2)
    whole.add(layers)
    for piece in zip(*(layer.chunk(parts) for layer in layers), strict=True):
        split.add(piece)
    a, b = whole.take(), split.take()
    assert a.load == b.load and a.dead_experts == b.dead_experts
    for key in ("entropy", "logit_rms", "max_violation"):
        assert getattr(a, key) == pytest.approx(getattr(b, key), rel=1e-12)
