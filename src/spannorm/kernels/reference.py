"""Add-and-norm in plain PyTorch: what the fused kernels must compute, and what runs where they do not.

RMSNorm's backward is memory-lean: of the (…, hidden) tensors it keeps only the output y, which the next layer keeps
anyway. With s = skip·x + branch·f, r = 1/√(mean(s²) + eps) and the gain w, y = r·s·w and

    dw = Σ_rows dy·y / w        ds = r·(dy·w − y/w · mean(dy·y))        dx = skip·ds        df = branch·ds

LayerNorm is PyTorch's own: one pass on every device, and it keeps the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def tiny_gain(dtype: torch.dtype) -> float:
    """The gain that stands in for one nearer to zero, so that y / w tells the normalized value at any gain.

    2^-60 keeps it to full relative precision, and moves an output by at most 2^-60·√hidden. float16 has no such
    exponents: there it is 2^-13, which moves an output by a quarter of a rounding per unit of the normalized value,
    and keeps that value to within 2^-12.
    """
    return 2.0**-13 if dtype == torch.float16 else 2.0**-60


class _AddRMSNorm(torch.autograd.Function):
    """Half precision is computed in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor | None,
        weight: Tensor,
        eps: float,
        skip: float,
        branch: float,
        return_sum: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        total = x if f is None else torch.add(x if skip == 1.0 else skip * x, f, alpha=branch)
        wide = total if total.dtype == torch.float64 else total.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        rstd = square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        gain = weight.to(wide.dtype)
        gain = torch.copysign(gain.abs().clamp_(min=tiny_gain(total.dtype)), gain)
        ours = wide is not x and not (return_sum and wide is total)  # to write to
        y = (wide.mul_(rstd) if ours else wide * rstd).mul_(gain).to(total.dtype)
        ctx.save_for_backward(y, gain, rstd)
        ctx.scales = skip, branch
        ctx.dtypes = x.dtype, None if f is None else f.dtype, weight.dtype
        ctx.set_materialize_grads(False)
        return (y, total) if return_sum else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        y, gain, rstd = ctx.saved_tensors
        (skip, branch), (x_type, f_type, weight_type) = ctx.scales, ctx.dtypes
        dw = None
        if dy is not None:
            dy, y = dy.to(rstd.dtype), y.to(rstd.dtype)
            product = dy * y
            dw = product.flatten(0, -2).sum(0).div_(gain).to(weight_type)
            along = torch.mul(y, product.mean(-1, keepdim=True), out=product)
            through = (dy * gain).addcdiv_(along, gain, value=-1).mul_(rstd)
            ds = through if ds is None else through.add_(ds)
        if ds is None:
            return (None,) * 7
        dx, df = (ds if c == 1.0 else c * ds for c in (skip, branch))
        return dx.to(x_type), None if f_type is None else df.to(f_type), dw, None, None, None, None


def add_norm(
    x: Tensor,
    f: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    skip: float,
    branch: float,
    return_sum: bool,
    inference: bool = False,
) -> Any:
    """RMSNorm, or LayerNorm where there is a bias; see `spannorm.kernels.add_norm`."""
    if bias is None and not inference:
        return _AddRMSNorm.apply(x, f, weight, eps, skip, branch, return_sum)
    total = x if f is None else torch.add(x if skip == 1.0 else skip * x, f, alpha=branch)
    if bias is None:
        y = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
    else:
        y = F.layer_norm(total, weight.shape, weight.to(total.dtype), bias.to(total.dtype), eps)
    return (y, total) if return_sum else y
