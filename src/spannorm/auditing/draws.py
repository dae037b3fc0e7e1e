"""How a new model's parameters are drawn: std by role, compared with common rules, and how it changes with depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spannorm.auditing.behaviour import Norms, strip
from spannorm.auditing.branches import Branch
from spannorm.auditing.ends import Ends
from spannorm.auditing.equation import WEIGHTED, parameters_of
from spannorm.auditing.trace import Trace

OUTPUTS = {"A": "attention-out", "M": "mixer-out", "F": "FFN-down"}
INPUTS = {"A": "attention-in", "M": "mixer-in", "F": "FFN-in"}
SENSE = 0.1
"""Exponents nearer to 0 than this count as 0."""


@dataclass(frozen=True)
class Row:
    """One matrix, for all blocks that have it."""

    role: str
    """`attention-out`, `FFN-down`, `mixer-out`, `attention-in` and so on, `inner`, `embedding`, `head`, `norm`, `bias`,
    `other`."""
    name: str
    """Its path, with `*` for the block's index."""
    shape: tuple[int, ...]
    fan_in: int | None
    std: float
    mean: float
    std_by_depth: Mapping[int, float]
    """Depth in blocks → std, if the model was built at several depths."""
    depth_exponent: float | None
    """p in std ∝ L^p; None if it was built at only one depth."""
    block_exponent: float | None
    """p in std ∝ (b+1)^p over the blocks of the deepest model."""
    rules: tuple[str, ...]
    """Common rules that give this std, within the sampling error."""

    @property
    def constant(self) -> bool:
        return self.std <= 1e-7 * max(1.0, abs(self.mean))


def pattern(name: str) -> str:
    """A parameter's name with `*` in place of the first index in it, which is the block's."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1)


def roles(branches: Iterable[tuple[Branch, str]], ends: Ends, norms: Norms, trace: Trace, width: int) -> dict[str, str]:
    """Parameter name → role, from its place in the trace."""
    found: dict[str, str] = {name: "embedding" for name in ends.embeddings}
    if ends.head:
        found.setdefault(ends.head, "head")
    for branch, letter in branches:
        for name in _writers(branch, width):
            found.setdefault(name, OUTPUTS[letter])
        for name in _readers(branch):
            found.setdefault(name, INPUTS[letter])
        for weight in branch.weights:
            if weight.value.ndim > 1:
                found.setdefault(weight.name, "inner")
    modules = {n.node.module for n in norms.all()}
    for node in trace.nodes:
        if node.op == "parameter" and node.name.rpartition(".")[0] in modules:
            found[node.name] = "norm"
    return found


def _writers(branch: Branch, width: int) -> set[str]:
    """The matrices that write a branch's output: going back from its end, the first ones with the stream's width."""
    stack, seen, found = [branch.node], set(), set()
    while stack:
        n = stack.pop()
        if n.index in seen or any(n is r for r in branch.reads):
            continue
        seen.add(n.index)
        own = [w.name for p in n.parents for w in parameters_of(p) if w.value.ndim > 1]
        if n.op in WEIGHTED and own:
            if n.shape[-1] == width or width in n.shape[-2:]:
                found |= set(own)
            continue
        stack += [p for p in n.parents if p.data]
    return found


def _readers(branch: Branch) -> set[str]:
    """The first matrices on a branch's input."""
    reads = {r.index for r in branch.reads}
    found: set[str] = set()
    stack, seen = [branch.node], set()
    while stack:
        n = stack.pop()
        if n.index in seen or n.index in reads:
            continue
        seen.add(n.index)
        own = [w.name for p in n.parents for w in parameters_of(p) if w.value.ndim > 1]
        if n.op in WEIGHTED and own:
            source = next((p for p in n.parents if p.data), None)
            while source is not None and source.index not in reads:
                norm_gain = source.op == "mul" and any(not p.data for p in source.parents)
                step = strip(source)
                if step is source and not norm_gain and source.op not in ("index", "slice", "index_select", "gather"):
                    break
                source = step if step is not source else next((p for p in source.parents if p.data), None)
            if source is not None and source.index in reads:
                found |= set(own)
        stack += [p for p in n.parents if p.data]
    return found


def fan_ins(trace: Trace) -> dict[str, int]:
    """Parameter name → fan-in, the length of a row."""
    found: dict[str, int] = {}
    for n in trace.nodes:
        if n.op not in WEIGHTED:
            continue
        sources = [p for p in n.parents if p.data]
        for p in n.parents:
            for w in parameters_of(p):
                if w.value.ndim < 2 or not w.name:
                    continue
                if n.op == "embedding":
                    found.setdefault(w.name, w.shape[-1])
                elif n.op == "convolution":
                    found.setdefault(w.name, math.prod(w.shape[1:]))
                elif sources:
                    found.setdefault(w.name, sources[0].shape[-1])
    return found


def _pooled(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, list[tuple[str, Tensor]]]:
    grouped: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in parameters:
        grouped.setdefault(pattern(name), []).append((name, p))
    return grouped


def _std(tensors: Sequence[Tensor]) -> tuple[float, float, int]:
    """Mean, std about each tensor's own mean, and number of elements."""
    flat = [t.detach().double().flatten() for t in tensors if t.numel()]
    n = sum(t.numel() for t in flat)
    mean = sum(float(t.sum()) for t in flat) / max(n, 1)
    if sum(len(t) > 1 for t in flat) == 0:
        return mean, 0.0, n
    square = sum(float((t - t.mean()).square().sum()) for t in flat) / max(n - len(flat), 1)
    return mean, math.sqrt(square), n


