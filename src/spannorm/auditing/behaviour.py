"""Norms, recognized by their behaviour: if their input is scaled, their output does not change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spannorm.auditing.trace import CannotReplay, Node, replay

FUSED: Mapping[str, str] = {
    "native_layer_norm": "LayerNorm", "_fused_rms_norm": "RMSNorm", "native_group_norm": "GroupNorm",
    "_native_batch_norm_legit_no_training": "BatchNorm", "native_batch_norm": "BatchNorm",
    "cudnn_batch_norm": "BatchNorm", "layer_norm": "LayerNorm", "rms_norm": "RMSNorm",
}  # fmt: skip
SMALLEST = 8
"""The least number of channels of a norm. With fewer, weights that add up to 1 (such as a router's) look like one."""
_STATISTICS = {"mean", "sum", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm", "amax", "max"}
_WEIGHTED = {"mm", "addmm", "bmm", "sigmoid", "convolution", "_softmax"}
SAME = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "clone", "contiguous", "_to_copy",
    "alias", "detach", "transpose", "permute", "lift_fresh", "expand", "to", "unflatten", "flatten", "swapaxes",
    "movedim", "copy",
}  # fmt: skip
"""Operations that return their input unchanged."""


@dataclass(frozen=True)
class Norm:
    """One norm that was found."""

    node: Node
    """Its output, before a gain that is not fused with it."""
    input: Node
    kind: str
    """LayerNorm, RMSNorm, GroupNorm, BatchNorm, or L2 if the output has unit length."""
    size: int
    """Channels that are normalized together."""


class Norms:
    """The norms of a trace. Each is tested once."""

    def __init__(self) -> None:
        self._known: dict[int, Norm | None] = {}

    def at(self, node: Node) -> Norm | None:
        """The norm whose output a node is, or None."""
        if node.index not in self._known:
            self._known[node.index] = _find(node)
        return self._known[node.index]

    def all(self) -> list[Norm]:
        """Those found so far."""
        return [n for n in self._known.values() if n is not None]


def strip(node: Node) -> Node:
    """The source of a view, a copy or a cast."""
    while node.op in SAME and node.parents:
        node = node.parents[0]
    return node


def _find(node: Node) -> Norm | None:
    if not node.data or not node.parents:
        return None
    if node.op in FUSED:
        if node.item not in (0, None):
            return None
        given = node.parents[0]
        shape = node.args[1] if node.op in ("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm") else None
        size = math.prod(shape) if isinstance(shape, (list, tuple)) else given.shape[1]
        return Norm(node, given, FUSED[node.op], size)
    if node.op not in ("mul", "div") or len(node.args) < 2:
        return None
    a, b = node.args[:2]
    for x, s in ((a, b), (b, a)):
        if not (isinstance(x, Node) and isinstance(s, Node) and x.data and s.data):
            return None
        small = s
        while small.op in ("expand", "_to_copy", "clone") and small.parents:
            small = small.parents[0]
        if x.shape[-1] < SMALLEST or small.value.numel() >= x.value.numel() or small.shape[-1:] != (1,):
            continue
        given = strip(x)
        if given.op == "sub" and len(given.parents) == 2 and _statistic_of(given.parents[1], strip(given.parents[0])):
            given = strip(given.parents[0])
        if _statistic_of(small, given) and _does_not_feel_scale(node, given):
            return Norm(node, given, _kind(node), x.shape[-1])
    return None


def _statistic_of(s: Node, x: Node) -> bool:
    """Whether s is computed from x through a reduction, in a few steps without weights."""
    stack, seen = [(s, False, 0)], set()
    while stack:
        node, reduced, steps = stack.pop()
        if node is x and reduced:
            return True
        if (node.index, reduced) in seen or node.index <= x.index or steps > 12 or node.op in _WEIGHTED:
            continue
        seen.add((node.index, reduced))
        stack += [(p, reduced or node.op in _STATISTICS, steps + 1) for p in node.parents]
    return False


def _does_not_feel_scale(node: Node, given: Node) -> bool:
    rms = given.value.float().square().mean().sqrt().item()
    if not (math.isfinite(rms) and rms > 0):
        return False
    try:
        one, three = (replay(node, {given: given.value * (k / rms)}) for k in (10.0, 30.0))
    except CannotReplay:
        return False
    size = one.float().abs().max()
    return bool((one - three).abs().max() <= 2e-2 * size and size > 0)


def _kind(node: Node) -> str:
    y = node.value.float()
    rms = y.square().mean(-1).sqrt()
    centred = bool(y.mean(-1).abs().max() < 1e-3 * rms.max()) and y.shape[-1] > 2
    if not centred and bool((y.norm(dim=-1) - 1).abs().max() < 0.05) and y.shape[-1] > 2:
        return "L2"
    return "LayerNorm" if centred else "RMSNorm"


def epsilon(norm: Norm) -> float | None:
    """ε, measured with inputs so small that ε makes the output smaller. None if this cannot be tested.

    With a mean square (or variance) t² per token, the output is r = t/√(t² + ε) times its usual size.
    """
    x = norm.input.value.double()
    if norm.kind in ("GroupNorm", "BatchNorm"):
        return None
    grouped = x.reshape(*x.shape[:-1], -1, norm.size) if x.shape[-1] % norm.size == 0 else x
    if norm.kind == "LayerNorm":
        grouped = grouped - grouped.mean(-1, keepdim=True)
    length = grouped.norm(dim=-1, keepdim=True) if norm.kind == "L2" else grouped.square().mean(-1, keepdim=True).sqrt()
    unit = (grouped / length.clamp_min(1e-30)).reshape(x.shape).to(norm.input.value.dtype)
    bias = _zero_bias(norm)

    def size(t: float) -> float:
        return replay(norm.node, {norm.input: unit * t, **bias}).double().norm().item()

    try:
        full = size(1e3)
        for t in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            share = size(t) / full if full else math.nan
            if norm.kind == "L2" and share < 0.95:
                return t / share
            if 0.05 < share < 0.95:
                return t * t * (1 / share**2 - 1)
    except CannotReplay:
        return None
    return 0.0


def _zero_bias(norm: Norm) -> dict[Node, Tensor]:
    bias = norm.node.args[3] if norm.node.op == "native_layer_norm" and len(norm.node.args) > 3 else None
    return {bias: torch.zeros_like(bias.value)} if isinstance(bias, Node) else {}


def gain_convention(factor: Node) -> tuple[str, Node | None]:
    """How a learned gain is used, `w` or `1 + w`, and its parameter. The factor at w = 0 tells which."""
    leaf = factor
    while leaf.op != "parameter" and leaf.parents:
        leaf = next((p for p in leaf.parents if p.op == "parameter" or p.parents), leaf.parents[0])
    if leaf.op != "parameter":
        return "constant", None
    try:
        at_zero = replay(factor, {leaf: torch.zeros_like(leaf.value)}).float()
    except CannotReplay:
        return "w", leaf
    if bool((at_zero - 1).abs().max() < 1e-3):
        return "1 + w", leaf
    return ("w" if bool(at_zero.abs().max() < 1e-3) else "of w"), leaf
