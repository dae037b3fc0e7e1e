"""Add-and-norm in plain PyTorch: the reference for the fused kernels, which also runs where they cannot.

RMSNorm's backward needs little memory: of the (…, hidden) tensors it keeps only the output y, which the next layer
keeps anyway. With s = skip·x + branch·f, r = 1/√(mean(s²) + eps) and the gain w, y = r·s·w and

    dw = Σ_rows dy·y / w        ds = r·(dy·w − y/w · mean(dy·y))        dx = skip·ds        df = branch·ds

LayerNorm is PyTorch's own: one pass on every device, and it keeps the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from spannorm.errors import InputError


def tiny_gain(dtype: torch.dtype) -> float:
    """The least absolute value of a gain. A smaller gain is replaced by it, so that y / w gives the normalized value.

    2^-60 keeps that value to full relative precision, and changes an output by at most 2^-60·√hidden. float16 has no
    such exponents. There it is 2^-13, which changes an output by a quarter of a rounding per unit of the normalized
    value, and keeps that value to within 2^-12.
    """
    return 2.0**-13 if dtype == torch.float16 else 2.0**-60


def differentiate(
    dy: Tensor,
    drstd: Tensor | None,
    ds: Tensor | None,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to the sum and the gain, from operations that can be differentiated again.

    With n = (y − b)/w the normalized value, g = dy·w and r = `rstd`: `dw = Σ_rows dy·n` and
    `ds += r·(g − n·mean(g·n)) − dr·r²·n/d`. For LayerNorm the mean of g is subtracted from g.

    Args:
        rstd: r by row, with a last dimension of 1. `drstd` is its gradient, which only a second derivative has.
    """
    dtype, weight = weight.dtype, weight.to(rstd.dtype)
    offset = torch.zeros_like(weight) if bias is None else bias.to(rstd.dtype)
    least = tiny_gain(y.dtype) + 2 * torch.finfo(y.dtype).eps * offset.abs()  # as in the kernels
    gain = torch.where(weight.abs() < least, torch.copysign(least, weight), weight)
    n = (y.to(rstd.dtype) - offset) / gain
    g = dy.to(rstd.dtype) * gain
    through = g - n * (g * n).mean(-1, keepdim=True) - (0.0 if bias is None else g.mean(-1, keepdim=True))
    total = through * rstd if ds is None else through * rstd + ds
    if drstd is not None:
        total = total - drstd * rstd.square() * n / y.shape[-1]
    return total, (dy * n).reshape(-1, y.shape[-1]).sum(0).to(dtype)


def batched(*gradients: Tensor | None) -> bool:
    """Whether gradients are a batch (`is_grads_batched`, `jacobian(…, vectorize=True)`). Then a backward may use only
    PyTorch's own operations, none in place, and `flatten` is not among them."""
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)


class _AddRMSNorm(torch.autograd.Function):
    """Half precision is computed in fp32. It also returns rstd, which second derivatives need."""

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
    ) -> tuple[Tensor, ...]:
        total = x if f is None else torch.add(x if skip == 1.0 else skip * x, f, alpha=branch)
        half = total.dtype not in (torch.float32, torch.float64)
        wide = total.float() if half else total
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        rstd = square.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ours = half or (f is not None and not return_sum)  # `wide` is a new tensor, which may be overwritten
        gain = weight.to(wide.dtype)
        gain = torch.copysign(gain.abs().clamp_(min=tiny_gain(total.dtype)), gain)
        y = (wide.mul_(rstd) if ours else wide * rstd).mul_(gain).to(total.dtype)
        ctx.save_for_backward(y, weight, rstd, gain)
        ctx.scales = skip, branch
        ctx.dtypes = x.dtype, None if f is None else f.dtype
        ctx.set_materialize_grads(False)
        return (y, rstd, total) if return_sum else (y, rstd)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, drstd: Tensor | None = None, ds: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        y, weight, rstd, gain = ctx.saved_tensors
        (skip, branch), (x_type, f_type) = ctx.scales, ctx.dtypes
        dw = None
        second = torch.is_grad_enabled() or drstd is not None  # a second derivative is wanted, or is being taken
        if second or batched(dy, ds):
            dy = torch.zeros_like(y) if dy is None else dy
            ds, dw = differentiate(dy, drstd, ds, y, weight, None, rstd)
        elif dy is not None:
            dy, y = dy.to(rstd.dtype), y.to(rstd.dtype)
            product = dy * y
            dw = product.reshape(-1, y.shape[-1]).sum(0).div_(gain).to(weight.dtype)
            along = torch.mul(y, product.mean(-1, keepdim=True), out=product)
            through = (dy * gain).addcdiv_(along, gain, value=-1).mul_(rstd)
            ds = through if ds is None else through.add_(ds)
        if ds is None:
            return (None,) * 7
        dx, df = (ds if c == 1.0 else c * ds for c in (skip, branch))
        return dx.to(x_type), None if f_type is None else df.to(f_type), dw, None, None, None, None


def check(x: Tensor, f: Tensor | None) -> None:
    """Refuse tensors that no kernel can add and normalize."""
    if f is not None and f.shape != x.shape:
        raise InputError(f"skip and branch must have one shape; they have {tuple(x.shape)} and {tuple(f.shape)}.")
    if not x.is_floating_point():
        raise InputError(f"a norm takes floating-point tensors; got {x.dtype}: convert it first.")


def traced() -> bool:
    """Whether only PyTorch's own operations may be used: under vmap, forward mode and exporters such as ONNX's."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    dual = forward_ad._current_level >= 0  # functorch's own forward mode is a transform
    return dual or torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()


def shared_out(x: Tensor) -> bool:
    """Whether a tensor is a DTensor: it can distribute PyTorch's own operations, and not our kernels."""
    return type(x) is not Tensor and hasattr(x, "device_mesh")


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
        y, _, *total = _AddRMSNorm.apply(x, f, weight, eps, skip, branch, return_sum)
        return (y, *total) if return_sum else y
    total = x if f is None else torch.add(x if skip == 1.0 else skip * x, f, alpha=branch)
    if bias is None:
        y = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
    else:
        # on a CPU PyTorch sums half precision's gains and biases in half precision
        wide = total.float() if total.device.type == "cpu" and total.dtype in (torch.bfloat16, torch.float16) else total
        y = F.layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(total.dtype)
    return (y, total) if return_sum else y
