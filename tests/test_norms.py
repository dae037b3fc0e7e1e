"""RMSNorm and LayerNorm against their formulas, written here in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spannorm.errors import InputError
from spannorm.norms import LayerNorm, RMSNorm, build_norm, scaled_add

EPS = 1e-3  # large enough that a wrong place for it shows
WIDTH = 12
SHAPES = [(2, 3, WIDTH), (2, 3, 2, WIDTH)]
"""One residual stream, and two of them in one tensor."""


def formula(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = EPS) -> Tensor:
    if name == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def random_norm(name: str, dtype: torch.dtype = torch.float64, width: int = WIDTH, eps: float = EPS):
    """A norm with gains (and biases) that are not what they start as."""
    norm = build_norm(name, width, eps).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return norm


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


names = pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])


@names
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_norm_is_its_formula(name, shape, scale):
    norm, x = random_norm(name), scale * torch.randn(shape, dtype=torch.float64) + 0.3
    close(norm(x), formula(name, x, norm.weight, getattr(norm, "bias", None)))


@names
def test_a_fresh_norm_has_unit_gain_no_bias_and_the_defaults_of_the_field(name):
    norm = build_norm(name, WIDTH)
    assert norm.eps == 1e-6
    assert torch.equal(norm.weight, torch.ones(WIDTH))
    assert {n for n, _ in norm.named_parameters()} == ({"weight"} if name == "rmsnorm" else {"weight", "bias"})
    if name == "layernorm":
        assert torch.equal(norm.bias, torch.zeros(WIDTH))


# A branch or skip factor: a constant of the depth, a learned scalar, or a learned gain per channel.
FACTORS = {
    "constant": lambda: 0.37,
    "scalar": lambda: torch.tensor(-0.6, dtype=torch.float64, requires_grad=True),
    "vector": lambda: torch.randn(WIDTH, dtype=torch.float64, requires_grad=True),
}


@names
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("branch", FACTORS)
@pytest.mark.parametrize("skip", ["one", *FACTORS])
def test_add_and_norm_is_the_norm_of_the_scaled_sum(name, shape, branch, skip):
    norm = random_norm(name)
    x, f = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    b, s = FACTORS[branch](), 1.0 if skip == "one" else FACTORS[skip]()
    total = s * x + b * f
    expected = formula(name, total, norm.weight, getattr(norm, "bias", None))
    leaves = [t for t in (x, f, b, s, *norm.parameters()) if isinstance(t, Tensor)]
    upstream = torch.randn(shape, dtype=torch.float64)
    normed, summed = norm(x, f, skip=s, branch=b, return_sum=True)

    close(normed, expected)
    close(summed, total)
    close(norm(x, f, skip=s, branch=b), expected)
    # The sum is handed on as the stream: its gradient has to come through as well.
    ours = torch.autograd.grad((normed * upstream).sum() + summed.sin().sum(), leaves)
    theirs = torch.autograd.grad((expected * upstream).sum() + total.sin().sum(), leaves)
    for actual, wanted in zip(ours, theirs, strict=True):
        close(actual, wanted)


@names
def test_return_sum_without_a_branch_hands_back_the_input(name):
    norm, x = random_norm(name), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    normed, total = norm(x, return_sum=True)
    assert torch.equal(total, x)
    assert torch.equal(normed, norm(x))


@names
def test_the_inputs_are_not_written_to(name):
    norm = random_norm(name)
    x, f = (torch.randn(2, 3, WIDTH, dtype=torch.float64) for _ in range(2))
    before = x.clone(), f.clone()
    norm(x, f, skip=0.5, branch=0.25)
    assert torch.equal(x, before[0]) and torch.equal(f, before[1])


@names
@pytest.mark.parametrize("branch", FACTORS)
def test_gradients_of_add_and_norm_pass_gradcheck(name, branch):
    norm, b = random_norm(name), FACTORS[branch]()
    x, f = (torch.randn(1, 2, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    learned = [t for t in (b, *norm.parameters()) if isinstance(t, Tensor)]

    def call(x: Tensor, f: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x, f, skip=0.8, branch=b, return_sum=True)

    assert torch.autograd.gradcheck(call, (x, f, *learned))


@pytest.mark.parametrize("branch", [0.37, torch.tensor(-0.6), torch.linspace(-1, 1, WIDTH)], ids=list(FACTORS))
def test_half_precision_stays_half_precision(branch):
    x, f = (torch.randn(2, 3, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    total = scaled_add(x, f, branch=branch)
    assert total.dtype == torch.bfloat16
    wide = x.double() + (branch.double() if isinstance(branch, Tensor) else branch) * f.double()
    # One rounding of the gain, one of the product, one of the sum: each at most 2⁻⁸ of what it rounds.
    close(total.double(), wide, 3 * 2**-8)


@names
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_fp32(name, parameters):
    # 8192 squares summed in bf16 would stall at a few hundred: the error would be of order one. Summed in fp32, what
    # is left are the roundings of the gain, the bias, their product and the result, each at most 2⁻⁸ of what it rounds.
    norm = random_norm(name, parameters, 8192, 1e-6)
    x = (3 + torch.randn(1, 2, 8192)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    weight, bias = norm.weight.double(), norm.bias.double() if name == "layernorm" else torch.zeros(())
    scaled = formula(name, x.double(), weight, torch.zeros(()), 1e-6)
    assert ((y.double() - scaled - bias).abs() <= 3 * 2**-8 * (scaled.abs() + bias.abs())).all()


@names
def test_float64_is_not_rounded_through_fp32(name):
    norm, x = random_norm(name), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    y = norm(x)
    assert y.dtype == torch.float64
    assert (y - formula(name, x, norm.weight, getattr(norm, "bias", None))).abs().max() < 1e-13


@names
@given(scale=st.floats(1e-2, 1e6), seed=st.integers(0, 999))
def test_the_size_of_the_input_does_not_matter(name, scale, seed):
    x = torch.randn(1, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    norm = build_norm(name, WIDTH, 1e-20).double()
    close(norm(scale * x), norm(x), 1e-9)


@names
def test_a_row_of_zeros_gives_zeros_and_finite_gradients(name):
    norm = build_norm(name, WIDTH).double()
    x = torch.zeros(1, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad is not None and x.grad.isfinite().all()


def test_rmsnorm_keeps_the_mean_that_layernorm_takes_out():
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64) + 5
    rms, layer = RMSNorm(WIDTH).double(), LayerNorm(WIDTH).double()
    assert layer(x).mean(-1).abs().max() < 1e-12
    assert rms(x).mean(-1).min() > 0.5
    close(layer(x), layer(x - 7), 1e-9)


@names
def test_shapes_are_checked_under_pytest(name):
    norm = build_norm(name, WIDTH)
    with pytest.raises(Exception, match=r"batch seq \*streams hidden"):
        norm(torch.randn(3, WIDTH))  # no batch
    with pytest.raises(Exception, match=r"batch seq \*streams hidden"):
        norm(torch.randn(2, 3, WIDTH), torch.randn(2, 1, WIDTH))  # would broadcast without a word


def test_an_unknown_norm_is_refused_and_the_nearest_is_named():
    with pytest.raises(InputError, match="unknown norm 'rms_norm': did you mean 'rmsnorm'"):
        build_norm("rms_norm", WIDTH)
