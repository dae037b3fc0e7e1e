"""Depth rules and base init as pure functions: standard library only, floats in, floats out.

`L` is the number of blocks. A depth rule says by how much each residual branch is damped with depth, and where:
in the init (`1/sqrt(L)`), in the forward pass (`1/sqrt(L):forward`), or in init and learning rate together
(`1/sqrt(L):init+lr`), which under Adam is the forward factor written another way (docs/depth_rules.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from spannorm.errors import InputError, unknown

Role = Literal[
    "embedding", "head",
    "q", "k", "v", "attn_out",
    "ffn_gate", "ffn_up", "ffn_down",
    "router", "norm", "bias", "gain",
]  # fmt: skip
"""What a parameter does. Init, learning rate and weight decay follow from it and from nothing else."""

ROLES: tuple[Role, ...] = get_args(Role)

OUTPUTS: Mapping[str, Role] = {"attn": "attn_out", "ffn": "ffn_down"}
"""The matrix that writes each branch's output."""

MATRICES: Mapping[str, tuple[Role, ...]] = {
    "attn": ("q", "k", "v", "attn_out"),
    "ffn": ("ffn_gate", "ffn_up", "ffn_down"),
}
"""Every matrix of each branch, the output's last."""

_FACTORS = {
    "none": lambda L: 1.0,
    "1/sqrt(L)": lambda L: L**-0.5,
    "1/sqrt(2L)": lambda L: (2 * L) ** -0.5,
    "1/L": lambda L: 1.0 / L,
}
_NAMED = ("deepnorm", "subln", "rezero", "layerscale")
_WHERE = ("forward", "init+lr", "forward+lr")


@dataclass(frozen=True)
class DepthRule:
    """A depth rule worked out for one depth: plain floats, nothing to lose on meta device or in a checkpoint."""

    name: str
    """The resolved name, as files record it."""
    init: Mapping[Role, float] = field(default_factory=dict)
    """Factors on the base init's std, by role; a role that is absent has factor 1."""
    learning_rate: Mapping[Role, float] = field(default_factory=dict)
    """Factors on the learning rate, by role (weight decay is divided by the same factor)."""
    attn_forward: float = 1.0
    """Factor on attention's output in the forward pass."""
    ffn_forward: float = 1.0
    """Factor on the feed-forward's output in the forward pass."""
    learned: Literal["", "scalar", "vector"] = ""
    """Whether each branch has a learned gain, one for all channels or one for each."""
    gain: float = 1.0
    """The learned gain's initial value."""


