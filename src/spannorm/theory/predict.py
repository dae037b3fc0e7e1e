"""A whole stack: what the theory says of a placement, a depth rule and a depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from spannorm.placements import Stack
from spannorm.scaling import Branch
from spannorm.theory.body import Body
from spannorm.theory.kernel import Array, Kernel, cross, normalized
from spannorm.theory.recursion import Kernels, Walk

EXACT = 256
"""Blocks that are worked out one by one; deeper down, where little changes from block to block, a stretch of
b/`STRETCH` blocks is worked out as two and continued as a geometric series."""
STRETCH = 14

PATHS: Mapping[str, tuple[Branch, ...]] = {
    "total": (), "skip": ("attn", "ffn"), "without attention": ("attn",), "without ffn": ("ffn",),
}  # fmt: skip
"""The gradients that are followed down the stack, and the branches that each does not pass."""


@dataclass(frozen=True)
class Prediction:
    """The theory of one stack at initialization. Lists run over blocks; gains are amplitudes from output to input."""

    placement: str
    depth_rule: str
    num_layers: int
    blocks: tuple[int, ...]
    """The blocks that were worked out: all of them up to `EXACT`."""
    variance: Mapping[str, tuple[float, ...]]
    """Mean square over tokens and channels at each site: what the norm of that name reads, and `output`, what leaves
    the block. NaN where a block has no such norm."""
    correlation: tuple[float, ...]
    """Cosine between two tokens of a sequence in what leaves the block."""
    attention_share: tuple[float, ...]
    """Share of the gradient's power at the block's input that passed through attention."""
    ffn_share: tuple[float, ...]
    """The like share of the feed-forward."""
    log_gradient: tuple[float, ...]
    """ln of the gradient's RMS at the block's input, over that at the stack's output. Of several streams it is the
    gradient of a push on all at once."""
    log_skip_gain: float
    """ln of the whole stack's gain with both branches' outputs detached."""
    log_total_gain: float
    """ln of the whole stack's true gain."""
    total_attention_share: float
    """Share of the gradient's power at the embedding that passed through any attention."""
    total_ffn_share: float
    """The like share of the feed-forwards."""


def predict(
    placement: str, num_layers: int, *, depth_rule: str | None = None, body: Body | None = None, **options: Any
) -> Prediction:
    """Variance, correlation and gradient of a stack at initialization, without building it.

    Args:
        placement: a name of `spannorm.PLACEMENTS`, registered ones included.
        num_layers: blocks.
        depth_rule: a name of `spannorm.depth_rule`; None means the placement's default.
        body: sizes of the sublayers and how they are drawn.
        options: the placement's own, such as SpanNorm's `initial_norm`.

    Raises:
        InputError: an unknown placement, rule or option.
        NoRule: an operation of the placement that the theory cannot follow; the message names it.
    """
    body = body or Body()
    stack = Stack(placement, num_layers, depth_rule, options, body.norm)
    given = tuple(sorted(options.items()))
    if body.base_init == "tiny":  # the one base init that knows the depth
        body = replace(body, num_layers=num_layers)
    return _predict(stack.kind, placement, num_layers, str(stack.depth_rule), body, given)


