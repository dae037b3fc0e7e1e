"""Sinkhorn's iteration in Triton: one launch forward, one backward, in fp32.

    forward    reads x        writes y
    backward   reads x, dy    writes dx, and the sums of all steps into memory that only it uses

A program holds whole matrices, those of a group of tokens. Backward goes forward once more, which gives every step's
sums s, and then back: with them y_(k−1) = y_k·s_k, and the gradient as in `sinkhorn`.

As in `spannorm.kernels.triton`, eager calls launch from an autograd function, and whatever looks at operators sees a
custom operator. So a compiler does not take the rounds apart, which made its graphs large.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spannorm.kernels.reference import batched
from spannorm.kernels.sinkhorn import by_autograd
from spannorm.kernels.triton import observed

VALUES = 512
"""Of one program: about 16 in each thread of its one warp."""


@triton.jit
def forward_kernel(X, Y, tokens, eps, N: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    row, column = tl.arange(0, P)[:, None, None], tl.arange(0, P)[None, :, None]
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[None, None, :]
    here = (row < N) & (column < N) & (token < tokens)
    at = (row * N + column) * tokens + token
    x = tl.load(X + at, mask=here, other=0.0)
    x = x / _sums(x, eps, 0)
    for _ in range(ROUNDS - 1):
        x = x / _sums(x, eps, 1)
        x = x / _sums(x, eps, 0)
    tl.store(Y + at, x, mask=here)


@triton.jit
def backward_kernel(
    X, DY, DX, S, tokens, eps, N: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr
):  # fmt: skip
    row, column = tl.arange(0, P)[:, None, None], tl.arange(0, P)[None, :, None]
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[None, None, :]
    here = (row < N) & (column < N) & (token < tokens)
    at = (row * N + column) * tokens + token
    of_columns, of_rows = column * tokens + token, row * tokens + token  # where sums over rows, over columns are kept
    columns_here, rows_here = (column < N) & (token < tokens), (row < N) & (token < tokens)
    x = tl.load(X + at, mask=here, other=0.0)
    dx = tl.load(DY + at, mask=here, other=0.0)
    column_sums = _sums(x, eps, 0)
    tl.store(S + of_columns, column_sums, mask=columns_here)
    x = x / column_sums
    for _ in range(ROUNDS - 1):
        row_sums = _sums(x, eps, 1)
        S += N * tokens
        tl.store(S + of_rows, row_sums, mask=rows_here)
        x = x / row_sums
        column_sums = _sums(x, eps, 0)
        S += N * tokens
        tl.store(S + of_columns, column_sums, mask=columns_here)
        x = x / column_sums
    tl.debug_barrier()  # what is read below may have been written by another thread
    for _ in range(ROUNDS - 1):
        column_sums = tl.load(S + of_columns, mask=columns_here, other=1.0)
        S -= N * tokens
        dx = (dx - tl.sum(dx * x, 0, keep_dims=True)) / column_sums
        x = x * column_sums
        row_sums = tl.load(S + of_rows, mask=rows_here, other=1.0)
        S -= N * tokens
        dx = (dx - tl.sum(dx * x, 1, keep_dims=True)) / row_sums
        x = x * row_sums
    column_sums = tl.load(S + of_columns, mask=columns_here, other=1.0)
    dx = (dx - tl.sum(dx * x, 0, keep_dims=True)) / column_sums
    tl.store(DX + at, dx, mask=here)


@triton.jit
def _sums(x, eps, DIM: tl.constexpr):
    s = tl.sum(x, DIM, keep_dims=True) + eps
    return tl.where(s == 0.0, 1.0, s)  # outside the matrix there are zeros


def constants(n: int, rounds: int) -> dict[str, Any]:
    """Compile-time constants of the kernels, for n × n matrices."""
    p = triton.next_power_of_2(n)
    warps = max(1, p * p // VALUES)
    return {"N": n, "P": p, "TILE": max(1, VALUES // (p * p)), "ROUNDS": rounds, "num_warps": warps,
            "enable_fp_fusion": True}  # fmt: skip


def _launch_forward(x: Tensor, rounds: int, eps: float) -> Tensor:
    x, y, c = x.contiguous(), _like(x, rounds, eps), constants(len(x), rounds)
    if tokens := x[0, 0].numel():
        with torch.accelerator.device_index(x.device.index):
            forward_kernel[(triton.cdiv(tokens, c["TILE"]),)](x, y, tokens, eps, **c)
    return y


def _launch_backward(dy: Tensor, x: Tensor, rounds: int, eps: float) -> Tensor:
    x, dy, dx, c = x.contiguous(), dy.contiguous(), _like(x, rounds, eps), constants(len(x), rounds)
    if tokens := x[0, 0].numel():
        sums = x.new_empty(2 * rounds - 1, len(x), tokens)
        with torch.accelerator.device_index(x.device.index):
            backward_kernel[(triton.cdiv(tokens, c["TILE"]),)](x, dy, dx, sums, tokens, eps, **c)
    return dx


def _like(x: Tensor, rounds: int, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = torch.library.custom_op("spannorm::sinkhorn", _launch_forward, mutates_args=())
_forward.register_fake(_like)
_backward = torch.library.custom_op("spannorm::sinkhorn_backward", _launch_backward, mutates_args=())
_backward.register_fake(lambda dy, x, rounds, eps: _like(x, rounds, eps))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.rest = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, dy: Tensor, launch: Any = _backward) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or batched(dy)):
        launch = by_autograd
    return launch(dy, x, *ctx.rest), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without PyTorch's dispatch of custom operators."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _launch_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, dy, launch=_launch_backward)


def doubly_stochastic(x: Tensor, rounds: int, eps: float) -> Tensor:
    """See `spannorm.kernels.doubly_stochastic`."""
    normalized: Tensor = (_forward if observed(x) else _Eager.apply)(x, rounds, eps)
    return normalized