def depth_rule(name: str, num_layers: int) -> DepthRule:
    """Work out a depth rule for a depth.

    Args:
        name: `none`, `1/sqrt(L)`, `1/sqrt(2L)` or `1/L`, then optionally `:ffn` (the FFN branch only), then
            optionally `:forward`, `:init+lr` (its twin under Adam) or `:forward+lr` (a forward factor, and the learning
            rate of every matrix of the branch × the same factor: with 1/sqrt(L) Depth-μP's, arXiv 2310.02244);
            nothing means in the init. Or one of

            - `deepnorm` (arXiv 2203.00555): std × β = (8L)^-1/4 on V, attention-out and the FFN matrices
              (the gate too, for gated FFNs: our reading);
            - `subln` (Magneto, arXiv 2210.06423): std × √ln(2L) on the same matrices;
            - `rezero` (arXiv 2003.04887): a learned scalar per branch that starts at 0;
            - `layerscale` (arXiv 2103.17239): a learned vector per branch that starts at 0.1 up to 18 blocks,
              1e-5 up to 24, 1e-6 beyond.
        num_layers: blocks, at least 1.

    Raises:
        InputError: the name does not follow the grammar, or the depth is below 1.
    """
    if num_layers < 1:
        raise InputError(f"a model needs at least 1 block; num_layers is {num_layers}.")
    body: tuple[Role, ...] = ("v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
    if name == "deepnorm":
        return DepthRule(name, init=dict.fromkeys(body, (8 * num_layers) ** -0.25))
    if name == "subln":
        return DepthRule(name, init=dict.fromkeys(body, math.sqrt(math.log(2 * num_layers))))
    if name == "rezero":
        return DepthRule(name, learned="scalar", gain=0.0)
    if name == "layerscale":
        gain = 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6
        return DepthRule(name, learned="vector", gain=gain)

    factor_name, *suffixes = name.split(":")
    if factor_name not in _FACTORS:
        raise unknown("depth rule", name, depth_rule_names())
    ffn_only = suffixes[:1] == ["ffn"]
    where = suffixes[1:] if ffn_only else suffixes
    if len(where) > 1 or any(w not in _WHERE for w in where) or (suffixes and factor_name == "none"):
        raise unknown("depth rule", name, depth_rule_names())
    factor = _FACTORS[factor_name](num_layers)
    branches = ("ffn",) if ffn_only else ("attn", "ffn")
    if where in (["forward"], ["forward+lr"]):
        slowed = [role for branch in branches for role in MATRICES[branch]] if where == ["forward+lr"] else []
        attn = 1.0 if ffn_only else factor
        return DepthRule(name, learning_rate=dict.fromkeys(slowed, factor), ffn_forward=factor, attn_forward=attn)
    outputs = {OUTPUTS[branch]: factor for branch in branches if factor != 1.0}
    return DepthRule(name, init=outputs, learning_rate=outputs if where == ["init+lr"] else {})


def depth_rule_names() -> list[str]:
    """Every name that `depth_rule` takes."""
    factors = [name for name in _FACTORS if name != "none"]
    wheres = ["", *(f":{where}" for where in _WHERE)]
    grammar = [f + branch + where for f in factors for branch in ("", ":ffn") for where in wheres]
    return ["none", *grammar, *_NAMED]


BASE_INITS: Mapping[str, float | None] = {
    "fan_in": None,
    "normal": None,
    "normal_cut": 3.0,
    "megatron": 3.0,
    "xavier": None,
}
"""Every base init, and at how many σ its draw is cut (None: not at all)."""


def base_std(
    role: Role,
    fan_in: int,
    fan_out: int,
    *,
    width: int,
    base_init: str = "fan_in",
    initializer_range: float = 0.02,
    tied: bool = False,
) -> float:
    """The σ of a parameter before any depth rule: one table, role → σ.

    | role | `fan_in` (ours) | `xavier` | `normal`, `normal_cut` | `megatron` |
    |---|---|---|---|---|
    | body matrices, router | fan_in^-1/2 | √(2/(fan_in + fan_out)) | `initializer_range` | (2.5 d)^-1/2 |
    | head | d^-1/2 | d^-1/2 | `initializer_range` | (2.5 d)^-1/2 |
    | embedding | 1 | 1 | `initializer_range` | (2.5 d)^-1/2 |
    | embedding tied to the head (then times √d on input) | d^-1/2 | d^-1/2 | `initializer_range` | (2.5 d)^-1/2 |
    | norm, bias, learned gain | 0: constant | 0 | 0 | 0 |

    Args:
        fan_in: the length of what a row is multiplied with; for embedding and head the width d.
        fan_out: the number of rows.
        width: d, the model's hidden size.
        tied: whether embedding and head share one matrix.
    """
    if base_init not in BASE_INITS:
        raise unknown("base_init", base_init, BASE_INITS)
    if role in ("norm", "bias", "gain"):
        return 0.0
    if base_init in ("normal", "normal_cut"):
        return initializer_range
    if base_init == "megatron":
        return (2.5 * width) ** -0.5
    if role == "embedding":
        return width**-0.5 if tied else 1.0
    if base_init == "xavier" and role != "head":
        return (2 / (fan_in + fan_out)) ** 0.5
    return fan_in**-0.5


def cut_std(cut: float) -> float:
    """The std of a standard normal that is drawn again until it lies within ±cut."""
    inside = math.erf(cut / 2**0.5)
    return (1 - 2 * cut * math.exp(-cut * cut / 2) / (2 * math.pi) ** 0.5 / inside) ** 0.5
