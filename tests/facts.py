"""The table of facts: what each placement is, written from the papers with torch alone, without the package.

Adding a placement adds an equation and an entry to `FACTS`, and every test takes it from there.

A reference reads a `Case`: the sublayers `A` and `F`, the norm `N(x, name)`, the branch factors `ca` and `cf`, the
block index `b` and the depth `L`. It returns what the block hands on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

F64, EPS, WIDTH = torch.float64, 1e-3, 8


class Case:
    """One block's norms, gains and sublayers as plain tensors with gradients, made when they are first asked for."""

    def __init__(self, norm: str, b: int, L: int, factors: tuple[float, float] | str) -> None:
        self.norm, self.b, self.L = norm, b, L
        self.leaves: dict[str, Tensor] = {}
        self.ca: float | Tensor
        self.cf: float | Tensor
        if isinstance(factors, str):
            shape = (1,) if factors == "scalar" else (WIDTH,)
            self.ca, self.cf = (self.leaf(f"gains_norm.{n}_scale", *shape) for n in ("attn", "ffn"))
        else:
            self.ca, self.cf = factors

    def leaf(self, name: str, *shape: int) -> Tensor:
        if name not in self.leaves:
            self.leaves[name] = torch.randn(shape, dtype=F64, requires_grad=True)
        return self.leaves[name]

    def A(self, x: Tensor) -> Tensor:
        return self.leaf("mix", 3, 3) @ torch.tanh(x @ self.leaf("proj", WIDTH, WIDTH))

    def F(self, x: Tensor) -> Tensor:
        u = x @ self.leaf("up", WIDTH, 12)
        return (u * torch.sigmoid(u)) @ self.leaf("down", 12, WIDTH)

    def N(self, x: Tensor, name: str) -> Tensor:
        weight = self.leaf(f"{name}.weight", WIDTH)
        if self.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        unit = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
        return weight * unit + (self.leaf(f"{name}.bias", WIDTH) if self.norm == "layernorm" else 0.0)


