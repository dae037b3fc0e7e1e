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
MHC = tuple(f"{site}_{name}" for site in ("attn", "ffn") for name in ("weights", "base", "gates"))
CHANNEL = tuple(f"{s}_{w}_{v}" for s in ("attn", "ffn") for w in ("skip", "branch") for v in ("gain", "shift"))
PER_HEAD = {"q": "head", "k": "head", "v": "head"}


Starts = dict[str, tuple[Any, float]]


def mixed_input_lambdas(b: int, d: int, L: int = 4) -> Starts:
    return {"stream_lambda": (1.15 - 0.1 * b / (L - 1), 0.0), "input_lambda": (0.2 - 0.15 * b / (L - 1), 0.0)}


def hc_start(b: int, d: int) -> Starts:
    starts: Starts = {}
    for k, site in ((2 * b, "attn"), (2 * b + 1, "ffn")):
        starts[f"{site}_read"] = [float(i == k % 4) for i in range(4)], 0.0
        starts[f"{site}_write"] = 1.0, 0.0
        starts[f"{site}_mix"] = [[float(i == j) for i in range(4)] for j in range(4)], 0.0
        starts[f"{site}_dynamic_scale"], starts[f"{site}_dynamic"] = (0.01, 0.0), (0.0, 0.0)
    return starts


def mhc_start(b: int, d: int, L: int = 4) -> Starts:
    starts: Starts = {}
    for site in ("attn", "ffn", *(("readout",) if b == L - 1 else ())):
        starts[f"{site}_base"], starts[f"{site}_gates"] = (0.0, 0.0), (1.0, 0.0)
        starts[f"{site}_weights"] = 0.0, (4 * d) ** -0.5
    return starts


def gated_start(b: int, d: int, L: int = 4) -> Starts:
    starts: Starts = {}
    for site in ("attn", "ffn", *(("readout",) if b == L - 1 else ())):
        starts[f"{site}_down"], starts[f"{site}_up"] = (0.0, (4 * d) ** -0.5), (0.0, (d // 8) ** -0.5)
        if site != "readout":
            starts[f"{site}_write"] = 0.0, (4 * d) ** -0.5
    return starts


def queries(b: int, d: int, L: int = 4) -> Starts:
    sites = (*(("attn",) if b else ()), "ffn", *(("readout",) if b == L - 1 else ()))
    return {f"{site}_query": (0.0, 0.0) for site in sites}


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
    silent: tuple[str, ...] = ()
    """Parts of names of parameters without a gradient at the start, because what stands behind them starts at 0."""
    streams: int | Callable[[int], int] = 1
    """What enters a block after the first, by block where it grows."""
    opens: int = 0
    """Streams that block 0 opens, where the state grows."""
    embedding_norm: bool = False
    readout: Callable[[Case, Tensor], Tensor] = lambda k, state: state
    """What the stack would hand on if it ended with this state of several streams."""
    unmatched: tuple[str, ...] = ()
    """Branches that no sum adds: their outputs become streams of their own."""
    constant: tuple[str, Callable[[int, int], float]] | None = None
    """An attribute, and its value by block and depth."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its own options, each with a value that is not its default."""
    theory: Mapping[str, Any] | None = field(default_factory=dict)
    """Options with which fields can go through it; None where none are known."""

    def state(self, b: int) -> tuple[int, ...]:
        """The dimensions of streams in what enters block b."""
        n = self.streams(b) if callable(self.streams) else self.streams
        return (n,) if b > 0 and self.several else ()

    @property
    def several(self) -> bool:
        return callable(self.streams) or self.streams > 1


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
    "mixed_input": Fact(
        eq.mixed_input, "1/sqrt(2L)", sums=lambda b: NAMED, streams=2, readout=lambda k, state: state[..., 0, :],
        embedding_norm=True, own=mixed_input_lambdas, on_stream=("stream_lambda", "input_lambda"),
        options={"start": "plain"},
    ),
    "hc": Fact(
        eq.hc, "1/sqrt(2L)", adds=("attn_add", "ffn_add"), sums=lambda b: NAMED, streams=4, own=hc_start,
        norms=("attn_norm", "attn_stream_norm", "ffn_norm", "ffn_stream_norm"),
        readout=lambda k, state: state.sum(2), on_stream=("attn_mix", "ffn_mix", "attn_dynamic", "ffn_dynamic"),
        silent=("stream_norm", "_dynamic_scale"),
        options={"streams": 2, "dynamic": False},
    ),
    "mhc": Fact(
        eq.mhc, adds=("attn_add", "ffn_add"), sums=lambda b: NAMED, streams=4, own=mhc_start, readout=eq.mhc_readout,
        on_stream=(*MHC, "readout_"), options={"streams": 2, "init": "prenorm"},
        theory={"init": "prenorm"},
    ),
    "gated": Fact(
        eq.gated, final_norm=False, adds=("attn_add", "ffn_add"), sums=lambda b: NAMED, streams=4, own=gated_start,
        norms=tuple(f"{site}_{i}_norm" for site in ("attn", "ffn") for i in range(4)), readout=eq.gated_readout,
        on_stream=("readout",), options={"streams": 2, "rank": 2}, theory=None,
    ),
    "attnres": Fact(
        eq.attnres, adds=(), sums=lambda b: {}, unmatched=("attn", "ffn"),
        streams=lambda b: 2 * b + 1, opens=1, own=queries, on_stream=("readout_query",),
        readout=eq.sources_readout, options={"form": "inkling"},
    ),
    "attnres_block": Fact(  # four blocks are groups of their own
        eq.attnres_block, sums=lambda b: {"ffn": "sum"}, unmatched=("attn",),
        streams=lambda b: b + 1, opens=1, own=queries, on_stream=("readout_query",),
        readout=eq.sources_readout, options={"groups": 2, "form": "inkling"},
    ),
}  # fmt: skip

EQUATIONS = {name: fact.equation for name, fact in FACTS.items()}
