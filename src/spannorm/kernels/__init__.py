"""Add-and-norm, and Sinkhorn's iteration, each as one operation: a fused kernel or plain PyTorch.

`reference` is plain PyTorch and runs everywhere. `triton` runs on a GPU, in fp32, bf16 and fp16; it passes over memory
once in forward and once in backward. `auto` is `triton` where it can run, and `reference` elsewhere.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from spannorm.errors import InputError, one_of
from spannorm.kernels import reference, sinkhorn

KERNELS = ("auto", "reference", "triton")

_log = logging.getLogger("spannorm")
_choice = "auto"
_said: set[str] = set()

_fused: Any = None
_fused_sinkhorn: Any = None
if find_spec("triton") is not None and torch.version.cuda is not None:
    from spannorm.kernels import triton as _fused
    from spannorm.kernels import triton_sinkhorn as _fused_sinkhorn


def use(kernels: str) -> None:
    """Choose the kernels of this process: `auto`, `reference` or `triton`.

    Raises:
        InputError: an unknown name, or `triton` where it is not installed. If it is installed but cannot take a tensor,
            the forward pass raises: an explicit choice never falls back.
    """
    global _choice, _fused, _fused_sinkhorn
    one_of("kernels", kernels, KERNELS)
    if kernels == "triton":
        if find_spec("triton") is None:
            raise InputError("kernels=triton needs Triton: pip install triton, or choose auto or reference.")
        from spannorm.kernels import triton as _fused
        from spannorm.kernels import triton_sinkhorn as _fused_sinkhorn
    _choice = kernels


def add_norm(
    x: Tensor,
    f: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    skip: float = 1.0,
    branch: float = 1.0,
    return_sum: bool = False,
    inference: bool = False,
) -> Any:
    """`N(skip·x + branch·f)`, or `N(x)` without f; with `return_sum` the pair (normed, sum).

    N is RMSNorm, or LayerNorm where there is a bias. Half precision is summed in fp32.

    Args:
        x: (…, hidden).
        f: the same shape.
        weight: the gain, (hidden,).
        bias: (hidden,).
        skip, branch: constants. The caller multiplies with learned gains.
        inference: no backward pass will follow, now or if this runs again. Then the reference may use a faster
            computation, which differs only in rounding.

    Raises:
        InputError: shapes that differ, or tensors that an explicitly chosen kernel cannot take.
    """
    if f is None and return_sum:
        return add_norm(x, None, weight, bias, eps=eps, inference=inference), x
    reference.check(x, f)
    if reference.traced() or reference.shared_out(x):
        return reference.add_norm(x, f, weight, bias, eps, skip, branch, return_sum, inference=True)
    if _choice == "reference" or not _takes(x, f, x.shape[-1]):
        return reference.add_norm(x, f, weight, bias, eps, skip, branch, return_sum, inference)
    return _fused.add_norm(x, f, weight, bias, eps, skip, branch, return_sum)


def doubly_stochastic(x: Tensor, rounds: int, eps: float) -> Tensor:
    """Divide the columns of positive matrices by their sums + eps, then `rounds − 1` times rows and columns in turn.

    Args:
        x: (n, n, …), fp32 or fp64: rows, columns, and any number of matrices. With the matrices last, a sum over n is a
            sum of long vectors, which is faster than many sums of n numbers.
    """
    if reference.traced() or reference.shared_out(x):
        return sinkhorn.differentiable(x, rounds, eps)
    if _choice == "reference" or not _takes(x):
        return sinkhorn.doubly_stochastic(x, rounds, eps)
    normalized: Tensor = _fused_sinkhorn.doubly_stochastic(x, rounds, eps)
    return normalized


def chosen() -> tuple[str, str]:
    """What a training step in bf16 runs on this machine's GPU, or else its CPU: `triton` or `reference`, and why not
    `triton`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = "it was asked for" if _choice == "reference" else _refusal(torch.ones(1, 64, device=device).bfloat16())
    return ("triton", "") if reason is None else ("reference", reason)


def _refusal(x: Tensor, f: Tensor | None = None, width: int = 0) -> str | None:
    """Why Triton's kernels do not take these tensors; None where they do."""
    if _choice == "auto" and not x.is_cuda:  # Triton's interpreter is used only on request
        return f"the tensors are on {x.device.type}"
    refusal: str | None = "Triton is not installed" if _fused is None else _fused.refusal(x, f, width)
    return refusal


def _takes(x: Tensor, f: Tensor | None = None, width: int = 0) -> bool:
    """Whether Triton's kernels take these tensors. The log says once what `auto` chose."""
    reason = _refusal(x, f, width)
    if reason is not None and _choice == "triton":
        raise InputError(f"kernels=triton: {reason}. Choose auto or reference.")
    if not torch.compiler.is_compiling():
        choice = "triton" if reason is None else f"reference ({reason})"
        if choice not in _said:
            _said.add(choice)
            _log.log(logging.WARNING if reason and x.is_cuda else logging.INFO, "kernels: auto chose %s", choice)
    return reason is None
