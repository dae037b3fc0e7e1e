"""Add-and-norm in Triton: one pass over memory forward, one backward, sums in fp32.

    forward    reads x, f          writes y (and s)        s = skip·x + branch·f,  y = N(s)
    backward   reads y, dy (ds)    writes dx (and df, where the factors differ)

Of the (…, hidden) tensors backward keeps only y. It computes the normalized value z = (y − b)/w from y. This is as
exact as y if a gain w is not small compared with its bias b. A gain nearer to zero is replaced by the least value
allowed here, in forward and in backward, with u the unit roundoff of y's dtype:

    |w| ≥ tiny + 4u·|b|        tiny = 2^-60, in float16 2^-13

So a gain of zero still learns, without another copy in memory and without a synchronization with the device. The
error of an output is at most (tiny + 4u·|b|)·|z|. The error of z is at most u·(|z| + |b|/|w|), which is never above
u·|z| + 1/4, and u·|z| without a bias (in float16 plus 2^-25/|w|, at most 2^-12).

Each program sums the gradient of a gain over a fixed set of rows; then the programs' sums are added. So the same device
gives the same bits every time.

For code that looks at operators (torch.compile, fake tensors, dispatch modes), the two launches are custom operators.
Plain eager calls launch them from an autograd function, because PyTorch's call of a custom operator written in Python
takes longer than the kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from spannorm.kernels.reference import batched, differentiate, tiny_gain

INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton interprets its kernels, which is slow and works on any device. Triton reads it at their definition."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 16384
"""Channels of a row, because a row must fit into the registers of one program."""
WARPS_PER_SM = 32
"""Warps of backward at once. Each program reads many rows and writes one row of partial gradients of the gain."""


@triton.jit
def _guarded(w, b, TINY: tl.constexpr, ROUNDOFF: tl.constexpr):
    nearest = TINY + 4 * ROUNDOFF * tl.abs(b)
    return tl.where(tl.abs(w) < nearest, tl.where(w < 0, -nearest, nearest), w)


@triton.jit
def forward_kernel(
    X, F, W, B, Y, S, RSTD,
    x_stride, f_stride, rows, eps, skip, branch,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TINY: tl.constexpr, ROUNDOFF: tl.constexpr,
    ADD: tl.constexpr, CENTRE: tl.constexpr, KEEP_SUM: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = (row < rows)[:, None] & (cols < WIDTH)[None, :]
    s = tl.load(X + row[:, None] * x_stride + cols[None, :], mask=here, other=0.0).to(tl.float32)
    if ADD:
        f = tl.load(F + row[:, None] * f_stride + cols[None, :], mask=here, other=0.0).to(tl.float32)
        s = skip * s + branch * f
    out = row[:, None] * WIDTH + cols[None, :]
    if KEEP_SUM:
        tl.store(S + out, s.to(S.dtype.element_ty), mask=here)
    w = tl.load(W + cols, mask=cols < WIDTH, other=1.0).to(tl.float32)
    b = tl.zeros_like(w)
    if CENTRE:
        b = tl.load(B + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
        s = tl.where(here, s - tl.sum(s, 1)[:, None] / WIDTH, 0.0)
    rstd = tl.rsqrt(tl.sum(s * s, 1) / WIDTH + eps)
    y = s * rstd[:, None] * _guarded(w, b, TINY, ROUNDOFF)[None, :] + b[None, :]
    tl.store(Y + out, y.to(Y.dtype.element_ty), mask=here)
    tl.store(RSTD + row, rstd, mask=row < rows)


@triton.jit
def backward_kernel(
    DY, DS, Y, W, B, RSTD, DX, DF, DW, DB,
    dy_stride, ds_stride, rows, skip, branch,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, TINY: tl.constexpr, ROUNDOFF: tl.constexpr,
    SPLIT: tl.constexpr, CENTRE: tl.constexpr, HAS_DS: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    w = tl.load(W + cols, mask=cols < WIDTH, other=1.0).to(tl.float32)
    b = tl.zeros_like(w)
    if CENTRE:
        b = tl.load(B + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    w = _guarded(w, b, TINY, ROUNDOFF)
    inverse = 1 / w
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * TILE, rows, tl.num_programs(0) * TILE):
        row = (first + tl.arange(0, TILE)).to(tl.int64)
        here = (row < rows)[:, None] & (cols < WIDTH)[None, :]
        at = row[:, None] * WIDTH + cols[None, :]
        y = tl.load(Y + at, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(DY + row[:, None] * dy_stride + cols[None, :], mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, mask=row < rows, other=0.0)
        z = tl.where(here, (y - b[None, :]) * inverse[None, :], 0.0)
        dw += tl.sum(dy * z, 0)
        dz = dy * w[None, :]
        ds = dz - z * (tl.sum(dz * z, 1) / WIDTH)[:, None]
        if CENTRE:
            db += tl.sum(dy, 0)
            ds -= tl.sum(dz, 1)[:, None] / WIDTH
        ds *= rstd[:, None]
        if HAS_DS:
            ds += tl.load(DS + row[:, None] * ds_stride + cols[None, :], mask=here, other=0.0).to(tl.float32)
        tl.store(DX + at, (skip * ds).to(DX.dtype.element_ty), mask=here)
        if SPLIT:
            tl.store(DF + at, (branch * ds).to(DF.dtype.element_ty), mask=here)
    partial = tl.program_id(0) * WIDTH + cols
    tl.store(DW + partial, dw, mask=cols < WIDTH)
    if CENTRE:
        tl.store(DB + partial, db, mask=cols < WIDTH)


def tiling(width: int, values: int) -> dict[str, int]:
    """The rows of one program: whole rows, several if they are short. A thread holds `values` values."""
    block = triton.next_power_of_2(width)
    tile = max(1, 1024 // block)
    warps = min(256 // values, max(1, block * tile // (32 * values)))
    return {"BLOCK": block, "TILE": tile, "num_warps": warps, "enable_fp_fusion": True}


@cache
def constants(y: torch.dtype, width: int, backward: bool = False) -> dict[str, Any]:
    """Compile-time constants of a kernel. Backward holds twice as many tensors, so a thread has half as many values.

    These values and `WARPS_PER_SM` were the fastest of those tried on an H200: docs/performance.md.
    """
    known = {"WIDTH": width, "TINY": tiny_gain(y), "ROUNDOFF": torch.finfo(y).eps / 2}
    return known | tiling(width, 8 if backward else 16)


@cache
def _most_programs(device: torch.device, warps: int) -> int:
    """How many programs of `warps` warps backward runs at once."""
    if device.type != "cuda":
        return 2
    return max(1, WARPS_PER_SM // warps) * torch.cuda.get_device_properties(device).multi_processor_count


def _rows(x: Tensor) -> Tensor:
    """(…, hidden) as (rows, hidden). Copied only if the distance between rows varies."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _splits(x: torch.dtype, f: torch.dtype | None, skip: float, branch: float) -> bool:
    """Whether the two gradients differ."""
    return f is not None and (skip != branch or x != f)