def pre(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.A(k.N(x, "attn_norm"))
    return h + k.cf * k.F(k.N(h, "ffn_norm"))


def post(k: Case, x: Tensor) -> Tensor:
    h = k.N(x + k.ca * k.A(x), "attn_norm")
    return k.N(h + k.cf * k.F(h), "ffn_norm")


def span(k: Case, x: Tensor) -> Tensor:
    read = k.N(x, "initial_norm") if k.b == 0 else x
    h = k.N(x + k.ca * k.A(read), "attn_norm")
    return k.N(x + k.cf * k.F(h), "ffn_norm")


def b2t(k: Case, x: Tensor) -> Tensor:
    h = k.N(x + k.ca * k.A(x), "attn_norm")
    return k.N(x + h + k.cf * k.F(h), "ffn_norm")


def deepnorm(k: Case, x: Tensor) -> Tensor:
    alpha = math.sqrt(math.sqrt(2 * k.L))
    h = k.N(alpha * x + k.ca * k.A(x), "attn_norm")
    return k.N(alpha * h + k.cf * k.F(h), "ffn_norm")


def peri(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.N(k.A(k.N(x, "attn_norm")), "attn_output_norm")
    return h + k.cf * k.N(k.F(k.N(h, "ffn_norm")), "ffn_output_norm")


def olmo2(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.N(k.A(x), "attn_norm")
    return h + k.cf * k.N(k.F(h), "ffn_norm")


def hybrid(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.A(x)
    return k.N(h, "ffn_norm") + k.cf * k.F(k.N(h, "ffn_norm"))


def hybrid_star(k: Case, x: Tensor) -> Tensor:
    return pre(k, x) if k.b == 0 else hybrid(k, x)


def mix(k: Case, x: Tensor) -> Tensor:
    return post(k, x) if k.b < math.floor(k.L / 4) else pre(k, x)


def lns(k: Case, x: Tensor) -> Tensor:
    root = math.sqrt(k.b + 1)
    h = x + k.ca * k.A(k.N(x, "attn_norm") / root)
    return h + k.cf * k.F(k.N(h, "ffn_norm") / root)


def normformer(k: Case, x: Tensor) -> Tensor:
    h = x + k.ca * k.N(k.A(k.N(x, "attn_norm")), "attn_output_norm")
    return h + k.cf * k.F(k.N(h, "ffn_norm"))


def keel(k: Case, x: Tensor) -> Tensor:
    alpha = 1 if k.b == 0 else 2 * k.L
    h = alpha * x + k.ca * k.A(k.N(x, "attn_norm"))
    h = h if k.b == 0 else k.N(h, "attn_outer_norm")
    return k.N(alpha * h + k.cf * k.F(k.N(h, "ffn_norm")), "ffn_outer_norm")


def residual(k: Case, state: Tensor) -> Tensor:
    x, d = (state, state) if k.b == 0 else (state[..., 0, :], state[..., 1, :])
    f = k.ca * k.A(x)
    d, x = d + f, k.N(x + f, "attn_norm")
    f = k.cf * k.F(x)
    d, x = d + f, k.N(x + f, "ffn_norm")
    state = torch.stack((x, d), dim=2)
    return read_out(k, state) if k.b == k.L - 1 else state


def siamese(k: Case, state: Tensor) -> Tensor:
    X, Y = (state, state) if k.b == 0 else (state[..., 0, :], state[..., 1, :])
    o = k.ca * k.A(k.N(X + k.N(Y, "attn_y_norm"), "attn_norm"))
    X, Y = k.N(X + o / math.sqrt(2 * k.b + 1), "attn_x_norm"), Y + o
    o = k.cf * k.F(k.N(X + k.N(Y, "ffn_y_norm"), "ffn_norm"))
    X, Y = k.N(X + o / math.sqrt(2 * k.b + 2), "ffn_x_norm"), Y + o
    state = torch.stack((X, Y), dim=2)
    return read_out(k, state) if k.b == k.L - 1 else state


def read_out(k: Case, state: Tensor) -> Tensor:
    return state[..., 0, :] + k.N(state[..., 1, :], "readout_norm")


Sums = dict[str, str]
PRE: Sums = {"attn": "out", "ffn": "out"}
"""A branch is added into a sum that leaves the block without a norm …"""
POST: Sums = {"attn": "attn_norm", "ffn": "ffn_norm"}
"""… or into what a norm reads."""
HYBRID: Sums = {"attn": "ffn_norm", "ffn": "out"}
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
    stream_norms: tuple[str, ...] = ()
    """The norms that stand on a stream, and not inside a branch: a branch of 0 does not silence them."""
    streams: int = 1
    readout: Callable[[Case, Tensor], Tensor] = lambda k, state: state
    """What the stack would hand on if it ended with this state of several streams."""
    constant: tuple[str, Callable[[int, int], float]] | None = None
    """An attribute, and its value by block and depth."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """An option of its own with a value that is not its default."""


FACTS: dict[str, Fact] = {
    "pre": Fact(pre, "1/sqrt(2L)"),
    "post": Fact(
        post, base_init="xavier", final_norm=False, sums=lambda b: POST, adds=(), stream_norms=("attn_norm", "ffn_norm")
    ),
    "span": Fact(
        span, "1/sqrt(L)", "fan_in", False, sums=lambda b: POST, adds=(), stream_norms=("ffn_norm",),
        options={"initial_norm": "none"},
    ),
    "b2t": Fact(
        b2t, base_init="xavier", final_norm=False, sums=lambda b: POST, adds=(), stream_norms=("attn_norm", "ffn_norm")
    ),
    "deepnorm": Fact(
        deepnorm, "deepnorm", "xavier", False, sums=lambda b: POST, adds=(), stream_norms=("attn_norm", "ffn_norm"),
        constant=("alpha", lambda b, L: (2 * L) ** 0.25),
    ),
    "peri": Fact(
        peri, output_norms={"attn_output_norm": "attn", "ffn_output_norm": "ffn"},
        norms=("attn_norm", "attn_output_norm", "ffn_norm", "ffn_output_norm"), options={"embedding_norm": True},
    ),
    "olmo2": Fact(
        olmo2, base_init="normal_cut", inner_norms={"q": "width", "k": "width"},
        output_norms={"attn_norm": "attn", "ffn_norm": "ffn"}, adds=("attn_add", "ffn_add"),
    ),
    "hybrid": Fact(
        hybrid, "1/sqrt(2L)", "megatron", inner_norms=PER_HEAD, norms=("ffn_norm",), sums=lambda b: HYBRID,
        stream_norms=("ffn_norm",),
    ),
    "hybrid_star": Fact(
        hybrid_star, "1/sqrt(2L)", "megatron", inner_norms=PER_HEAD, norms=("ffn_norm",),
        sums=lambda b: HYBRID if b else PRE, stream_norms=("ffn_norm",),
    ),
    "mix": Fact(mix, sums=lambda b: PRE if b else POST, options={"post_fraction": 0.5}),
    "lns": Fact(lns, constant=("factor", lambda b, L: 1 / (b + 1) ** 0.5)),
    # its other norms stand inside the sublayers
    "subln": Fact(pre, "subln", "xavier", inner_norms={"attn_out": "width", "ffn_down": "width"}),
    "normformer": Fact(
        normformer, inner_norms={"head_scale": "head", "ffn_down": "width"}, output_norms={"attn_output_norm": "attn"},
        norms=("attn_norm", "attn_output_norm", "ffn_norm"),
    ),
    "residual": Fact(
        residual, base_init="xavier", final_norm=False, adds=("attn_add", "ffn_add"), streams=2, readout=read_out,
        stream_norms=("attn_norm", "ffn_norm", "readout_norm"),
        sums=lambda b: {**POST, "attn_2": "second", "ffn_2": "second"},
    ),
    "siamese": Fact(
        siamese, final_norm=False, adds=("attn_add", "ffn_add"), streams=2, readout=read_out,
        stream_norms=("attn_x_norm", "ffn_x_norm", "readout_norm"),
        norms=("attn_norm", "attn_x_norm", "attn_y_norm", "ffn_norm", "ffn_x_norm", "ffn_y_norm"),
        sums=lambda b: {"attn": "attn_x_norm", "ffn": "ffn_x_norm", "attn_2": "second", "ffn_2": "second"},
    ),
    "keel": Fact(
        keel, final_norm=False, norms=("attn_norm", "attn_outer_norm", "ffn_norm", "ffn_outer_norm"), adds=(),
        sums=lambda b: {"attn": "attn_outer_norm" if b else "ffn_norm", "ffn": "ffn_outer_norm"},
        stream_norms=("attn_outer_norm", "ffn_outer_norm"),
        constant=("alpha", lambda b, L: 2.0 * L if b else 1.0), options={"alpha": 3.0},
    ),
}  # fmt: skip

EQUATIONS = {name: fact.equation for name, fact in FACTS.items()}
