"""What the placements of several streams are in their simplest cases, and what they refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from equations import F64, WIDTH, Case, attnres_block, own_parameters
from torch import Tensor, nn

from spannorm import Stack, theory
from spannorm.errors import InputError

DEPTH = 5
SUBLAYERS = [nn.Linear(WIDTH, WIDTH, dtype=F64) for _ in range(2 * DEPTH)]


def through(name: str, x: Tensor, rule: str = "1/sqrt(2L):forward", **options: object) -> Tensor:
    """A fresh stack, with the same sublayers for every placement."""
    for b, block in enumerate(Stack(name, DEPTH, rule, options).blocks(WIDTH)):
        x = block.double()(x, *(lambda n, f=f: torch.tanh(f(n)).cumsum(1) for f in SUBLAYERS[2 * b : 2 * b + 2]))
    return x


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, WIDTH, dtype=F64)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_hyper_connections_start_as_prenorm_to_the_last_bit(x, streams, dynamic):
    # the readout adds equal streams; a power of two rounds nothing
    assert torch.equal(through("hc", x, streams=streams, dynamic=dynamic), streams * through("pre", x))


def test_mhc_with_one_stream_and_zero_weights_is_prenorm(x):
    blocks = Stack("mhc", DEPTH, "none", {"streams": 1}).blocks(WIDTH)
    y, pre = x, through("pre", x, "none")
    for b, block in enumerate(blocks):
        for name in ("attn_weights", "ffn_weights", "readout_weights"):
            if hasattr(block, name):
                nn.init.zeros_(getattr(block, name))
        y = block.double()(y, *(lambda n, f=f: torch.tanh(f(n)).cumsum(1) for f in SUBLAYERS[2 * b : 2 * b + 2]))
    # pre = ½, which the norm undoes but for its eps; post = 1; a doubly stochastic 1 × 1 matrix is 1 but for ε = 1e-6
    torch.testing.assert_close(2 * y, pre, rtol=1e-4, atol=1e-4)


def test_mhc_near_prenorm_starts_near_prenorm(x):
    # the readout weighs each of four nearly equal streams with ½
    torch.testing.assert_close(through("mhc", x, init="prenorm") / 2, through("pre", x), rtol=5e-3, atol=5e-3)
    assert (through("mhc", x) / 2 - through("pre", x)).abs().max() > 0.1, "DeepSeek's start is another function"


def test_mhcs_mixing_matrix_is_doubly_stochastic_for_any_streams():
    block = Stack("mhc", DEPTH).block(1, WIDTH).double()
    nn.init.normal_(block.attn_base)
    mixing = block._weights(torch.randn(2, 3, 4, WIDTH, dtype=F64), "attn")[0][..., 1:]
    for dim in (-1, -2):
        torch.testing.assert_close(mixing.sum(dim), torch.ones(2, 3, 4, dtype=F64), rtol=1e-3, atol=1e-3)


def test_mhcs_weights_are_exact_under_autocast():
    block, state = Stack("mhc", DEPTH).block(1, WIDTH), torch.randn(2, 3, 4, WIDTH)
    nn.init.normal_(block.attn_weights)
    exact = [t.float() for t in copy.deepcopy(block).double()._weights(state.double(), "attn")]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(list(block._weights(state, "attn")), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attnres", "attnres_block"])
def test_a_zero_query_reads_the_mean_of_its_sources(name):
    block, state = Stack(name, DEPTH).block(2, WIDTH).double(), torch.randn(2, 3, 4, WIDTH, dtype=F64)
    torch.testing.assert_close(block.read(state), state.mean(-2), rtol=1e-12, atol=1e-12)
    inkling = Stack(name, DEPTH, options={"form": "inkling"}).block(2, WIDTH).double()
    unit = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(inkling.read(state), unit.mean(-2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("groups", "form"), [(1, "paper"), (2, "paper"), (3, "inkling"), (9, "inkling")])
def test_groups_of_several_blocks_are_those_of_the_equation(groups, form):
    y = z = torch.randn(2, 3, WIDTH, dtype=F64)
    sizes = []
    for b, block in enumerate(
        Stack("attnres_block", DEPTH, None, {"groups": groups, "form": form}, eps=1e-3).blocks(WIDTH)
    ):
        case = Case("rmsnorm", b, DEPTH, (1.0, 1.0))
        z = attnres_block(case, z, groups, form)
        for name, parameter in own_parameters(block.double()).items():
            parameter.data.copy_(case.leaves[name])
        y = block(y, case.A, case.F)
        torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-10)
        sizes.append(y.shape[2] if b < DEPTH - 1 else groups)
    assert sizes[-2] == 1 + math.ceil((DEPTH - 1) / math.ceil(DEPTH / groups))


@pytest.mark.parametrize("depth", [1, 8, 64])
def test_an_averaged_stream_keeps_its_variance_at_1(depth):
    variances = theory.predict("averaged", depth, body=theory.Body(eps=0.0)).variance
    for site in ("attn_norm", "ffn_norm", "output"):
        assert variances[site] == pytest.approx([1.0] * depth, rel=1e-9), site


def test_a_stream_whose_gates_are_closed_forgets_and_its_gradient_does_not():
    block = Stack("gpas", 2).block(1, WIDTH).double()
    for gate in (block.attn_gate, block.ffn_gate):
        nn.init.constant_(gate, 1.0)
    x = torch.randn(2, 3, WIDTH, dtype=F64, requires_grad=True)
    y = block(x, torch.zeros_like, torch.zeros_like)
    torch.testing.assert_close(y, x * (1 - 1 / (1 + math.exp(-1))) ** 2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


def test_the_input_is_mixed_in_less_with_depth():
    blocks = Stack("mixed_input", 3).blocks(WIDTH)
    assert [b.stream_lambda.item() for b in blocks] == pytest.approx([1.15, 1.10, 1.05])
    assert [b.input_lambda.item() for b in blocks] == pytest.approx([0.20, 0.125, 0.05])
    x = torch.randn(2, 4, WIDTH, dtype=F64)
    assert torch.equal(through("mixed_input", x, start="plain"), through("pre", x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("parallel", {"norms": 3}, "`norms` must be 1 .* or 2; got 3"),
        ("mixed_input", {"start": "nanochats"}, "unknown start 'nanochats': did you mean 'nanochat'"),
        ("hc", {"streams": 0}, "`streams` must be a whole number of at least 1; got 0"),
        ("mhc", {"init": "pre"}, "unknown init 'pre'"),
        ("gated", {"rank": 0}, "`rank` must be at least 1; got 0"),
        ("attnres", {"form": "inklin"}, "unknown form 'inklin': did you mean 'inkling'"),
        ("attnres_block", {"groups": 0}, "`groups` must be at least 1; got 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        Stack(name, 4, options=options)
