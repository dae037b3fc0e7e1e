"""The norms of a model: kind, ε, how the gain is used, in which precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spannorm.auditing.behaviour import FUSED, Norm, epsilon, gain_convention, strip
from spannorm.auditing.draws import pattern
from spannorm.auditing.trace import Trace


@dataclass(frozen=True)
class NormFacts:
    """Norms of one name in all blocks."""

    name: str
    """Module's path, with `*` for the block's index."""
    kind: str
    epsilon: float | None
    gain: str
    """`w`, `1 + w`, or `none`."""
    fp32: bool | None
    """Whether statistics are computed in fp32 if the model is in bf16; None if that could not be tested."""
    count: int
    size: int


def norm_facts(model: nn.Module, trace: Trace, norms: Sequence[Norm]) -> list[NormFacts]:
    """One entry per norm, for all blocks together. ε and precision are tested on the first norm of each name."""
    grouped: dict[tuple[str, str, int], list[Norm]] = {}
    for norm in sorted(norms, key=lambda n: n.node.index):
        key = pattern(norm.node.module) or "a function", norm.kind, norm.size
        grouped.setdefault(key, []).append(norm)
    return [
        NormFacts(name, found[0].kind, _rounded(epsilon(found[0])), _gain(trace, found[0]), _fp32(model, found[0]),
                  len({n.node.module for n in found}), found[0].size)
        for (name, _, _), found in grouped.items()
    ]  # fmt: skip


def _rounded(value: float | None) -> float | None:
    """Rounded to two digits, because ε is computed from fp32 outputs."""
    return None if value is None else float(f"{value:.1e}")


def _gain(trace: Trace, norm: Norm) -> str:
    if norm.node.op in FUSED and len(norm.node.args) > 2 and norm.node.args[2] is not None:
        weight = norm.node.args[2] if norm.node.op == "native_layer_norm" else None
        return gain_convention(weight)[0] if weight is not None else "w"
    for n in trace.nodes[norm.node.index + 1 : norm.node.index + 20]:
        if n.op == "mul" and any(p.data and strip(p) is norm.node for p in n.parents):
            factor = next((p for p in n.parents if not p.data), None)
            if factor is not None and factor.value.numel() > 1:
                return gain_convention(factor)[0]
    return "none"


def _fp32(model: nn.Module, norm: Norm) -> bool | None:
    """Run a copy of the norm's module in bf16, and look at the input of its statistics."""
    if norm.node.op in FUSED:
        return True  # these kernels sum in fp32
    try:
        module = model.get_submodule(norm.node.module)
        if any(True for _ in module.children()) or norm.node.module == "":
            return None
        half = copy.deepcopy(module).to(torch.bfloat16)
        x = norm.input.value.to(torch.bfloat16)
        with torch.no_grad(), Trace(half, (x,)) as trace:
            half(x)
        kinds = {
            n.parents[0].value.dtype
            for n in trace.nodes
            if n.op in ("mean", "sum", "var", "linalg_vector_norm", "var_mean")
        }
        return None if not kinds else kinds == {torch.float32}
    except Exception:  # a stranger's module may want anything
        return None
