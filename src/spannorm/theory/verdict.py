"""What a prediction means, in words computed from its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from spannorm.placements import PLACEMENTS
from spannorm.theory.body import Body
from spannorm.theory.predict import Prediction, predict

FACTOR = 2.0
"""A stack keeps its gradient if the gradients at input and output differ by at most this factor."""

Kind = Literal["keeps", "grows", "shrinks", "explodes", "decays"]


@dataclass(frozen=True)
class Verdict:
    """How a stack's gradient changes from its output to its input at initialization."""

    kind: Kind
    """`keeps`: at most a factor 2 from end to end. `grows`, `shrinks`: more than that, and slower than exponentially in
    depth. `explodes`, `decays`: exponentially."""
    from_depth: int | None
    """The least depth at which the placement under this rule exceeds the factor 2; None if this stack keeps it."""
    words: str


def verdict(p: Prediction, body: Body | None = None, **options: Any) -> Verdict:
    """Judge a prediction. `body` and `options` must be those of the prediction.

    Exponential means: at twice the depth, the logarithm is at least 1.6 times as large.
    """
    gain = p.log_total_gain
    if abs(gain) <= math.log(FACTOR):
        return Verdict("keeps", None, f"keeps the gradient within a factor {FACTOR:g} ({times(gain)}){_skip(p)}")

    def log_gain(depth: int) -> float:
        return predict(p.placement, depth, depth_rule=p.depth_rule, body=body, **options).log_total_gain

    fast = p.num_layers >= 4 and abs(gain) >= 1.6 * abs(log_gain(p.num_layers // 2))
    kind: Kind = ("explodes" if fast else "grows") if gain > 0 else ("decays" if fast else "shrinks")
    keeps, exceeds = 0, p.num_layers  # depths
    while exceeds - keeps > 1:
        middle = (keeps + exceeds) // 2
        keeps, exceeds = (keeps, middle) if abs(log_gain(middle)) > math.log(FACTOR) else (middle, exceeds)
    depth = f"{exceeds} block{'s' * (exceeds > 1)}"
    words = f"the gradient {kind} {times(gain)}, beyond a factor {FACTOR:g} from {depth} on{_skip(p)}"
    return Verdict(kind, exceeds, words)


def _skip(p: Prediction) -> str:
    if abs(p.log_skip_gain) <= math.log(FACTOR):
        return ""
    return f"; the skip path alone {'decays' if p.log_skip_gain < 0 else 'grows'} {times(p.log_skip_gain)}"


def advised_rule(placement: str, num_layers: int, body: Body | None = None, **options: Any) -> str | None:
    """The depth rule that keeps the gradient within a factor 2 and lets the branches carry the largest share of it.

    Candidates: the placement's own rule, none, 1/√L, 1/√(2L) and 1/L. None if no candidate keeps the gradient."""

    def share(rule: str) -> float | None:
        p = predict(placement, num_layers, depth_rule=rule, body=body, **options)
        keeps = abs(p.log_total_gain) <= math.log(FACTOR)
        return p.total_attention_share + p.total_ffn_share if keeps else None

    own = PLACEMENTS[placement].default_depth_rule
    best = own, share(own)
    for rule in ("none", "1/sqrt(L)", "1/sqrt(2L)", "1/L"):  # each leaves the branches less than the one before it
        if (carried := share(rule)) is not None:
            best = (rule, carried) if best[1] is None or carried > best[1] + 0.01 else best
            break
    return best[0] if best[1] is not None else None


def times(log_gain: float) -> str:
    """A gain in words: ×1.3, ×4·10⁵."""
    if abs(log_gain) < math.log(1e4):
        return f"×{math.exp(log_gain):.3g}"
    exponent = log_gain / math.log(10)
    whole = math.floor(exponent)
    return f"×{10 ** (exponent - whole):.0f}·10" + str(whole).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