@cache
def _predict(
    kind: type, placement: str, num_layers: int, depth_rule: str, body: Body, options: tuple[tuple[str, Any], ...]
) -> Prediction:
    stack = Stack(placement, num_layers, depth_rule, dict(options), body.norm)
    embedding = normalized(body.embedding())[0] if stack.embedding_norm else body.embedding()
    alternating = body.num_experts > 0 and body.decoder_sparse_step > 1  # no geometric series
    # up: each stretch of blocks as its first one, and the streams as a geometric series from its first two
    stretches: list[tuple[Walk, int, Kernels]] = []
    stops = sorted({1, num_layers - 1, num_layers, *stack.kinds})
    index, streams, since = 0, {(0, 0): embedding}, 0
    while index < num_layers:
        stop = next(s for s in stops if s > index)
        length = 1 if num_layers <= EXACT or alternating else max(1, min(since, (stop - index) // 2) // STRETCH)
        block = Walk(body, stack, index, streams)
        leaving = block.leaving
        if length > 1 and leaving.keys() == streams.keys():
            third = Walk(body, stack, index + 1, leaving).leaving
            leaving = _continued(streams, leaving, third, length) if length > 2 else third
        else:
            length = 1
        stretches.append((block, length, leaving))
        index, streams = index + length, leaving
        since = 0 if index == stop else since + length

    # down: the gradient's kernels alike, their scale kept apart as a logarithm
    logs = dict.fromkeys(PATHS, 0.0)
    rates: dict[str, float] = {}
    kernels: dict[str, Kernels] = {path: {(0, 0): body.coincidence()} for path in PATHS}
    gradient, shares = [], []
    for block, length, _ in reversed(stretches):
        arriving = kernels["total"]
        passed = block.backward(arriving)
        power = _meeting(passed, body)
        shares.append([1 - _meeting(block.backward(arriving, (b,)), body) / power for b in ("attn", "ffn")])
        for path in PATHS:
            first = passed if path == "total" else block.backward(kernels[path], PATHS[path])
            logs[path] += _descend(block, kernels, path, first, length, rates, body)
        gradient.append(logs["total"] + 0.5 * math.log(_meeting(kernels["total"], body)))
    at_embedding = {path: logs[path] + 0.5 * math.log(_meeting(kernels[path], body)) for path in PATHS}

    names = dict.fromkeys(name for block, _, _ in stretches for name in block.sites)
    shares.reverse()
    return Prediction(
        placement=placement,
        depth_rule=depth_rule,
        num_layers=num_layers,
        blocks=tuple(block.layer_idx for block, _, _ in stretches),
        variance={name: tuple(block.sites.get(name, math.nan) for block, _, _ in stretches) for name in names},
        correlation=tuple(_correlation(leaving, body) for _, _, leaving in stretches),
        attention_share=tuple(attention for attention, _ in shares),
        ffn_share=tuple(ffn for _, ffn in shares),
        log_gradient=tuple(reversed(gradient)),
        log_skip_gain=at_embedding["skip"],
        log_total_gain=at_embedding["total"],
        total_attention_share=-math.expm1(2 * (at_embedding["without attention"] - at_embedding["total"])),
        total_ffn_share=-math.expm1(2 * (at_embedding["without ffn"] - at_embedding["total"])),
    )


clear = _predict.cache_clear
"""Forget every prediction made so far."""


def _continued(first: Kernels, second: Kernels, third: Kernels, steps: int) -> Kernels:
    """Where a sequence of kernels stands after `steps` steps, continued from its first three as a geometric series:
    the logarithm of the powers, and the correlations."""
    (powers, shapes) = zip(*(_split(k) for k in (first, second, third)), strict=True)
    power = {i: np.exp(k) for i, k in _series(powers, steps).items()}
    shape = _series(shapes, steps)
    return {(i, j): np.clip(k, -1, 1) * cross(power[i], power[j]) for (i, j), k in shape.items()}


def _split(kernels: Kernels) -> tuple[dict[int, Array], Kernels]:
    """Each stream's ln √power by position, and the correlations."""
    std = {i: np.sqrt(np.maximum(k[0], 1e-300)) for (i, j), k in kernels.items() if i == j}
    return {i: np.log(s) for i, s in std.items()}, {(i, j): k / cross(std[i], std[j]) for (i, j), k in kernels.items()}


def _series(terms: Sequence[dict[Any, Array]], steps: int) -> dict[Any, Array]:
    """Each sequence's term number `steps`, from its terms 0, 1, 2."""
    ends = {}
    for key, first in terms[0].items():
        second, third = terms[1][key], terms[2][key]
        change, again = second - first, third - second
        size = float((change * change).sum())
        ratio = min(max(float((change * again).sum()) / size, 0.0), 1.0) if size > 0 else 0.0
        more = steps - 2 if ratio == 1.0 else ratio * (1 - ratio ** (steps - 2)) / (1 - ratio)
        ends[key] = third + more * again
    return ends


def _descend(
    block: Walk,
    kernels: dict[str, Kernels],
    path: str,
    first: Kernels,
    length: int,
    rates: dict[str, float],
    body: Body,
) -> float:
    """Bring a path's gradient `length` blocks further down, of which `first` is what one block makes of it; the
    logarithm of what it gains.

    In a long stretch the gain per block runs evenly from this block's to that of the block above the stretch.
    """
    start = kernels[path]
    gain, scaled = _scaled(first, body)
    gains, below = [gain], [start, scaled]
    if length > 1:
        gain, scaled = _scaled(block.backward(scaled, PATHS[path]), body)
        gains.append(gain)
        below.append(scaled)
    rate_above = rates.get(path, gains[-1])
    rates[path] = gains[-1]
    if length <= 2:
        kernels[path] = below[-1]
        return sum(gains)
    kernels[path] = _scaled(_continued(start, below[1], below[2], length), body)[1]
    return length * (gains[-1] + rate_above) / 2


def _scaled(kernels: Kernels, body: Body) -> tuple[float, Kernels]:
    power = _power(kernels, body)
    return 0.5 * math.log(power), {pair: k / power for pair, k in kernels.items()}


def _power(kernels: Kernels, body: Body) -> float:
    """Mean square over tokens, of all streams together."""
    return sum(body.positions.mean(k[0]) for (i, j), k in kernels.items() if i == j)


def _meeting(kernels: Kernels, body: Body) -> float:
    """Power of the gradient of a push on all streams at once, as the embedding gives it."""
    return body.positions.mean(sum(kernels.values(), np.zeros(1))[0])


def _correlation(streams: Kernels, body: Body) -> float:
    total: Kernel = sum(streams.values(), np.zeros(1))
    weight = body.positions.weight
    return float(weight @ normalized(total)[0][1:] @ weight)
