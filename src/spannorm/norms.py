"""RMSNorm, LayerNorm and DyT, with the one operation that every placement uses: add, then normalize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from spannorm.errors import one_of
from spannorm.kernels import add_norm
from spannorm.shapes import Stream

Scale = float | Tensor
"""A factor on a skip or a branch: a constant that depends on depth, or a learned gain (scalar or per channel)."""


def scaled_add(x: Stream, f: Stream, *, skip: Scale = 1.0, branch: Scale = 1.0) -> Stream:
    """`skip·x + branch·f`, in as few passes over memory as PyTorch allows."""
    if not isinstance(skip, float) or skip != 1.0:
        x = skip * x
    if isinstance(branch, float):
        return torch.add(x, f, alpha=branch)
    return torch.addcmul(x, f, branch.to(torch.promote_types(x.dtype, f.dtype)))


class Norm(nn.Module):
    """Common part of the norms: a gain, and a forward pass that may add a branch first.

    Args:
        hidden_size: channels of the last dimension.
        eps: added to the mean square (or variance) inside the root.
    """

    STARTS: ClassVar[dict[str, float]] = {}
    """Initial values of parameters other than the gain and the bias."""
    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.register_parameter("bias", None)

    @overload
    def forward(self, x: Stream, f: Stream | None = ..., *, skip: Scale = ..., branch: Scale = ...) -> Stream: ...
    @overload
    def forward(
        self, x: Stream, f: Stream, *, skip: Scale = ..., branch: Scale = ..., return_sum: Literal[True]
    ) -> tuple[Stream, Stream]: ...
    def forward(
        self,
        x: Stream,
        f: Stream | None = None,
        *,
        skip: Scale = 1.0,
        branch: Scale = 1.0,
        return_sum: bool = False,
    ) -> Stream | tuple[Stream, Stream]:
        """`N(skip·x + branch·f)`, or `N(x)` without `f`; with `return_sum` the pair (normed, sum)."""
        if f is not None and (isinstance(skip, Tensor) or isinstance(branch, Tensor)):
            x, f, skip, branch = scaled_add(x, f, skip=skip, branch=branch), None, 1.0, 1.0
        normed: Stream | tuple[Stream, Stream] = self.add_norm(x, f, skip=skip, branch=branch, return_sum=return_sum)
        return normed

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns Any

    def add_norm(self, x: Stream, f: Stream | None, *, return_sum: bool, **scales: Any) -> Any:
        """The same operation for constant factors."""
        # in training a forward pass without gradients may run again with gradients, and must give the same bits
        inference = not (self.training or torch.is_grad_enabled())
        return add_norm(
            x, f, self.weight, self.bias, eps=self.eps, return_sum=return_sum, inference=inference, **scales
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm(Norm):
    """`x / √(mean(x²) + eps) · weight`, in the input's dtype. Half precision is summed in fp32.

    Backward needs the output. As with `torch.exp`, PyTorch raises an error if the output was changed in place.
    """


class LayerNorm(Norm):
    """`(x − mean) / √(var + eps) · weight + bias`."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size))


class DyT(Norm):
    """Dynamic Tanh, `weight · tanh(alpha · x) + bias`. It has no statistics, so it does not fix a scale.

    Half-precision inputs are computed in half precision. alpha is one learned number and starts at 0.5. For placements
    that normalize only what a sublayer reads. Source: arXiv 2503.10622. Our reading: alpha starts at the same value
    everywhere; in the authors' language models it depends on width and place.
    """

    STARTS: ClassVar[dict[str, float]] = {"alpha": 0.5}
    bias: nn.Parameter

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps)
        self.alpha = nn.Parameter(torch.full((1,), self.STARTS["alpha"]))  # one element, which FSDP2 can shard
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def add_norm(self, x: Stream, f: Stream | None, *, return_sum: bool, **scales: Any) -> Any:
        total = x if f is None else scaled_add(x, f, **scales)
        w, b, alpha = (p.to(total.dtype) for p in (self.weight, self.bias, self.alpha))
        normed = torch.addcmul(b, w, torch.tanh(alpha * total))
        return (normed, total) if return_sum else normed


class Add(nn.Module):
    """`scaled_add` as a module without parameters, so that a probe can see the sums that no norm follows."""

    def forward(self, x: Stream, f: Stream, *, skip: Scale = 1.0, branch: Scale = 1.0) -> Stream:
        return scaled_add(x, f, skip=skip, branch=branch)

    if TYPE_CHECKING:
        __call__ = forward


NORMS: dict[str, type[Norm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "dyt": DyT}


def build_norm(name: str, hidden_size: int, eps: float = 1e-6, gain: float = 1.0) -> Norm:
    """A norm by name, `rmsnorm`, `layernorm` or `dyt`, with its initial gain."""
    norm = NORMS[one_of("norm", name, NORMS)](hidden_size, eps)
    nn.init.constant_(norm.weight, gain)
    return norm
