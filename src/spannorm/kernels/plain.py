"""The same operations, always in plain PyTorch. A published model's one file has these instead of a choice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spannorm.kernels import reference, sinkhorn


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
    """
    if f is None and return_sum:
        return add_norm(x, None, weight, bias, eps=eps, inference=inference), x
    reference.check(x, f)
    inference = inference or reference.traced() or reference.shared_out(x)
    return reference.add_norm(x, f, weight, bias, eps, skip, branch, return_sum, inference)


def doubly_stochastic(x: Tensor, rounds: int, eps: float) -> Tensor:
    """Divide the columns of positive matrices by their sums + eps, then `rounds − 1` times rows and columns in turn.

    Args:
        x: (n, n, …): rows, columns, and any number of matrices.
    """
    plain = reference.traced() or reference.shared_out(x)
    return (sinkhorn.differentiable if plain else sinkhorn.doubly_stochastic)(x, rounds, eps)
