"""Every placement's equation in the mean-field theory, in the shape of its block: streams in, streams out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from inspect import Parameter, signature
from typing import Any

from spannorm.theory.recursion import Block, Field

Recursion = Callable[..., tuple[Field, ...]]


@dataclass(frozen=True)
class Placement:
    """What the theory knows of a placement."""

    block: Recursion
    """The equation: `block(b, *streams, **options)` → the streams that leave."""
    default_depth_rule: str = "none"
    streams: int = 1
    readout: Recursion | None = None
    """What leaves the last block, where several streams meet."""
    inner_norms: Mapping[str, str] = field(default_factory=dict)
    embedding_norm: Callable[[Mapping[str, Any]], bool] = lambda options: False
    """Whether the embedding is normalized once, by the placement's options."""
    switches: Callable[[int, Mapping[str, Any]], list[int]] = lambda num_layers, options: []
    """The blocks from which another equation holds, by depth and options."""

    def options(self) -> list[str]:
        """The names of the placement's own options."""
        return [p.name for p in signature(self.block).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]


def pre(b: Block, x: Field) -> tuple[Field, ...]:
    h = b.add(x, b.attn(b.norm("attn_norm", x)), branch=b.attn_scale)
    return (b.add(h, b.ffn(b.norm("ffn_norm", h)), branch=b.ffn_scale),)


def post(b: Block, x: Field, alpha: float = 1.0) -> tuple[Field, ...]:
    h = b.norm("attn_norm", b.add(x, b.attn(x), skip=alpha, branch=b.attn_scale))
    return (b.norm("ffn_norm", b.add(h, b.ffn(h), skip=alpha, branch=b.ffn_scale)),)


def span(b: Block, x: Field, *, initial_norm: str = "attention") -> tuple[Field, ...]:
    reads = b.norm("initial_norm", x) if b.is_first and initial_norm == "attention" else x
    h = b.norm("attn_norm", b.add(x, b.attn(reads), branch=b.attn_scale))
    return (b.norm("ffn_norm", b.add(x, b.ffn(h), branch=b.ffn_scale)),)


def deepnorm(b: Block, x: Field) -> tuple[Field, ...]:
    return post(b, x, (2.0 * b.num_layers) ** 0.25)


def keel(b: Block, x: Field, *, alpha: float | None = None) -> tuple[Field, ...]:
    alpha = 1.0 if b.is_first else 2.0 * b.num_layers if alpha is None else alpha
    h = b.add(x, b.attn(b.norm("attn_norm", x)), skip=alpha, branch=b.attn_scale)
    if not b.is_first:
        h = b.norm("attn_outer_norm", h)
    f = b.ffn(b.norm("ffn_norm", h))
    return (b.norm("ffn_outer_norm", b.add(h, f, skip=alpha, branch=b.ffn_scale)),)


def lns(b: Block, x: Field) -> tuple[Field, ...]:
    factor = (b.layer_idx + 1.0) ** -0.5
    h = b.add(x, b.attn(b.scaled(b.norm("attn_norm", x), factor)), branch=b.attn_scale)
    return (b.add(h, b.ffn(b.scaled(b.norm("ffn_norm", h), factor)), branch=b.ffn_scale),)


def mix(b: Block, x: Field, *, post_fraction: float = 0.25) -> tuple[Field, ...]:
    return post(b, x) if b.layer_idx < mix_switch(b.num_layers, post_fraction) else pre(b, x)


def mix_switch(num_layers: int, post_fraction: float) -> int:
    """How many blocks are PostNorm's."""
    return math.floor(Fraction(str(post_fraction)) * num_layers)


def peri(b: Block, x: Field, *, embedding_norm: bool = False) -> tuple[Field, ...]:
    f = b.norm("attn_output_norm", b.attn(b.norm("attn_norm", x)))
    h = b.add(x, f, branch=b.attn_scale)
    f = b.norm("ffn_output_norm", b.ffn(b.norm("ffn_norm", h)))
    return (b.add(h, f, branch=b.ffn_scale),)


def olmo2(b: Block, x: Field) -> tuple[Field, ...]:
    h = b.add(x, b.norm("attn_norm", b.attn(x)), branch=b.attn_scale)
    return (b.add(h, b.norm("ffn_norm", b.ffn(h)), branch=b.ffn_scale),)


def normformer(b: Block, x: Field) -> tuple[Field, ...]:
    f = b.norm("attn_output_norm", b.attn(b.norm("attn_norm", x)))
    h = b.add(x, f, branch=b.attn_scale)
    return (b.add(h, b.ffn(b.norm("ffn_norm", h)), branch=b.ffn_scale),)


def hybrid(b: Block, x: Field) -> tuple[Field, ...]:
    n = b.norm("ffn_norm", b.add(x, b.attn(x), branch=b.attn_scale))
    return (b.add(n, b.ffn(n), branch=b.ffn_scale),)


def hybrid_star(b: Block, x: Field) -> tuple[Field, ...]:
    return pre(b, x) if b.is_first else hybrid(b, x)


def residual(b: Block, x: Field, d: Field) -> tuple[Field, ...]:
    for name, sublayer, c in (("attn_norm", b.attn, b.attn_scale), ("ffn_norm", b.ffn, b.ffn_scale)):
        f = sublayer(x)
        d = b.add(d, f, branch=c)
        x = b.norm(name, b.add(x, f, branch=c))
    return x, d


def siamese(b: Block, x: Field, y: Field) -> tuple[Field, ...]:
    for site, sublayer, c in (("attn", b.attn, b.attn_scale), ("ffn", b.ffn, b.ffn_scale)):
        index = 2 * b.layer_idx + (site == "ffn")
        o = sublayer(b.norm(f"{site}_norm", b.add(x, b.norm(f"{site}_y_norm", y))))
        x = b.norm(f"{site}_x_norm", b.add(x, o, branch=c * (index + 1.0) ** -0.5))
        y = b.add(y, o, branch=c)
    return x, y


def read_out(b: Block, x: Field, y: Field) -> tuple[Field, ...]:
    return (b.add(x, b.norm("readout_norm", y)),)


_QKV_PER_HEAD = {"q": "head", "k": "head", "v": "head"}

PLACEMENTS: dict[str, Placement] = {
    "pre": Placement(pre, "1/sqrt(2L)"),
    "post": Placement(post),
    "span": Placement(span, "1/sqrt(L)", embedding_norm=lambda o: o.get("initial_norm") == "embedding"),
    "deepnorm": Placement(deepnorm, "deepnorm"),
    "peri": Placement(peri, embedding_norm=lambda o: o.get("embedding_norm", False)),
    "olmo2": Placement(olmo2, inner_norms={"q": "width", "k": "width"}),
    "hybrid": Placement(hybrid, "1/sqrt(2L)", inner_norms=_QKV_PER_HEAD),
    "hybrid_star": Placement(hybrid_star, "1/sqrt(2L)", inner_norms=_QKV_PER_HEAD),
    "mix": Placement(mix, switches=lambda L, o: [mix_switch(L, o.get("post_fraction", 0.25))]),
    "lns": Placement(lns),
    "subln": Placement(pre, "subln", inner_norms={"attn_out": "width", "ffn_down": "width"}),
    "normformer": Placement(normformer, inner_norms={"ffn_down": "width"}),
    "residual": Placement(residual, streams=2, readout=read_out),
    "siamese": Placement(siamese, streams=2, readout=read_out),
    "keel": Placement(keel),
}
"""The theory of every placement of `spannorm.PLACEMENTS`, by the same name."""
