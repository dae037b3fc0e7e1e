"""What a probe records, against plain PyTorch on the equations, in float64, for every placement."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from equation_stack import BATCH, DEPTH, LENGTH, RULES, Block, EquationStack, rms, summed
from facts import FACTS, WIDTH
from torch import Tensor, nn

from spannorm import Placement
from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS, build_placement
from spannorm.probes import Probe, measure

close = {"rel": 1e-10, "abs": 1e-12}


def zero(f: Tensor) -> Tensor:
    return 0 * f


def site_value(stack: EquationStack, b: int, x: Tensor, site: str, **change: Callable[[Tensor], Tensor]) -> Tensor:
    """What stands at a site of block b: a norm's input, the block's output, or the second stream at its end."""
    out = stack.equation(b, x, **change)
    if site == "second":
        return out[..., 1, :] if out.ndim == 4 else stack.cases[b].reads["readout_norm"]
    return out if site == "out" else stack.cases[b].reads[site]


def skip_and_branch(stack: EquationStack, b: int, x: Tensor, which: str) -> tuple[Tensor, Tensor]:
    """The two parts of a sum: the skip is what is left when the branch returns 0. Attention's sum is there before the
    FFN runs, so the FFN is silenced to read it."""
    site = FACTS[stack.name].sums(b)[which]
    if site == "sum":
        stack.equation(b, x)
        return stack.cases[b].sums[which]
    branch = which.removesuffix("_2")
    later = {"ffn": zero} if branch == "attn" else {}
    total = site_value(stack, b, x, site, **later)
    skip = site_value(stack, b, x, site, **later, **{branch: zero})
    return skip, total - skip


@pytest.fixture(params=[(name, rule) for name in PLACEMENTS for rule in RULES], ids="-".join)
def stack(request: pytest.FixtureRequest) -> EquationStack:
    return EquationStack(*request.param)


def test_signal_gradient_and_loss_are_those_of_the_equations(stack: EquationStack) -> None:
    record = measure(stack.blocks, stack.loss, tokens=7)
    points = stack.points()
    gradients = stack.gradients(points)
    assert record.loss == pytest.approx(stack.loss_at(points[-1]).item(), **close)
    assert record.signal_rms == pytest.approx([rms(stack.reaching(p)) for p in points], **close)
    assert record.gradient_rms == pytest.approx([7 * rms(summed(g)) for g in gradients], **close)
    fact = FACTS[stack.name]
    streams = points[-2].shape[2] if fact.several else 0
    assert len(record.signal_rms_by_stream) == len(record.gradient_rms_by_stream) == streams
    assert record.unmatched == {branch: list(range(DEPTH)) for branch in fact.unmatched}
    for i in range(streams):
        there = [point for point in range(1, DEPTH) if i < points[point].shape[2]]
        both = (record.signal_rms_by_stream, points, 1), (record.gradient_rms_by_stream, gradients, 7)
        for found, tensors, times in both:
            wanted = [times * rms(tensors[point][..., i, :]) for point in there]
            assert [found[i][point] for point in there] == pytest.approx(wanted)
        assert all(math.isnan(record.signal_rms_by_stream[i][p]) for p in range(1, DEPTH) if p not in there)
        assert math.isnan(record.signal_rms_by_stream[i][0] + record.gradient_rms_by_stream[i][-1])
    assert all(p.grad is None for p in stack.blocks.parameters()), "parameters get no gradient"


def test_sites_branches_and_sums_are_those_of_the_equations(stack: EquationStack) -> None:
    record = measure(stack.blocks, stack.loss)
    points = stack.points()
    norms: set[str] = set()
    for b, x in enumerate(points[:-1]):
        stack.equation(b, x)
        case = stack.cases[b]
        norms |= set(case.reads)
        for name, read in case.reads.items():
            assert record.variance[name][b] == pytest.approx(read.square().mean().item(), **close), name
        for branch, returned in case.returns.items():
            assert record.branch_rms[branch][b] == pytest.approx(rms(returned), **close), branch
        for which in FACTS[stack.name].sums(b):
            skip, branch = skip_and_branch(stack, b, x, which)
            rho = (skip * branch).sum() / (skip.norm() * branch.norm())
            assert record.added_rms[which][b] == pytest.approx(rms(branch), **close), which
            assert record.rho[which][b] == pytest.approx(rho.item(), rel=1e-8, abs=1e-9), which
        if stack.name == "mix" and b == 0:  # a PostNorm block
            assert math.isnan(record.variance["ffn_add"][b])
            continue
        for name in FACTS[stack.name].adds:
            which = name.removesuffix("_add")
            which += "_2" if f"{which}_2" in FACTS[stack.name].sums(b) else ""
            total = sum(skip_and_branch(stack, b, x, which)).square().mean().item()
            assert record.variance[name][b] == pytest.approx(total, **close), name
    assert set(record.variance) == norms | set(FACTS[stack.name].adds)
    assert set(record.rho) == set(record.added_rms) == set(FACTS[stack.name].sums(1))


def test_cosines_ranks_and_spectra_are_their_definitions(stack: EquationStack) -> None:
    record = measure(stack.blocks, stack.loss, spectrum=True)
    points = [stack.reaching(p).detach() for p in stack.points()]
    cosine = torch.nn.functional.cosine_similarity
    for point, x in enumerate(points):
        pairs = [
            cosine(x[s, i], x[s, j], dim=0)
            for s in range(BATCH)
            for i in range(LENGTH)
            for j in range(LENGTH)
            if i != j
        ]
        assert record.token_cosine[point] == pytest.approx(torch.stack(pairs).mean().item(), **close)
        sigma = torch.linalg.svdvals(x.flatten(0, 1))
        share = sigma / sigma.sum()
        # the square root of the eigensolver's 1e-16
        assert record.effective_rank[point] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-5)
        padded = [*(sigma / math.sqrt(BATCH * LENGTH)).tolist(), *[0.0] * (WIDTH - len(sigma))]
        assert record.spectrum[point] == pytest.approx(padded, rel=1e-6, abs=1e-6)
        for other, y in enumerate(points):
            assert record.similarity[point][other] == pytest.approx(cosine(x, y, dim=-1).mean().item(), abs=6e-5)
    layers = [cosine(x, y, dim=-1).mean().item() for x, y in itertools.pairwise(points)]
    assert record.layer_cosine == pytest.approx(layers, **close)


def test_layernorm_reads_the_same_sums() -> None:
    stack = EquationStack("span", norm="layernorm")
    record = measure(stack.blocks, stack.loss)
    x = stack.points()[2]
    stack.equation(2, x)
    assert record.variance["ffn_norm"][2] == pytest.approx(stack.cases[2].reads["ffn_norm"].square().mean().item())


def test_rank_is_exact_for_known_matrices_whichever_side_is_longer() -> None:
    """Equal singular values: the rank is their number. One direction only: 1."""
    for tokens, width in ((12, 4), (4, 12)):
        blocks = nn.Sequential(identity_block(width))
        orthogonal = torch.linalg.qr(torch.randn(max(tokens, width), min(tokens, width)))[0]
        even = orthogonal if tokens > width else orthogonal.T
        one = torch.randn(tokens, 1) * torch.randn(1, width)
        for x, rank in ((even, 4.0), (one, 1.0)):
            with Probe(blocks) as probe, torch.no_grad():
                blocks(x[None])
            assert probe.record().effective_rank == pytest.approx([rank, rank], rel=1e-3)


def identity_block(width: int) -> Block:
    placement = build_placement("pre", hidden_size=width, layer_idx=0, num_layers=1)
    return Block(placement, torch.zeros_like, torch.zeros_like)


def test_a_mean_over_passes_is_the_mean_over_their_tokens() -> None:
    stack = EquationStack("span")
    parts = stack.x.detach().split(1)
    with Probe(stack.blocks) as probe:
        stack.loss_at(stack.blocks(stack.x)).backward()
    whole = probe.record()
    with probe:
        for x, target in zip(parts, stack.target.split(1), strict=True):
            x = x.clone().requires_grad_()
            ((stack.blocks(x) * target).sum(-1).asinh().mean() / len(parts)).backward()
    again = probe.record()
    for key in ("signal_rms", "gradient_rms", "token_cosine", "layer_cosine"):
        assert getattr(again, key) == pytest.approx(getattr(whole, key), **close), key
    for key in ("variance", "branch_rms", "added_rms", "rho"):
        for name, values in getattr(whole, key).items():
            assert getattr(again, key)[name] == pytest.approx(values, nan_ok=True, **close), (key, name)


def test_without_a_backward_pass_gradients_are_null_in_json() -> None:
    stack = EquationStack("siamese")
    with Probe(stack.blocks.eval(), similarity=False, rank=False) as probe, torch.no_grad():
        stack.blocks(stack.x)
    read = json.loads(json.dumps(probe.record().to_dict(), allow_nan=False))
    assert read["gradient_rms"] == [None] * (DEPTH + 1) and read["gradient_rms_by_stream"] == [[None] * (DEPTH + 1)] * 2
    assert read["similarity"] is read["effective_rank"] is read["spectrum"] is None
    assert None not in read["signal_rms"]


def test_a_stream_that_is_not_finite_is_recorded_and_does_not_raise() -> None:
    stack = EquationStack("pre")
    with Probe(stack.blocks) as probe, torch.no_grad():
        stack.blocks(stack.x * math.inf)
    assert probe.record().to_dict()["effective_rank"] == [None] * (DEPTH + 1)


class Twice(Placement):
    """One norm and one branch used twice, and a sum of no branch."""

    final_norm = True

    def norms(self) -> tuple[str, ...]:
        return ("attn_norm",)

    def block(self, x: Tensor, attn: Callable, ffn: Callable) -> Tensor:
        f = attn(self.attn_norm(x))
        h = self.add(self.add(x, f), f, branch=2.0)
        return self.add(h, self.attn_norm(h), skip=3.0)


def test_sums_of_a_placement_of_ones_own_are_named_in_order() -> None:
    placement = Twice(hidden_size=WIDTH, layer_idx=0, num_layers=1)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with Probe(nn.Sequential(Block(placement, torch.tanh, torch.tanh))) as probe:
        placement(x, attn=torch.tanh, ffn=torch.tanh)
    record = probe.record()
    f = torch.tanh(placement.attn_norm(x))
    expected = {
        "attn_norm": x, "attn_add": x + f, "attn_add_2": x + 3 * f, "attn_norm_2": x + 3 * f,
        "add": 3 * (x + 3 * f) + placement.attn_norm(x + 3 * f),
    }  # fmt: skip
    assert list(record.variance) == list(expected)
    for name, value in expected.items():
        assert record.variance[name] == pytest.approx([value.square().mean().item()], rel=1e-5), name
    assert record.added_rms["attn_2"] == pytest.approx([2 * rms(f)], rel=1e-5)


def test_a_model_it_cannot_read_is_an_error_that_says_why() -> None:
    with pytest.raises(InputError, match="Linear has no block with a `placement`"):
        Probe(nn.Linear(2, 2))
    blocks = EquationStack("pre").blocks
    with pytest.raises(InputError, match=r"blocks 0 … 3; found blocks \[1, 2, 3\]"):
        Probe(blocks[1:])
    with Probe(blocks) as probe:
        pass
    with pytest.raises(InputError, match="nothing was measured"):
        probe.record()


def test_no_hook_stays_behind() -> None:
    stack = EquationStack("peri")
    with pytest.raises(RuntimeError, match="stop"), Probe(stack.blocks):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.blocks.modules())
