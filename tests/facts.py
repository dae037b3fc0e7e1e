"""The table of facts: what each placement is, written from the papers with torch alone, without the package.

Adding a placement adds an equation to equations.py and an entry to `FACTS`, and every test takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import equations as eq
from equations import EPS, F64, WIDTH, Case
from torch import Tensor

__all__ = ["EPS", "EQUATIONS", "F64", "FACTS", "WIDTH", "Case", "Fact"]

Sums = dict[str, str]
PRE: Sums = {"attn": "out", "ffn": "out"}
"""A branch is added into a sum that leaves the block without a norm …"""
POST: Sums = {"attn": "attn_norm", "ffn": "ffn_norm"}
"""… or into what a norm reads."""
NAMED: Sums = {"attn": "sum", "ffn": "sum"}
"""Where what is added is changed again within the block, the equation names its sums: `k.sum`."""
HYBRID: Sums = {"attn": "ffn_norm", "ffn": "out"}
GATES = ("attn_gate", "ffn_gate")
CHANNEL = tuple(f"{s}_{w}_{v}" for s in ("attn", "ffn") for w in ("skip", "branch") for v in ("gain", "shift"))
PER_HEAD = {"q": "head", "k": "head", "v": "head"}


@dataclass(frozen=True)
class Fact:
    """A placement as its authors have it; the defaults are PreNorm's without a depth rule."""

    equation: Callable[[Case, Tensor], Tensor]
    rule: str = "none"
    base_init: str = "normal"
    final_norm: bool = True
    inner_norms: Mapping[str, str] = field(default_factory=dict)
    output_norms: Mapping[str, str] = field(default_factory=dict)
    """Norms on a branch's output → the branch."""
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    """Of a middle block."""
    sums: Callable[[int], Sums] = lambda b: PRE
    """Block → where each branch is added; a second stream's sums are `attn_2`, `ffn_2`."""
    adds: tuple[str, ...] = ("ffn_add",)
    """The sums that no norm of the same block reads with its branch, by the record's name for them."""
    own: Callable[[int, int], Mapping[str, tuple[Any, float]]] = lambda b, d: {}
    """Block of a deep stack and width → the learned parameters besides the norms, each with the mean (a number or
    nested lists) and the std that it starts with, under base init `fan_in`."""
    on_stream: tuple[str, ...] = ()
    """The norms and own parameters that stand on a stream, and not inside a branch: a branch of 0 does not silence
    them."""
    streams: int = 1
    readout: Callable[[Case, Tensor], Tensor] = lambda k, state: state
    """What the stack would hand on if it ended with this state of several streams."""
    constant: tuple[str, Callable[[int, int], float]] | None = None
    """An attribute, and its value by block and depth."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """An option of its own with a value that is not its default."""


FACTS: dict[str, Fact] = {
    "pre": Fact(eq.pre, "1/sqrt(2L)"),
    "post": Fact(
        eq.post, base_init="xavier", final_norm=False, sums=lambda b: POST, adds=(), on_stream=("attn_norm", "ffn_norm")
    ),
    "span": Fact(
        eq.span, "1/sqrt(L)", "fan_in", False, sums=lambda b: POST, adds=(), on_stream=("ffn_norm",),
        options={"initial_norm": "none"},
    ),
    "b2t": Fact(
        eq.b2t, base_init="xavier", final_norm=False, sums=lambda b: POST, adds=(), on_stream=("attn_norm", "ffn_norm")
    ),
    "deepnorm": Fact(
        eq.deepnorm, "deepnorm", "xavier", False, sums=lambda b: POST, adds=(), on_stream=("attn_norm", "ffn_norm"),
        constant=("alpha", lambda b, L: (2 * L) ** 0.25),
    ),
    "peri": Fact(
        eq.peri, output_norms={"attn_output_norm": "attn", "ffn_output_norm": "ffn"},
        norms=("attn_norm", "attn_output_norm", "ffn_norm", "ffn_output_norm"), options={"embedding_norm": True},
    ),
    "olmo2": Fact(
        eq.olmo2, base_init="normal_cut", inner_norms={"q": "width", "k": "width"},
        output_norms={"attn_norm": "attn", "ffn_norm": "ffn"}, adds=("attn_add", "ffn_add"),
    ),
    "hybrid": Fact(
        eq.hybrid, "1/sqrt(2L)", "megatron", inner_norms=PER_HEAD, norms=("ffn_norm",), sums=lambda b: HYBRID,
        on_stream=("ffn_norm",),
    ),
    "hybrid_star": Fact(
        eq.hybrid_star, "1/sqrt(2L)", "megatron", inner_norms=PER_HEAD, norms=("ffn_norm",),
        sums=lambda b: HYBRID if b else PRE, on_stream=("ffn_norm",),
    ),
    "mix": Fact(eq.mix, sums=lambda b: PRE if b else POST, options={"post_fraction": 0.5}),
    "lns": Fact(eq.lns, constant=("factor", lambda b, L: 1 / (b + 1) ** 0.5)),
    # its other norms stand inside the sublayers
    "subln": Fact(eq.pre, "subln", "xavier", inner_norms={"attn_out": "width", "ffn_down": "width"}),
    "normformer": Fact(
        eq.normformer, inner_norms={"head_scale": "head", "ffn_down": "width"},
        output_norms={"attn_output_norm": "attn"}, norms=("attn_norm", "attn_output_norm", "ffn_norm"),
    ),
    "residual": Fact(
        eq.residual, base_init="xavier", final_norm=False, adds=("attn_add", "ffn_add"), streams=2, readout=eq.read_out,
        on_stream=("attn_norm", "ffn_norm", "readout_norm"),
        sums=lambda b: {**POST, "attn_2": "second", "ffn_2": "second"},
    ),
    "siamese": Fact(
        eq.siamese, final_norm=False, adds=("attn_add", "ffn_add"), streams=2, readout=eq.read_out,
        on_stream=("attn_x_norm", "ffn_x_norm", "readout_norm"),
        norms=("attn_norm", "attn_x_norm", "attn_y_norm", "ffn_norm", "ffn_x_norm", "ffn_y_norm"),
        sums=lambda b: {"attn": "attn_x_norm", "ffn": "ffn_x_norm", "attn_2": "second", "ffn_2": "second"},
    ),
    "keel": Fact(
        eq.keel, final_norm=False, norms=("attn_norm", "attn_outer_norm", "ffn_norm", "ffn_outer_norm"), adds=(),
        sums=lambda b: {"attn": "attn_outer_norm" if b else "ffn_norm", "ffn": "ffn_outer_norm"},
        on_stream=("attn_outer_norm", "ffn_outer_norm"),
        constant=("alpha", lambda b, L: 2.0 * L if b else 1.0), options={"alpha": 3.0},
    ),
    "gpas": Fact(
        eq.gpas, "1/sqrt(2L)", own=lambda b, d: dict.fromkeys(GATES, (0.0, 0.0)), on_stream=GATES,
        adds=("attn_add", "ffn_add"), sums=lambda b: NAMED,
    ),
    "parallel": Fact(
        eq.parallel, "1/sqrt(2L)", norms=("attn_norm",), adds=("attn_add", "ffn_add"), options={"norms": 2},
    ),
    "averaged": Fact(
        eq.averaged, output_norms={"attn_output_norm": "attn", "ffn_output_norm": "ffn"},
        norms=("attn_norm", "attn_output_norm", "ffn_norm", "ffn_output_norm"), sums=lambda b: HYBRID,
    ),
    "channel": Fact(
        eq.channel, adds=("attn_add", "ffn_add"), sums=lambda b: NAMED,
        own=lambda b, d: {n: (float("gain" in n), 0.0) for n in CHANNEL},
        on_stream=tuple(n for n in CHANNEL if n not in ("attn_branch_gain", "ffn_branch_gain")),
    ),
}  # fmt: skip

EQUATIONS = {name: fact.equation for name, fact in FACTS.items()}
