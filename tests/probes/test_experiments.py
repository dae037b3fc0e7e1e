"""Skip path, branch shares, skipped blocks and update sizes, against the equations."""

from __future__ import annotations

import math

import pytest
import torch
from equation_stack import BATCH, DEPTH, LENGTH, RULES, Block, EquationStack, rms, summed
from facts import EPS, FACTS, WIDTH
from torch import Tensor, nn

from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS
from spannorm.probes import block_skip_costs, gradient_paths, measure, update_sizes
from spannorm.probes.paths import PATHS

close = {"rel": 1e-10, "abs": 1e-12}


@pytest.fixture(params=[(name, rule) for name in PLACEMENTS for rule in RULES], ids="-".join)
def stack(request: pytest.FixtureRequest) -> EquationStack:
    return EquationStack(*request.param)


def logs(gradients: list[float]) -> list[float]:
    """ln of the gain from the last of L+1 points to each of the others."""
    return [math.log(g / gradients[-1]) for g in gradients[:-1]]


def test_each_path_is_the_equation_with_its_branches_detached(stack: EquationStack) -> None:
    found = gradient_paths(stack.blocks, stack.loss)
    assert list(found.log_gain) == list(PATHS)
    for path, detached in PATHS.items():
        points = stack.points(**{branch: Tensor.detach for branch in detached})
        expected = logs([rms(summed(g)) for g in stack.gradients(points)])
        assert found.log_gain[path] == pytest.approx(expected, **close), path
    whole, without = found.log_gain["total"][0], found.log_gain["without_ffn"][0]
    assert found.share("without_ffn") == pytest.approx(1 - math.exp(2 * without) / math.exp(2 * whole))


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
    assert gradient_paths(stack.blocks, stack.loss).log_gain["skip"] == pytest.approx(logs(expected[::-1]), rel=1e-9)


def test_prenorms_skip_path_carries_the_gradient_unchanged() -> None:
    found = gradient_paths((stack := EquationStack("pre")).blocks, stack.loss)
    assert found.log_gain["skip"] == pytest.approx([0.0] * DEPTH, **close)


def test_a_gradient_that_fp32_cannot_hold_is_followed_all_the_same() -> None:
    """Unscaled PostNorm's skip path: after 400 blocks e^-300 is left, and fp32 ends at e^-103."""
    stack = EquationStack("post", "none", depth=400)
    whole = gradient_paths(stack.blocks, stack.loss).log_gain["skip"]
    stack.blocks.float()
    stack.x, stack.target = stack.x.detach().float(), stack.target.float()
    for case in stack.cases:
        case.leaves = {name: leaf.float() for name, leaf in case.leaves.items()}
    assert whole[0] < -110
    # so deep, fp32 and fp64 see other tokens; the norms' statistics are alike
    assert gradient_paths(stack.blocks, stack.loss).log_gain["skip"][0] == pytest.approx(whole[0], rel=0.05)


def test_a_block_that_does_not_repeat_is_refused() -> None:
    stack = EquationStack("span")
    noisy = nn.Sequential(*(Block(b.placement, nn.Dropout(0.5), b.sublayers[1]) for b in stack.blocks))
    with pytest.raises(InputError, match="use_cache=False"):
        gradient_paths(noisy, lambda: stack.loss_at(noisy(stack.x)))


def test_shares_are_what_cutting_the_branch_takes_away(stack: EquationStack) -> None:
    shares = gradient_paths(stack.blocks, stack.loss)
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
    whole, fact = stack.loss().item(), FACTS[stack.name]
    expected = []
    for skipped in range(DEPTH):
        x = stack.x
        for b in range(DEPTH):
            if b != skipped:
                x = stack.equation(b, x)
            elif fact.several and b == 0:  # the streams open
                n = fact.opens or fact.state(1)[0]
                x = x.unsqueeze(2).expand(BATCH, LENGTH, n, WIDTH)
            elif fact.several and b == DEPTH - 1:  # and close
                x = fact.readout(stack.cases[b], x)
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
    assert gradient_paths(stack.blocks, stack.loss).ffn_share[0] > 0


def test_a_branch_that_ignores_its_input_has_no_share() -> None:
    stack = EquationStack("pre")
    constant = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True)
    silent = nn.Sequential(*(Block(b.placement, lambda x: constant.expand_as(x), b.sublayers[1]) for b in stack.blocks))
    shares = gradient_paths(silent, lambda: stack.loss_at(silent(stack.x)))
    assert shares.attention_share == [0.0] * DEPTH and min(shares.ffn_share) > 0
