"""Sinkhorn's iteration against its known limit, and its own backward pass against autograd's."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap

from spannorm.kernels.sinkhorn import doubly_stochastic

F64 = torch.float64
EPS = 1e-3


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=F64) + 0.1


def written_out(x: torch.Tensor, rounds: int) -> torch.Tensor:
    x = x / (x.sum(0) + EPS)
    for _ in range(rounds - 1):
        x = x / (x.sum(1, keepdim=True) + EPS)
        x = x / (x.sum(0) + EPS)
    return x


def test_two_by_two_matrices_reach_their_known_limit():
    x = positive(2, 2, 50)
    (a, b), (c, d) = x.sqrt()
    p = a * d / (a * d + b * c)
    torch.testing.assert_close(
        doubly_stochastic(x, 200, 0.0), torch.stack((torch.stack((p, 1 - p)), torch.stack((1 - p, p))))
    )


@pytest.mark.parametrize(("n", "rounds"), [(1, 1), (3, 1), (4, 5)])
def test_it_divides_columns_first_and_then_rows_and_columns(n, rounds):
    x = positive(n, n, 2, 3)
    torch.testing.assert_close(doubly_stochastic(x, rounds, EPS), written_out(x, rounds), rtol=1e-14, atol=0)


def test_first_and_second_derivatives_are_those_of_finite_differences():
    # laid out as a caller has it: the matrices were last before
    x = positive(5, 3, 3).movedim(0, -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: doubly_stochastic(x, 4, EPS), x)
    assert torch.autograd.gradgradcheck(lambda x: doubly_stochastic(x, 4, EPS), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of forward mode itself
def test_function_transforms_give_the_same():
    x, dx, dy = positive(3, 3, 5), positive(3, 3, 5), positive(3, 3, 5)

    def f(x):
        return doubly_stochastic(x, 4, EPS)

    def g(x):
        return (f(x) * dy).sum()

    leaf = x.clone().requires_grad_()
    g(leaf).backward()
    torch.testing.assert_close(grad(g)(x), leaf.grad)
    torch.testing.assert_close(vmap(f, in_dims=2, out_dims=2)(x), f(x))
    step = 1e-6
    torch.testing.assert_close(
        jvp(f, (x,), (dx,))[1], (f(x + step * dx) - f(x - step * dx)) / (2 * step), rtol=1e-7, atol=1e-8
    )


def test_backward_keeps_the_input_alone():
    x, kept = positive(4, 4, 100).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        doubly_stochastic(x, 20, EPS)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
