"""Both kernels, value and gradients, against the formula in float64. Triton's run on a GPU, else in its interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from spannorm import kernels
from spannorm.kernels import reference

fused = importlib.import_module("spannorm.kernels.triton")
KERNELS = {"reference": reference, "triton": fused}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-3  # large enough that a wrong place for it shows
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

TOLERANCE = {F64: (2e-15, 5e-15), F32: (5e-7, 1e-6), BF16: (2**-7, 2**-6), F16: (2**-10, 2**-9)}
"""By dtype: the largest error of an output, and of a gradient, over the tensor's largest value.

In half precision an output is rounded once by Triton's kernels and twice by the reference (the sum, then the result),
each time by u = 2^-8 (bf16) or 2^-11 (fp16) at most; Triton's interpreter cuts bf16 off instead, which is 2u. A
gradient has that, and the rounding of the y that it is computed from."""

every = pytest.mark.parametrize(
    ("kernel", "dtype"), [("reference", d) for d in TOLERANCE] + [("triton", d) for d in (F32, BF16, F16)]
)
norms = pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])


def formula(x: Tensor, f: Tensor | None, w: Tensor, b: Tensor | None, skip: float, branch: float) -> list[Tensor]:
    """(normed, sum)"""
    s = x if f is None else skip * x + branch * f
    centred = s if b is None else s - s.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    return [normed if b is None else normed + b, s]


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=F64).to(DEVICE, dtype)


def gains(width: int, dtype: torch.dtype) -> Tensor:
    """Of either sign, and away from zero."""
    return (torch.rand(width, dtype=F64) + 0.5).mul(torch.randn(width).sign()).to(DEVICE, dtype)


def both(
    kernel: str,
    x: Tensor,
    f: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    *,
    skip: float = 1.0,
    branch: float = 1.0,
    return_sum: bool = False,
) -> list[dict[str, Tensor]]:
    """Outputs and gradients by name: a kernel's, and the formula's in float64 on the same (rounded) values."""
    upstream = [random(x.shape, x.dtype) for _ in range(1 + return_sum)]
    found = []
    for exact in (False, True):
        given = {"x": x, "f": f, "w": w, "b": b}
        leaves = {n: t.to(F64 if exact else t.dtype).requires_grad_() for n, t in given.items() if t is not None}
        arguments = [leaves.get(name) for name in given]
        if exact:
            outputs = formula(*arguments, skip, branch)[: len(upstream)]
        else:
            outputs = KERNELS[kernel].add_norm(*arguments, EPS, skip, branch, return_sum)
            outputs = list(outputs) if return_sum else [outputs]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), [u.to(o) for u, o in zip(upstream, outputs, strict=True)]
        )
        named = dict(zip(("y", "sum"), outputs, strict=False))
        found.append(named | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        tolerance = TOLERANCE[dtype][name.startswith("d")]
        error = (value.to(F64) - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= tolerance, f"{name}: {error:.2e}"


@every
@norms
@pytest.mark.parametrize("return_sum", [False, True], ids=["one output", "two outputs"])
@pytest.mark.parametrize(("skip", "branch"), [(1.0, 1.0), (2.5, 0.3)])
def test_add_and_norm_and_its_gradients(kernel, dtype, norm, return_sum, skip, branch):
    x, f = random((3, 7, 24), dtype), random((3, 7, 24), dtype)
    b = random((24,), dtype) / 2 if norm == "layernorm" else None
    actual, expected = both(kernel, x, f, gains(24, dtype), b, skip=skip, branch=branch, return_sum=return_sum)
    assert all(value.dtype == dtype for value in actual.values())
    assert_close(actual, expected, dtype)


@every
@norms
@pytest.mark.parametrize("width", [5, 64, 1500])
def test_a_norm_alone_at_every_width(kernel, dtype, norm, width):
    b = random((width,), dtype) / 2 if norm == "layernorm" else None
    assert_close(*both(kernel, random((2, 9, width), dtype), None, gains(width, dtype), b), dtype)


@every
def test_more_rows_than_programs_take_at_once(kernel, dtype):
    x, f = random((1, 5000, 8), dtype), random((1, 5000, 8), dtype)
    actual, expected = both(kernel, x, f, gains(8, dtype), None)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("stream", "branch"), [(F32, BF16), (BF16, F32)])
def test_stream_and_branch_may_differ_in_dtype(kernel, stream, branch):
    x, f, w = random((2, 3, 16), stream), random((2, 3, 16), branch), gains(16, F32)
    actual, expected = both(kernel, x, f, w, None, return_sum=True)
    assert [actual[n].dtype for n in ("y", "sum", "dx", "df", "dw")] == [F32, F32, stream, branch, F32]
    for name, value in actual.items():
        assert_close({name: value}, {name: expected[name]}, value.dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_of_two_streams_is_read_where_it_lies(kernel):
    x, f = random((2, 3, 2, 16), F32).unbind(-2)
    assert not x.is_contiguous()
    assert_close(*both(kernel, x, f, gains(16, F32), None), F32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_rows_give_no_rows_and_no_gradient(kernel):
    x, w = torch.empty(0, 3, 8, device=DEVICE, requires_grad=True), gains(8, F32).requires_grad_()
    y = KERNELS[kernel].add_norm(x, x, w, None, EPS, 1.0, 1.0, False)
    y.sum().backward()
    assert y.shape == x.shape and torch.equal(w.grad, torch.zeros_like(w))


NEAR_ZERO = (0.0, -0.0, 1e-30, -1e-30, 1e-18, -1e-18, 1e-9, -1e-5, 1e-4, -1e-3)


@every
def test_at_a_gain_near_zero_rmsnorm_is_as_exact_as_elsewhere(kernel, dtype):
    # Every gradient at full tolerance, that of a gain of zero too. In float16 a gain is held 2^-13 away from zero:
    # its output moves by twice that at most per unit of z, and z comes back to within 2^-12.
    x, f, w = random((3, 7, 24), dtype), random((3, 7, 24), dtype), gains(24, dtype)
    w[: len(NEAR_ZERO)] = torch.tensor(NEAR_ZERO)
    actual, expected = both(kernel, x, f, w, None)
    assert_close(actual, expected, dtype)
    z = formula(x.to(F64), f.to(F64), torch.ones_like(w, dtype=F64), None, 1.0, 1.0)[0]
    held = (actual["y"].to(F64) - expected["y"]).abs()[..., : len(NEAR_ZERO)]
    tiny = 2.0**-13 if dtype == F16 else 2.0**-60
    rounding = TOLERANCE[dtype][0] * expected["y"].abs()[..., : len(NEAR_ZERO)]
    assert (held <= 2 * tiny * z.abs()[..., : len(NEAR_ZERO)] + rounding).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_layernorms_guard_keeps_what_its_docstring_says(dtype):
    # Under a bias the normalized value z is read off y, whose rounding stands between: (y − b)/w has it to within 1/4
    # + u|z| (the interpreter cuts bf16 off, which doubles it), and the output moves by 4u|b||z| at most.
    x, f, w, b = random((3, 7, 24), dtype), random((3, 7, 24), dtype), gains(24, dtype), random((24,), dtype)
    w[: len(NEAR_ZERO)] = torch.tensor(NEAR_ZERO)
    actual, expected = both("triton", x, f, w, b)
    u = torch.finfo(dtype).eps / 2
    ones = torch.ones_like(w, dtype=F64)
    z = formula(x.to(F64), f.to(F64), ones, 0 * ones, 1.0, 1.0)[0].abs()
    tiny = 2.0**-13 if dtype == F16 else 2.0**-60
    moved = (actual["y"].to(F64) - expected["y"]).abs()
    assert (moved <= (tiny + 4 * u * b.abs()) * z + TOLERANCE[dtype][0] * expected["y"].abs().max()).all()
    leaves = [t.detach().requires_grad_() for t in (x, f, w, b)]
    row = torch.zeros_like(x)
    for channel in range(len(NEAR_ZERO)):  # a gradient that picks one z: dw is that z
        row.zero_()[1, 2, channel] = 1
        y = fused.add_norm(*leaves, EPS, 1.0, 1.0, False)
        found = torch.autograd.grad(y, leaves[2], row)[0][channel].abs().to(F64)
        assert abs(found - z[1, 2, channel]) <= 2 * (0.25 + 4 * u * (1 + z[1, 2, channel]))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("return_sum", [False, True], ids=["one output", "two outputs"])
def test_rmsnorm_keeps_its_output_and_nothing_else_of_that_size(kernel, return_sum):
    x, f = (random((3, 7, 64), F32).requires_grad_() for _ in range(2))
    w = gains(64, F32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = KERNELS[kernel].add_norm(x, f, w, None, EPS, 2.0, 0.5, return_sum)
    y = y[0] if return_sum else y
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [y.data_ptr()]
    own = [t for t in kept if t.data_ptr() != w.data_ptr()]  # the parameter is there anyway
    assert sum(t.numel() for t in own) <= x.numel() + 64 + 3 * 7


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("used", ["normed", "sum"])
def test_an_output_that_is_not_used_has_no_gradient_to_give(kernel, used):
    x, f, w = random((2, 3, 16), F32), random((2, 3, 16), F32), gains(16, F32)
    leaves = [t.requires_grad_() for t in (x, f, w)]
    normed, total = KERNELS[kernel].add_norm(*leaves, None, EPS, 2.0, 0.5, True)
    (normed if used == "normed" else total).sum().backward()
    exact = [t.detach().to(F64).requires_grad_() for t in (x, f, w)]
    formula(*exact, None, 2.0, 0.5)[used == "sum"].sum().backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        expected = torch.zeros_like(wanted) if wanted.grad is None else wanted.grad
        torch.testing.assert_close(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, expected.float())


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_input_gives_the_same_bits(kernel):
    x, f, w = random((4, 600, 24), BF16), random((4, 600, 24), BF16), gains(24, F32)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)  # of the gradient that comes from above
        runs.append(both(kernel, x, f, w, None)[0])
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name])


def test_triton_sums_8192_channels_of_half_precision_in_fp32():
    # 8192 squares summed in bf16 would stall at a few hundred
    x, w = 3 + random((1, 2, 8192), F32), gains(8192, F32)
    assert_close(*both("triton", x.bfloat16(), None, w, None), BF16)


@norms
@pytest.mark.parametrize("return_sum", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch 2.14's own
def test_the_operator_is_registered_as_pytorch_asks(norm, return_sum):
    # schema, fake tensors, autograd and tracing with dynamic shapes, as torch.library checks them
    x, f, w = (t.requires_grad_() for t in (random((2, 3, 16), F32), random((2, 3, 16), F32), gains(16, F32)))
    b = random((16,), F32).requires_grad_() if norm == "layernorm" else None
    torch.library.opcheck(torch.ops.spannorm.add_norm.default, (x, f, w, b, EPS, 2.0, 0.5, return_sum))


@pytest.fixture
def choose():
    yield kernels.use
    kernels.use("auto")


def test_an_explicit_choice_is_followed_or_refused_with_the_reason(choose, monkeypatch):
    x, w = random((2, 3, 16), F32), gains(16, F32)
    choose("triton")
    assert torch.equal(kernels.add_norm(x, x, w, eps=EPS), fused.add_norm(x, x, w, None, EPS, 1.0, 1.0, False))
    with pytest.raises(kernels.InputError, match=r"kernels=triton: .* take fp32, bf16 and fp16, .* torch.float64"):
        kernels.add_norm(x.double(), None, w.double(), eps=EPS)
    with pytest.raises(kernels.InputError, match=r"at most 16384 channels, and this has 16385"):
        kernels.add_norm(torch.ones(1, 1, 16385, device=DEVICE), None, torch.ones(16385), eps=EPS)
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(kernels.InputError, match=r"the tensors are on cpu, and Triton needs a GPU. Choose auto or ref"):
        kernels.add_norm(x.cpu(), None, w.cpu(), eps=EPS)
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    with pytest.raises(kernels.InputError, match=r"pip install triton"):
        choose("triton")
    with pytest.raises(kernels.InputError, match=r"unknown kernels 'tritn': did you mean 'triton'"):
        choose("tritn")


def test_auto_says_once_what_it_chose_and_why(choose, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_said", set())
    choose("triton")  # loads it, interpreter and all
    choose("auto")
    with caplog.at_level("INFO", "spannorm"):
        for _ in range(3):
            kernels.add_norm(torch.ones(2, 3, 16), None, torch.ones(16), eps=EPS)
    assert [r.getMessage() for r in caplog.records] == ["kernels: auto chose reference (the tensors are on cpu)"]


def test_skip_and_branch_of_two_shapes_are_refused():
    with pytest.raises(kernels.InputError, match=r"one shape; they have \(2, 3, 16\) and \(2, 1, 16\)"):
        kernels.add_norm(torch.ones(2, 3, 16), torch.ones(2, 1, 16), torch.ones(16), eps=EPS)
