"""A whole stack: what the theory predicts for a placement, a depth rule and a depth."""

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
from spannorm.theory.covariance import Array, Covariance, cross, normalized
from spannorm.theory.recursion import Covariances, Walk

EXACT = 256
"""Up to this depth every block is computed. In deeper stacks little changes from block to block: a stretch of
b/`STRETCH` blocks is computed from two of them, and continued as a geometric series."""
STRETCH = 14

PATHS: Mapping[str, tuple[Branch, ...]] = {
    "total": (), "skip": ("attn", "ffn"), "without attention": ("attn",), "without ffn": ("ffn",),
}  # fmt: skip
"""The gradients that are followed from output to input, and the branches through which each does not pass."""


@dataclass(frozen=True)
class Prediction:
    """The theory of one stack at initialization. Lists run over blocks; gains are amplitudes from output to input."""

    placement: str
    depth_rule: str
    num_layers: int
    blocks: tuple[int, ...]
    """The blocks that were computed: all of them in a stack of at most `EXACT` blocks."""
    variance: Mapping[str, tuple[float, ...]]
    """Mean square over tokens and channels: of the input of each norm, by its name, and of the block's output
    (`output`). NaN if a block has no such norm."""
    correlation: tuple[float, ...]
    """Cosine between two tokens of a sequence in the block's output."""
    attention_share: tuple[float, ...]
    """Share of the gradient's power at the block's input that passed through attention."""
    ffn_share: tuple[float, ...]
    """The same share for the feed-forward."""
    log_gradient: tuple[float, ...]
    """ln of the gradient's RMS at the block's input, divided by that at the stack's output. With several streams: the
    gradient with respect to a change that is added to all streams at once."""
    log_skip: tuple[float, ...]
    """The same logarithm with both branches' outputs detached: what the skip path alone carries."""
    log_skip_gain: float
    """ln of the whole stack's gain with both branches' outputs detached."""
    log_total_gain: float
    """ln of the whole stack's true gain."""
    total_attention_share: float
    """Share of the gradient's power at the embedding that passed through any attention."""
    total_ffn_share: float
    """The same share for the feed-forwards."""


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
    stretches = _forward(Stack(placement, num_layers, depth_rule, dict(options), body.norm), body)
    gradient, skip, shares, log_gain = _backward(stretches, body)
    names = dict.fromkeys(name for block, _, _ in stretches for name in block.sites)
    return Prediction(
        placement=placement,
        depth_rule=depth_rule,
        num_layers=num_layers,
        blocks=tuple(block.layer_idx for block, _, _ in stretches),
        variance={name: tuple(block.sites.get(name, math.nan) for block, _, _ in stretches) for name in names},
        correlation=tuple(_correlation(leaving, body) for _, _, leaving in stretches),
        attention_share=tuple(attention for attention, _ in shares),
        ffn_share=tuple(ffn for _, ffn in shares),
        log_gradient=tuple(gradient),
        log_skip=tuple(skip),
        log_skip_gain=log_gain["skip"],
        log_total_gain=log_gain["total"],
        total_attention_share=-math.expm1(2 * (log_gain["without attention"] - log_gain["total"])),
        total_ffn_share=-math.expm1(2 * (log_gain["without ffn"] - log_gain["total"])),
    )


clear = _predict.cache_clear
"""Forget every prediction made so far."""


Stretch = tuple[Walk, int, Covariances]
"""The first of some successive blocks, their number, and the covariances of the streams that leave the last of them."""


def _forward(stack: Stack, body: Body) -> list[Stretch]:
    """Follow the signal from the embedding to the stack's output, by stretches of blocks.

    A stretch is computed at its first two blocks; from there the streams go on as a geometric series.
    """
    num_layers = stack.num_layers
    embedding = normalized(body.embedding())[0] if stack.embedding_norm else body.embedding()
    alternating = body.num_experts > 0 and body.decoder_sparse_step > 1  # no geometric series
    stretches: list[Stretch] = []
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
    return stretches