def draw_table(
    model: nn.Module,
    at_depths: Mapping[int, nn.Module],
    known: Mapping[str, str],
    fans: Mapping[str, int],
    config: Any,
    width: int,
    base: int,
) -> list[Row]:
    """The std of every matrix, and how it changes with depth.

    Args:
        model: the model that was traced.
        at_depths: number of blocks → model of the same width. They show what changes with depth.
        known: parameter name → role.
        fans: parameter name → fan-in, the same.
        config: for `initializer_range`; may be None.
        width: of the stream.
        base: number of blocks of the model that was traced.
    """
    by_depth = {depth: _pooled(other.named_parameters()) for depth, other in at_depths.items()}
    rows = []
    for name, tensors in _pooled(model.named_parameters()).items():
        mean, std, n = _std([t for _, t in tensors])
        role = next((known[full] for full, _ in tensors if full in known), "")
        shape = tuple(tensors[0][1].shape)
        if name.endswith("bias") or "_bias" in name.rpartition(".")[2]:
            role = "bias"
        role = role or "other"
        fan = next((fans[full] for full, _ in tensors if full in fans), None)
        stds = {d: _std([t for _, t in pooled[name]])[1] for d, pooled in sorted(by_depth.items()) if name in pooled}
        error = 1 / math.sqrt(2 * max(n, 2))
        exponent = _slope(list(stds.items())) if len(stds) > 1 and min(stds.values()) > 0 else None
        if exponent is not None and abs(exponent) < max(SENSE, 6 * error):
            exponent = 0.0
        deepest = by_depth[max(by_depth)].get(name, tensors)
        rules = _rules(std, shape, fan, width, base, config, error, exponent) if std > 0 and len(shape) > 1 else ()
        rows.append(Row(role, name, shape, fan, std, mean, stds, exponent, _by_block(deepest), rules))
    return rows


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Slope of ln std over ln x."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def _by_block(tensors: Sequence[tuple[str, Tensor]]) -> float | None:
    """Exponent of the block's index; None if it does not change, or with fewer than four blocks."""
    points = []
    for name, t in tensors:
        index = re.search(r"\.(\d+)(?=\.|$)", name)
        std = _std([t])[1]
        if index and std > 0 and t.ndim > 1:
            points.append((int(index[1]) + 1, std))
    if len(points) < 4 or len({x for x, _ in points}) < 4:
        return None
    slope = _slope(points)
    noise = 1 / math.sqrt(2 * tensors[0][1].numel())
    return slope if abs(slope) > max(2 * SENSE, 6 * noise) else None


_DEPTH_FACTORS = {
    "1/√(2L)": lambda L: (2 * L) ** -0.5,
    "1/√L": lambda L: L**-0.5,
    "1/L": lambda L: 1 / L,
    "(8L)^-1/4": lambda L: (8 * L) ** -0.25,
    "√10/L": lambda L: math.sqrt(10) / L,
}


def initializer_range(config: Any) -> float | None:
    """The std that a configuration gives."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("initializer_range", "init_std", "embed_init_std"):
        value = getattr(text, key, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def _rules(
    std: float, shape: tuple[int, ...], fan: int | None, width: int, depth: int, config: Any, error: float,
    exponent: float | None,
) -> tuple[str, ...]:  # fmt: skip
    fan_out = next((s for s in shape[-2:] if s != fan), shape[-1])
    bases: dict[str, float] = {}
    given = initializer_range(config)
    if given:
        bases[f"normal {given:g}"] = given
        bases[f"normal {given:g} cut at 2σ"] = 0.8796 * given
    if given != 0.02:
        bases["normal 0.02"] = 0.02
    bases["(2/5d)^½"] = math.sqrt(2 / (5 * width))
    if fan:
        bases |= {
            "1/√fan_in": fan**-0.5,
            "1/√(3 fan_in), PyTorch's default": (3 * fan) ** -0.5,
            "Xavier": math.sqrt(2 / (fan + fan_out)),
        }
    bases |= {"N(0, 1), PyTorch's default of an embedding": 1.0, "1/√d": width**-0.5}
    factors: dict[str, float] = {"": 1.0}
    if exponent is None or exponent < 0:
        factors |= {f" × {name}": f(depth) for name, f in _DEPTH_FACTORS.items()}
        if exponent is not None:
            del factors[""]
    tolerance = max(0.02, 4 * error)
    hits = [
        (abs(math.log(std / (base * factor))), f"{name}{words}")
        for name, base in bases.items()
        for words, factor in factors.items()
        if abs(math.log(std / (base * factor))) < tolerance
    ]
    plain = [h for h in hits if " × " not in h[1]]
    return tuple(name for _, name in sorted(plain or hits)[:2])


def looks_trained(model: nn.Module) -> bool:
    """Whether weights came from a checkpoint: Transformers marks them, and trained gains are not all equal."""
    parameters = list(model.named_parameters())
    if getattr(model, "name_or_path", "") and any(getattr(p, "_is_hf_initialized", None) for _, p in parameters):
        return True
    gains = [p for n, p in parameters if p.ndim == 1 and "norm" in n.lower() and n.endswith("weight") and p.numel() > 1]
    with torch.no_grad():
        return bool(gains) and sum(float(g.float().std()) > 1e-3 for g in gains) > len(gains) / 2
