"""Sinkhorn's iteration with a backward pass that keeps only the input.

A step divides each column (or row) by its sum: y = x / s, s = Σx + eps. Its gradient is dx = (dy − Σ dy·y) / s.
Backward computes all y and s again. Autograd would keep them: for n × n matrices and 20 rounds about 78·n² numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spannorm.kernels.reference import shared_out, traced


def doubly_stochastic(x: Tensor, rounds: int, eps: float) -> Tensor:
    """Divide the columns of positive matrices by their sums + eps, then `rounds − 1` times rows and columns in turn.

    Args:
        x: (n, n, …): rows, columns, and any number of matrices. With the matrices last, a sum over n is a sum of long
            vectors, which is faster than many sums of n numbers.
    """
    if traced() or shared_out(x):
        return _differentiable(x, rounds, eps)
    normalized: Tensor = _Sinkhorn.apply(x, rounds, eps)
    return normalized


def _dims(rounds: int) -> list[int]:
    """The dimension that each step sums over: columns, then rows and columns in turn."""
    return [step % 2 for step in range(2 * rounds - 1)]


def _differentiable(x: Tensor, rounds: int, eps: float) -> Tensor:
    for dim in _dims(rounds):
        x = x / (x.sum(dim, keepdim=True) + eps)
    return x


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounds: int, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rest = rounds, eps
        x = x.clone(memory_format=torch.contiguous_format)
        for dim in _dims(rounds):
            x.div_(x.sum(dim, keepdim=True).add_(eps))
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (rounds, eps) = ctx.saved_tensors, ctx.rest
        if torch.is_grad_enabled():  # a second derivative is wanted
            y = _differentiable(x, rounds, eps)
            return torch.autograd.grad(y, x, dy, create_graph=True)[0], None, None
        x, steps = x.contiguous(), []
        for dim in _dims(rounds):
            s = x.sum(dim, keepdim=True).add_(eps)
            x = x / s
            steps.append((dim, x, s))
        dx = dy.clone(memory_format=torch.contiguous_format)
        for dim, y, s in reversed(steps):
            dx.sub_((dx * y).sum(dim, keepdim=True)).div_(s)
        return dx, None, None