def _backward(
    stretches: list[Stretch], body: Body
) -> tuple[list[float], list[float], list[tuple[float, float]], dict[str, float]]:
    """Follow the gradient from the stack's output to the embedding. Its scale is kept apart, as a logarithm.

    Returns:
        ln of the gradient at the input of each stretch, first to last; the same of the skip path alone; the shares of
        attention and of the feed-forward there; ln of the gain from end to end by path.
    """
    logs = dict.fromkeys(PATHS, 0.0)
    rates: dict[str, float] = {}
    covariances: dict[str, Covariances] = {path: {(0, 0): body.coincidence()} for path in PATHS}
    gradient: list[float] = []
    skip: list[float] = []
    shares: list[tuple[float, float]] = []

    def at_input(path: str) -> float:
        return logs[path] + 0.5 * math.log(_meeting(covariances[path], body))

    for block, length, _ in reversed(stretches):
        arriving = covariances["total"]
        passed = block.backward(arriving)
        power = _meeting(passed, body)
        attention, ffn = (1 - _meeting(block.backward(arriving, (b,)), body) / power for b in ("attn", "ffn"))
        shares.append((attention, ffn))
        for path in PATHS:
            first = passed if path == "total" else block.backward(covariances[path], PATHS[path])
            logs[path] += _descend(block, covariances, path, first, length, rates, body)
        gradient.append(at_input("total"))
        skip.append(at_input("skip"))
    return gradient[::-1], skip[::-1], shares[::-1], {path: at_input(path) for path in PATHS}


def _continued(first: Covariances, second: Covariances, third: Covariances, steps: int) -> Covariances:
    """A sequence of covariances after `steps` steps, from its first three terms.

    The logarithms of the powers, and the correlations, continue as geometric series."""
    (powers, shapes) = zip(*(_split(k) for k in (first, second, third)), strict=True)
    power = {i: np.exp(k) for i, k in _series(powers, steps).items()}
    shape = _series(shapes, steps)
    return {(i, j): np.clip(k, -1, 1) * cross(power[i], power[j]) for (i, j), k in shape.items()}


def _split(covariances: Covariances) -> tuple[dict[int, Array], Covariances]:
    """Each stream's ln √power by position, and the correlations."""
    std = {i: np.sqrt(np.maximum(k[0], 1e-300)) for (i, j), k in covariances.items() if i == j}
    correlations = {(i, j): k / cross(std[i], std[j]) for (i, j), k in covariances.items()}
    return {i: np.log(s) for i, s in std.items()}, correlations


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
    covariances: dict[str, Covariances],
    path: str,
    first: Covariances,
    length: int,
    rates: dict[str, float],
    body: Body,
) -> float:
    """Move a path's gradient `length` blocks towards the input; `first` is that gradient after one of them. Returns the
    logarithm of its gain.

    In a long stretch the gain per block changes linearly, from this block's to that of the block above the stretch.
    """
    start = covariances[path]
    gain, scaled = _scaled(first, body)
    gains, below = [gain], [start, scaled]
    if length > 1:
        gain, scaled = _scaled(block.backward(scaled, PATHS[path]), body)
        gains.append(gain)
        below.append(scaled)
    rate_above = rates.get(path, gains[-1])
    rates[path] = gains[-1]
    if length <= 2:
        covariances[path] = below[-1]
        return sum(gains)
    covariances[path] = _scaled(_continued(start, below[1], below[2], length), body)[1]
    return length * (gains[-1] + rate_above) / 2


def _scaled(covariances: Covariances, body: Body) -> tuple[float, Covariances]:
    power = _power(covariances, body)
    return 0.5 * math.log(power), {pair: k / power for pair, k in covariances.items()}


def _power(covariances: Covariances, body: Body) -> float:
    """Mean square over tokens, of all streams together."""
    return sum(body.positions.mean(k[0]) for (i, j), k in covariances.items() if i == j)


def _meeting(covariances: Covariances, body: Body) -> float:
    """Power of the gradient with respect to a change that is added to all streams at once, as the embedding's is."""
    return body.positions.mean(sum(covariances.values(), np.zeros(1))[0])


def _correlation(streams: Covariances, body: Body) -> float:
    total: Covariance = sum(streams.values(), np.zeros(1))
    weight = body.positions.weight
    return float(weight @ normalized(total)[0][1:] @ weight)
