"""Sinkhorn's iteration against its known limit, and its kernels' gradients against autograd's in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from spannorm.kernels import doubly_stochastic, sinkhorn

fused = importlib.import_module("spannorm.kernels.triton_sinkhorn")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32 = torch.float64, torch.float32
EPS = 1e-3  # large enough that a wrong place for it shows

kernels = pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"), [(sinkhorn, F64, 1e-13), (sinkhorn, F32, 1e-5), (fused, F32, 1e-5)],
    ids=["reference fp64", "reference fp32", "triton fp32"],
)  # fmt: skip


def positive(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return (torch.rand(*shape, dtype=F64) + 0.1).to(DEVICE, dtype)


def written_out(x: Tensor, rounds: int) -> Tensor:
    x = x / (x.sum(0) + EPS)
    for _ in range(rounds - 1):
        x = x / (x.sum(1, keepdim=True) + EPS)
        x = x / (x.sum(0) + EPS)
    return x


@kernels
def test_two_by_two_matrices_reach_their_known_limit(kernel, dtype, tolerance):
    x = positive(2, 2, 50, dtype=dtype)
    (a, b), (c, d) = x.sqrt()
    p = a * d / (a * d + b * c)
    limit = torch.stack((torch.stack((p, 1 - p)), torch.stack((1 - p, p))))
    torch.testing.assert_close(kernel.doubly_stochastic(x, 200, 0.0), limit, rtol=10 * tolerance, atol=0)


@kernels
@pytest.mark.parametrize(("n", "rounds"), [(1, 1), (3, 1), (4, 20), (5, 3)])
def test_value_and_gradient_are_the_formulas(n, rounds, kernel, dtype, tolerance):
    # laid out as a caller has it: the matrices were last before; more tokens than one program takes, and not a multiple
    x, dy = (positive(7, 11, n, n, dtype=dtype).movedim((0, 1), (-2, -1)) for _ in range(2))
    exact, own = x.to(F64).requires_grad_(), x.requires_grad_()
    for y, leaf, given, error in (
        (written_out(exact, rounds), exact, dy.to(F64), 0),
        (kernel.doubly_stochastic(own, rounds, EPS), own, dy, tolerance),
    ):
        (dx,) = torch.autograd.grad(y, leaf, given)
        if not error:
            expected = y, dx
        else:
            torch.testing.assert_close(y.to(F64), expected[0], rtol=error, atol=0)
            torch.testing.assert_close(dx.to(F64), expected[1], rtol=0, atol=error * expected[1].abs().max().item())


def test_first_and_second_derivatives_are_those_of_finite_differences():
    x = positive(5, 3, 3).movedim(0, -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: doubly_stochastic(x, 4, EPS), x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: doubly_stochastic(x, 4, EPS), x)


def test_second_derivatives_of_the_fused_kernel_are_the_formulas():
    x, dy, v = (positive(3, 3, 9, dtype=F32) for _ in range(3))
    found = []
    for run, dtype in ((written_out, F64), (lambda x, rounds: fused.doubly_stochastic(x, rounds, EPS), F32)):
        leaf = x.to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad(run(leaf, 4), leaf, dy.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(dx, leaf, v.to(dtype))[0].to(F64))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of forward mode itself
def test_function_transforms_give_the_same():
    x, dx, dy = (positive(3, 3, 5) for _ in range(3))

    def f(x):
        return doubly_stochastic(x, 4, EPS)

    def g(x):
        return (f(x) * dy).sum()

    leaf = x.clone().requires_grad_()
    g(leaf).backward()
    torch.testing.assert_close(grad(g)(x), leaf.grad)
    torch.testing.assert_close(vmap(f, in_dims=2, out_dims=2)(x), f(x))
    step = 1e-6
    along = (f(x + step * dx) - f(x - step * dx)) / (2 * step)
    torch.testing.assert_close(jvp(f, (x,), (dx,))[1], along, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kernel", [sinkhorn, fused])
def test_backward_keeps_the_input_alone(kernel):
    x, kept = positive(4, 4, 100, dtype=F32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.doubly_stochastic(x, 20, EPS)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_a_compiler_sees_one_operation():
    graphs = []

    def look(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    x = positive(3, 3, 9, dtype=F32).requires_grad_()
    compiled = torch.compile(lambda x: fused.doubly_stochastic(x, 4, EPS), fullgraph=True, backend=look)
    torch.testing.assert_close(compiled(x), fused.doubly_stochastic(x, 4, EPS))
    assert graphs == [[torch.ops.spannorm.sinkhorn.default]]
    torch.library.opcheck(torch.ops.spannorm.sinkhorn.default, (x, 4, EPS))