def _launch_forward(
    x: Tensor,
    f: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    skip: float,
    branch: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, sum or an empty tensor, 1/RMS of each row)."""
    y, total, rstd = _forward_fake(x, f, weight, bias, eps, skip, branch, keep_sum)
    x2, f2 = _rows(x), None if f is None else _rows(f)
    c = constants(y.dtype, x.shape[-1])
    if rows := len(x2):
        with torch.accelerator.device_index(x.device.index):
            forward_kernel[(triton.cdiv(rows, c["TILE"]),)](
                x2, f2, weight, bias, y, total, rstd,
                x2.stride(0), 0 if f2 is None else f2.stride(0), rows, eps, skip, branch,
                **c, ADD=f is not None, CENTRE=bias is not None, KEEP_SUM=keep_sum,
            )  # fmt: skip
    return y, total, rstd


def _forward_fake(
    x: Tensor,
    f: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    skip: float,
    branch: float,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if f is None else torch.promote_types(x.dtype, f.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    return y, torch.empty_like(y) if keep_sum else y.new_empty(0), y.new_empty(x.shape[:-1], dtype=torch.float32)


def _launch_backward(
    dy: Tensor,
    ds: Tensor | None,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    skip: float,
    branch: float,
    x_type: torch.dtype,
    f_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, df, dw, db). df is empty if it is equal to dx, db if there is no bias."""
    dx, df = _branches(y, x_type, f_type, skip, branch)
    dy2, ds2 = _rows(dy), None if ds is None else _rows(ds)
    rows, c = len(dy2), constants(y.dtype, y.shape[-1], backward=True)
    programs = min(triton.cdiv(rows, c["TILE"]), _most_programs(y.device, c["num_warps"]))
    partial = torch.empty((1 if bias is None else 2, programs, y.shape[-1]), dtype=torch.float32, device=y.device)
    if rows:
        with torch.accelerator.device_index(y.device.index):
            backward_kernel[(programs,)](
                dy2, ds2, y, weight, bias, rstd, dx, df, partial[0], partial[-1],
                dy2.stride(0), 0 if ds2 is None else ds2.stride(0), rows, skip, branch,
                **c, SPLIT=df.numel() > 0, CENTRE=bias is not None, HAS_DS=ds is not None,
            )  # fmt: skip
    dw = partial[0].sum(0).to(weight.dtype)
    return dx, df, dw, weight.new_empty(0) if bias is None else partial[1].sum(0).to(bias.dtype)


