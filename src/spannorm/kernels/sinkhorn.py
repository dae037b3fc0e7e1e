"""Sinkhorn's iteration in plain PyTorch: the reference for the fused kernel, which also runs where it cannot.

A step divides each column (or row) by its sum: y = x / s, s = Σx + eps. Its gradient is dx = (dy − Σ dy·y) / s.
Backward keeps only the input, and computes all y and s again. Autograd would keep them: for n × n matrices and 20
rounds about 78·n² numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spannorm.kernels.reference import batched


def differentiable(x: Tensor, rounds: int, eps: float) -> Tensor:
    """The same from operations that can be differentiated again. Autograd keeps every step."""
    for dim in steps(rounds):
        x = x / (x.sum(dim, keepdim=True) + eps)
    return x


def steps(rounds: int) -> list[int]:
    """The dimension that each step sums over: columns, then rows and columns in turn."""
    return [step % 2 for step in range(2 * rounds - 1)]


def by_autograd(dy: Tensor, x: Tensor, rounds: int, eps: float) -> Tensor:
    """The gradient with respect to x, which can be differentiated again and takes a batch of gradients."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = differentiable(x, rounds, eps)
    return torch.autograd.grad(y, x, dy, create_graph=again)[0]


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounds: int, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rest = rounds, eps
        x = x.clone(memory_format=torch.contiguous_format)
        for dim in steps(rounds):
            x.div_(x.sum(dim, keepdim=True).add_(eps))
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (rounds, eps) = ctx.saved_tensors, ctx.rest
        if torch.is_grad_enabled() or batched(dy):
            return by_autograd(dy, x, rounds, eps), None, None
        x, trail = x.contiguous(), []
        for dim in steps(rounds):
            s = x.sum(dim, keepdim=True).add_(eps)
            x = x / s
            trail.append((dim, x, s))
        dx = dy.clone(memory_format=torch.contiguous_format)
        for dim, y, s in reversed(trail):
            dx.sub_((dx * y).sum(dim, keepdim=True)).div_(s)
        return dx, None, None


def doubly_stochastic(x: Tensor, rounds: int, eps: float) -> Tensor:
    """See `spannorm.kernels.doubly_stochastic`."""
    normalized: Tensor = _Sinkhorn.apply(x, rounds, eps)
    return normalized
