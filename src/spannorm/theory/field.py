"""A field of tokens as a tensor, so that a placement's own equation can run on it.

A field is a linear combination of *leaves*. The leaves are the streams that enter a block and the outputs of its
branches, which are independent of everything before because their weights are fresh. A `Field` holds the coefficients:
its shape is (2 × leaves, positions, …, 1) where a model has (batch, seq, …, hidden). Except in norms, a placement's
operations are linear and the same for all channels. So PyTorch can apply them to the coefficients instead of the state.
The first half of the batch holds the coefficients of the values. The second half holds those of the gradients; `detach`
sets them to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spannorm.errors import InputError


class NoRule(InputError):
    """The theory cannot follow an operation of a placement. A model of that placement can still be measured."""


class Field(Tensor):
    """Coefficients of a field. An operation raises `NoRule` if `RULES` does not allow it with these arguments."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name == "__get__":  # an attribute
            name = func.__self__.__name__
        with torch._C.DisableTorchFunctionSubclass():
            try:
                allowed = name in RULES and RULES[name](args, kwargs)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # no rule reads this call
                allowed = False
            if not allowed:
                raise NoRule(f"the theory has no rule for the operation {name!r} as it is used there")
            if name == "detach":
                value, slope = args[0].chunk(2)
                return torch.cat((value, torch.zeros_like(slope))).as_subclass(cls)
            result = func(*args, **kwargs)
            if name in _FACTS or (name in _PRODUCTS and _vanishes(args)):
                return result
            like = next(a for a in _flat(args) if isinstance(a, Field)).shape
            outs = [result] if isinstance(result, Tensor) else list(result)
            if any((o.shape[:2], o.shape[-1]) != (like[:2], like[-1]) for o in outs):
                raise NoRule(f"the theory has no rule for the operation {name!r} over tokens or channels")
            fields = [o.as_subclass(cls) for o in outs]
        return fields[0] if isinstance(result, Tensor) else tuple(fields)


Rule = Callable[[tuple[Any, ...], Mapping[str, Any]], bool]


def _flat(args: Any) -> list[Any]:
    return [a for arg in args for a in (_flat(arg) if isinstance(arg, (tuple, list)) else [arg])]


def _fields(*args: Any) -> int:
    return sum(isinstance(a, Field) for a in _flat(args))


def _vanishes(args: Any) -> bool:
    """Whether a factor of a product is zero everywhere, such as a projection that starts at 0.

    Then the product is zero too, whatever it sums over, and is a constant."""
    return any(isinstance(a, Tensor) and not a.any() for a in _flat(args))


def _linear(args: Any, kwargs: Any) -> bool:
    """Every term is a field, or zero."""
    return all(isinstance(a, Field) or not torch.as_tensor(a).any() for a in _flat(args[:2]))


def _over_streams(args: Any, kwargs: Any) -> bool:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    axes = {d % args[0].ndim for d in _flat([dims])} if dims is not None else {0}
    return axes <= set(range(2, args[0].ndim - 1))


def _alike(args: Any) -> bool:
    """Whether every factor except the field is the same for all tokens."""
    like = next(a for a in args if isinstance(a, Field)).shape
    for a in args:
        if isinstance(a, Tensor) and not isinstance(a, Field) and a.numel() > 1:
            whole = a.expand(torch.broadcast_shapes(a.shape, like))
            if not (whole == whole[:1, :1]).all():
                return False
    return True


def _product(args: Any, kwargs: Any) -> bool:
    return _fields(args) == 1 and _alike(args)


def _einsum(args: Any, kwargs: Any) -> bool:
    """The field's letters for batch, tokens and channels keep their places, and no factor differs between tokens; or a
    factor is zero everywhere."""
    terms, _, out = args[0].replace(" ", "").partition("->")
    operands = _flat(args[1:])
    if _fields(operands) != 1 or _vanishes(operands):
        return _fields(operands) == 1
    ((own, _),) = (pair for pair in zip(terms.split(","), operands, strict=True) if isinstance(pair[1], Field))
    for term, factor in zip(terms.split(","), operands, strict=True):
        by_token = not isinstance(factor, Field) and own[1] in term
        if by_token and not (term[:2] == own[:2] and (factor == factor[:1, :1]).all()):
            return False
    return "." not in terms and out[:2] == own[:2] and out[-1] == own[-1]


def _index(args: Any, kwargs: Any) -> bool:
    """`x[..., i, :]` or `x[:, :, i]`: the index chooses streams and nothing else."""
    index, whole = args[1], slice(None)
    if not isinstance(index, tuple) or any(i is None for i in index):
        return False
    if index[0] is Ellipsis:
        return index[-1] == whole and len(index) <= args[0].ndim - 1
    return len(index) in (2, 3) and index[:2] == (whole, whole) and args[0].ndim == 4


def _mixing(args: Any, kwargs: Any) -> bool:
    """A matrix on the left mixes streams. A matrix on the right mixes channels, and must be zero."""
    return _fields(args) == 1 and (_vanishes(args[1:]) if isinstance(args[0], Field) else args[1].ndim == 4)


def _always(args: Any, kwargs: Any) -> bool:
    return True


_FACTS = ("shape", "ndim", "dim", "size", "dtype", "device", "requires_grad", "is_cuda", "is_meta")
_PRODUCTS = ("einsum", "matmul", "linear")
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("add", "sub", "__radd__", "__rsub__"), _linear),
    **dict.fromkeys(("sum", "mean", "unbind", "chunk", "select"), _over_streams),
    **dict.fromkeys(("mul", "__rmul__"), _product),
    "einsum": _einsum,
    "__getitem__": _index,
    **dict.fromkeys(("matmul", "__rmatmul__", "linear"), _mixing),
    "div": lambda args, kwargs: _fields(args[1:]) == 0 and _alike(args),
    "addcmul": lambda args, kwargs: _linear(args[:1], {}) and _product(args[1:], {}),
    "stack": lambda args, kwargs: _linear([args[0]], {}),
    "cat": lambda args, kwargs: _linear([args[0]], {}),
    **dict.fromkeys(("neg", "detach", "unsqueeze", "squeeze", "expand", "contiguous", "clone"), _always),
    **dict.fromkeys(_FACTS, _always),
}
"""Operation → whether the theory can follow it with these arguments."""
