"""Skip path, branch shares, skipped blocks and update sizes, against the equations."""

from __future__ import annotations

import math

import pytest
import torch
from arms import TWO_STREAMS
from equation_stack import DEPTH, RULES, Block, EquationStack, rms, summed
from torch import Tensor, nn
from zoo_equations import EPS, WIDTH

from spannorm.placements import PLACEMENTS
from spannorm.probes import block_skip_costs, branch_shares, measure, skip_gradient, update_sizes

close = {"rel": 1e-10, "abs": 1e-12}


@pytest.fixture(params=[(name, rule) for name in PLACEMENTS for rule in RULES], ids="-".join)
def stack(request: pytest.FixtureRequest) -> EquationStack:
    return EquationStack(*request.param)


@pytest.mark.parametrize("detached", [("attn", "ffn"), ("attn",), ("ffn",)], ids=" ".join)
def test_the_skip_path_is_the_equation_with_its_branches_detached(stack: EquationStack, detached: tuple) -> None:
    points = stack.points(**{branch: Tensor.detach for branch in detached})
    expected = [rms(summed(g)) for g in stack.gradients(points)]
    assert skip_gradient(stack.blocks, stack.loss, detached=detached) == pytest.approx(expected, **close)


@pytest.mark.parametrize("name", ["post", "span"])
def test_the_skip_path_divides_by_the_norms_input_and_projects(name: str) -> None:
    """RMSNorm backward, written out: g ← (w·g − n (n·(w·g))/d) / s for n = z/s, s = √(mean z² + ε); no autograd."""
    stack = EquationStack(name)
    points = stack.points()
    y = points[-1].detach().requires_grad_()
    (g,) = torch.autograd.grad(stack.loss_at(y), y)
    expected = [rms(g)]
    for b in reversed(range(DEPTH)):
        stack.equation(b, points[b])
        case = stack.cases[b]
        # SpanNorm's skip spans the block and meets one norm, PostNorm's meets both
        for site in ("ffn_norm",) if name == "span" else ("ffn_norm", "attn_norm"):
            z = case.reads[site].detach()
            s = (z.square().mean(-1, keepdim=True) + EPS).sqrt()
            g = g * case.leaves[f"{site}.weight"].detach()
            g = (g - z / s * (z / s * g).mean(-1, keepdim=True)) / s
        expected.append(rms(g))
    assert skip_gradient(stack.blocks, stack.loss) == pytest.approx(expected[::-1], rel=1e-9)


def test_prenorms_skip_path_carries_the_gradient_unchanged() -> None:
    found = skip_gradient((stack := EquationStack("pre")).blocks, stack.loss)
    assert found == pytest.approx([found[-1]] * (DEPTH + 1), **close)


def test_shares_are_what_cutting_the_branch_takes_away(stack: EquationStack) -> None:
    shares = branch_shares(stack.blocks, stack.loss)
    points = stack.points()
    gradients = stack.gradients(points)
    for b, point in enumerate(points[:-1]):
        x = point.detach().requires_grad_()

        def arriving(b: int = b, x: Tensor = x, **cut: object) -> Tensor:
            return summed(torch.autograd.grad(stack.equation(b, x, **cut), x, gradients[b + 1])[0])

        true = arriving()
        for branch, found in (("attn", shares.attention_share), ("ffn", shares.ffn_share)):
            passed = true - arriving(**{branch: Tensor.detach})
            assert found[b] == pytest.approx((passed.norm() / true.norm()).item() ** 2, rel=1e-9), branch


def test_a_skipped_block_hands_on_what_it_was_given(stack: EquationStack) -> None:
    whole = stack.loss().item()
    expected = []
    for skipped in range(DEPTH):
        x = stack.x
        for b in range(DEPTH):
            if b != skipped:
                x = stack.equation(b, x)
            elif stack.name in TWO_STREAMS and b == 0:
                x = torch.stack((x, x), dim=2)  # the streams open
            elif stack.name in TWO_STREAMS and b == DEPTH - 1:
                x = x[..., 0, :] + stack.cases[b].N(x[..., 1, :], "readout_norm")  # and close
        expected.append(stack.loss_at(x).item() - whole)
    assert block_skip_costs(stack.blocks, stack.loss) == pytest.approx(expected, **close)
    assert block_skip_costs(stack.blocks, stack.loss, blocks=[2, 0]) == pytest.approx([expected[2], expected[0]])
    assert stack.loss().item() == whole, "every block is back"


def test_update_sizes_are_the_steps_over_the_weights() -> None:
    stack = EquationStack("span")
    stack.loss().backward()
    parameters = dict(stack.blocks.named_parameters())
    expected = {name: 0.1 * rms(p.grad) / rms(p) for name, p in parameters.items()}
    with update_sizes(stack.blocks) as sizes:
        torch.optim.SGD(stack.blocks.parameters(), lr=0.1).step()
    assert sizes.by_parameter == pytest.approx(expected, rel=1e-9)
    assert sizes.by_block["placement.ffn_norm.weight"] == [
        sizes.by_parameter[f"{b}.placement.ffn_norm.weight"] for b in range(DEPTH)
    ]
    first, *rest = sizes.by_block["placement.initial_norm.weight"]
    assert first > 0 and all(map(math.isnan, rest))


def test_a_frozen_stack_has_gradients_all_the_same() -> None:
    stack = EquationStack("post")
    expected = [rms(g) for g in stack.gradients(stack.points())]
    stack.blocks.requires_grad_(False)
    stack.x = stack.x.detach()
    assert measure(stack.blocks, stack.loss).gradient_rms == pytest.approx(expected, **close)
    assert branch_shares(stack.blocks, stack.loss).ffn_share[0] > 0


def test_a_branch_that_ignores_its_input_has_no_share() -> None:
    stack = EquationStack("pre")
    constant = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    silent = nn.Sequential(*(Block(b.placement, lambda x: constant.expand_as(x), b.sublayers[1]) for b in stack.blocks))
    shares = branch_shares(silent, lambda: stack.loss_at(silent(stack.x)))
    assert shares.attention_share == [0.0] * DEPTH and min(shares.ffn_share) > 0