def _branches(
    y: Tensor, x_type: torch.dtype, f_type: torch.dtype | None, skip: float, branch: float
) -> tuple[Tensor, Tensor]:
    """Memory for dx, and for df if it differs from dx."""
    dx = torch.empty(y.shape, dtype=x_type, device=y.device)
    return dx, torch.empty_like(dx, dtype=f_type) if _splits(x_type, f_type, skip, branch) else dx.new_empty(0)


def _backward_fake(
    dy: Tensor,
    ds: Tensor | None,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    skip: float,
    branch: float,
    x_type: torch.dtype,
    f_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, df = _branches(y, x_type, f_type, skip, branch)
    return dx, df, torch.empty_like(weight), weight.new_empty(0) if bias is None else torch.empty_like(bias)


_forward = torch.library.custom_op("spannorm::add_norm", _launch_forward, mutates_args=())
_forward.register_fake(_forward_fake)
_backward = torch.library.custom_op("spannorm::add_norm_backward", _launch_backward, mutates_args=())
_backward.register_fake(_backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, f, weight, bias, _, skip, branch, ctx.keep_sum = inputs
    ctx.save_for_backward(output[0], weight, bias, output[2])
    ctx.rest = skip, branch, x.dtype, None if f is None else f.dtype
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, dr: Tensor | None, launch: Any = _backward
) -> tuple[Tensor | None, ...]:
    y, weight, bias, rstd = ctx.saved_tensors
    skip, branch, x_type, f_type = ctx.rest
    dy = torch.zeros_like(y) if dy is None else dy
    ds = ds if ctx.keep_sum else None  # tracing gives every output a gradient, also the empty tensor
    second = torch.is_grad_enabled() or dr is not None  # a second derivative is wanted, or is being taken
    if not torch.compiler.is_compiling() and (second or batched(dy, ds)):
        total, dw = differentiate(dy, None if dr is None else dr[..., None], ds, y, weight, bias, rstd[..., None])
        db = None if bias is None else dy.reshape(-1, y.shape[-1]).sum(0, dtype=rstd.dtype).to(bias.dtype)
        df = None if f_type is None else (branch * total).to(f_type)
        return (skip * total).to(x_type), df, dw, db, None, None, None, None
    dx, df, dw, db = launch(dy, ds, y, weight, bias, rstd, skip, branch, x_type, f_type)
    if f_type is not None and not _splits(x_type, f_type, skip, branch):
        df = dx
    return dx, None if f_type is None else df, dw, None if bias is None else db, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same operator without PyTorch's dispatch of custom operators."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        outputs = _launch_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, dy, ds, dr, launch=_launch_backward)


def observed(*tensors: Tensor | None) -> bool:
    """Whether something looks at operators: a compiler, a dispatch mode, or a tensor of another class."""
    modes = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return modes or any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in tensors)


def refusal(x: Tensor, f: Tensor | None = None, width: int = 0) -> str | None:
    """Why the kernels cannot take these tensors, with rows of `width` channels; None if they can."""
    if not (x.is_cuda or INTERPRETED):
        return f"the tensors are on {x.device.type}, and Triton needs a GPU"
    if x.dtype not in DTYPES or (f is not None and f.dtype not in DTYPES):
        return f"Triton's kernels take fp32, bf16 and fp16, and this is {x.dtype}"
    if width > MAX_WIDTH:
        return f"Triton's kernels take at most {MAX_WIDTH} channels, and this has {width}"
    return None


def add_norm(
    x: Tensor,
    f: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    skip: float,
    branch: float,
    return_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `spannorm.kernels.add_norm`."""
    run = _forward if observed(x, f, weight, bias) else _Eager.apply
    y, total, _ = run(x, f, weight, bias, eps, skip, branch, return_sum)
    return (y, total) if return_sum else y
