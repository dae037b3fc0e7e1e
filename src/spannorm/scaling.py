"""Depth rules and base init as pure functions: standard library only, floats in, floats out.

`L` is the number of blocks, `b` a block's index from 0. A depth rule says by which factor each residual branch is made
smaller with depth, and where the factor stands: in the init (`1/sqrt(L)`), in the forward pass (`1/sqrt(L):forward`),
or in init and learning rate together (`1/sqrt(L):init+lr`). Under Adam the last two are equal (docs/depth_rules.md).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from spannorm.errors import InputError, one_of, unknown

Role = Literal[
    "embedding", "head",
    "q", "k", "v", "attn_out",
    "ffn_gate", "ffn_up", "ffn_down",
    "router", "projection", "norm", "bias", "gain", "own",
]  # fmt: skip
"""What a parameter does. `projection` is a matrix of another kind, such as one that a placement owns. `own` means that
its own module draws it. Init, learning rate and weight decay depend on the role alone."""

ROLES: tuple[Role, ...] = tuple(role for role in get_args(Role) if role != "own")
"""The roles that we draw."""
Branch = Literal["attn", "ffn"]

OUTPUTS: Mapping[Branch, Role] = {"attn": "attn_out", "ffn": "ffn_down"}
"""The matrix that writes each branch's output."""

MATRICES: Mapping[Branch, tuple[Role, ...]] = {
    "attn": ("q", "k", "v", "attn_out"),
    "ffn": ("ffn_gate", "ffn_up", "ffn_down"),
}
"""Every matrix of each branch, the output's last."""


@dataclass(frozen=True)
class DepthRule:
    """A depth rule worked out for one block, as plain floats: meta device and checkpoints cannot lose them.

    Each table holds factors by role or by branch; the factor of a missing key is 1.
    """

    name: str
    """The resolved name, as files record it."""
    init: Mapping[Role, float] = field(default_factory=dict)
    """On the base init's std."""
    learning_rate: Mapping[Role, float] = field(default_factory=dict)
    weight_decay: Mapping[Role, float] = field(default_factory=dict)
    eps: Mapping[Role, float] = field(default_factory=dict)
    """On Adam's ε."""
    forward: Mapping[Branch, float] = field(default_factory=dict)
    """On the branch's output in the forward pass."""
    output_gain: Mapping[Branch, float] = field(default_factory=dict)
    """On the initial gain of the norm on the branch's output."""
    learned: Literal["", "scalar", "vector"] = ""
    """Whether each branch has a learned gain: one for all channels (`scalar`), or one per channel (`vector`)."""
    gain: float = 1.0
    """The learned gain's initial value."""


_FACTORS: Mapping[str, Callable[[int, int], float]] = {
    "1/sqrt(L)": lambda L, b: L**-0.5,
    "1/sqrt(2L)": lambda L, b: (2 * L) ** -0.5,
    "1/L": lambda L, b: 1.0 / L,
    "1/sqrt(b+1)": lambda L, b: (b + 1) ** -0.5,
    "1/sqrt(2(b+1))": lambda L, b: (2 * (b + 1)) ** -0.5,
}
_PLACES = ("forward", "init+lr", "forward+lr", "gain")
_ARGUMENTS = re.compile(r"(.*?[^/t(])\(([^()]*)\)")  # NAME(1,2), but not 1/sqrt(2L)

_WRITING: tuple[Role, ...] = ("v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
_BODY: tuple[Role, ...] = (*MATRICES["attn"], *MATRICES["ffn"])


def _mup(alpha: float, ratio: float) -> dict[str, Any]:
    """The part of CompleteP's table that depends on depth; `ratio` is L / L₀."""
    roles: tuple[Role, ...] = (*_BODY, "router", "projection", "norm", "bias", "gain")
    return {
        "forward": dict.fromkeys(MATRICES, ratio**-alpha),
        "learning_rate": dict.fromkeys(roles, ratio ** (alpha - 1)),
        "eps": dict.fromkeys(roles, ratio**-alpha),
    }


_NAMED: Mapping[str, Callable[..., dict[str, Any]]] = {
    "none": lambda L, b: {},
    "deepnorm": lambda L, b: {"init": dict.fromkeys(_WRITING, (8 * L) ** -0.25)},
    "subln": lambda L, b: {"init": dict.fromkeys(_WRITING, math.sqrt(math.log(2 * L)))},
    "rezero": lambda L, b: {"learned": "scalar", "gain": 0.0},
    "layerscale": lambda L, b: {"learned": "vector", "gain": 0.1 if L <= 18 else 1e-5 if L <= 24 else 1e-6},
    "ds-init": lambda L, b: {"init": dict.fromkeys(_BODY, (b + 1) ** -0.5)},
    "wang": lambda L, b: {"init": dict.fromkeys(OUTPUTS.values(), 10**0.5 / L)},
    "torchtitan": lambda L, b: {"init": dict.fromkeys(("attn_out", "ffn_up", "ffn_down"), (2 * (b + 1)) ** -0.5)},
    "completep": lambda L, b, base=2.0: _mup(1.0, L / base),
    "depth-mup": lambda L, b, base=2.0: _mup(0.5, L / base),
}
_TAKES = {"gain": 2, "completep": 1, "depth-mup": 1}


def depth_rule(name: str, num_layers: int, layer_idx: int = 0) -> DepthRule:
    """Work out a depth rule for a block.

    Args:
        name: `FACTOR[:ffn][:PLACE]`, or a name of its own. FACTOR is `1/sqrt(L)`, `1/sqrt(2L)`, `1/L`, `1/sqrt(b+1)` or
            `1/sqrt(2(b+1))`; `:ffn` means the FFN branch only; PLACE is

            - nothing: the init of the matrix that writes the branch's output;
            - `forward`: a constant in the forward pass;
            - `init+lr`: the same training under Adam: init and learning rate × the factor, weight decay ÷ it;
            - `forward+lr`: a forward constant; learning rate × it and weight decay ÷ it on all the branch's matrices;
            - `gain`, or `gain(c_attn,c_ffn)`: the initial gain of the norm on the branch's output, c × the factor
              (Pangu Ultra, arXiv 2504.07866: `1/sqrt(L):gain(0.283,0.432)`; Arcee Trinity: `1/sqrt(L):gain`).

            The names are

            - `none`;
            - `deepnorm` (arXiv 2203.00555): std × β = (8L)^-1/4 on V, attention-out and the FFN matrices
              (also on the gate of a gated FFN: our reading);
            - `subln` (Magneto, arXiv 2210.06423): std × √ln(2L) on the same matrices;
            - `rezero` (arXiv 2003.04887): a learned scalar per branch that starts at 0;
            - `layerscale` (arXiv 2103.17239): a learned vector per branch that starts at 0.1 up to 18 blocks,
              1e-5 up to 24, 1e-6 for more blocks;
            - `ds-init` (arXiv 1908.11365, its α = 1): std × 1/√(b+1) on every matrix of the block;
            - `wang` (GPT-NeoX's wang_init): std × √10/L on both outputs: 2/(L√d) over base init `small`;
            - `torchtitan` (its depth_init, 0.3.0): std × 1/√(2(b+1)) on attention-out, FFN-up and FFN-down;
            - `completep`, or `completep(L0)` (arXiv 2505.01618; L0, the base depth, is 2 as in its code): forward
              × L0/L, Adam's ε × L0/L on all parameters of a block; learning rates and weight decay stay;
            - `depth-mup(L0)`: the same table at α = ½ (Depth-μP, arXiv 2310.02244, as in CompleteP's code):
              forward, ε and learning rate × √(L0/L) on all parameters of a block; weight decay stays.
        num_layers: L, at least 1.
        layer_idx: b.

    Raises:
        InputError: the name does not follow the grammar, an argument is not a positive number, L is below 1, or b is
            outside 0 … L−1.
    """
    if num_layers < 1:
        raise InputError(f"a model needs at least 1 block; num_layers is {num_layers}.")
    if not 0 <= layer_idx < num_layers:
        raise InputError(f"layer_idx must lie in 0 … {num_layers - 1} for {num_layers} blocks; got {layer_idx}.")
    if not isinstance(name, str):
        raise unknown("depth rule", name, depth_rule_names())
    found = _ARGUMENTS.fullmatch(name)
    word, given = found.groups() if found else (name, None)
    factor_name, *suffixes = word.split(":")
    ffn_only = suffixes[:1] == ["ffn"]
    places = suffixes[ffn_only:]
    known = word in _NAMED or (factor_name in _FACTORS and len(places) <= 1 and set(places) <= set(_PLACES))
    if not known:
        raise unknown("depth rule", name, depth_rule_names())
    arguments = _numbers(name, (places or [word])[0], given)
    if word in _NAMED:
        return DepthRule(name, **_without_ones(_NAMED[word](num_layers, layer_idx, *arguments)))
    c = _FACTORS[factor_name](num_layers, layer_idx)
    branches: tuple[Branch, ...] = ("ffn",) if ffn_only else ("attn", "ffn")
    outputs = {OUTPUTS[branch]: c for branch in branches}
    everywhere = {role: c for branch in branches for role in MATRICES[branch]}
    constants = dict(zip(MATRICES, arguments or (1.0, 1.0), strict=True))
    tables: dict[str, dict[str, Any]] = {
        "": {"init": outputs},
        "forward": {"forward": dict.fromkeys(branches, c)},
        "init+lr": {"init": outputs, **_slowed(outputs)},
        "forward+lr": {"forward": dict.fromkeys(branches, c), **_slowed(everywhere)},
        "gain": {"output_gain": {branch: constants[branch] * c for branch in branches}},
    }
    return DepthRule(name, **_without_ones(tables["".join(places)]))


def _slowed(factors: Mapping[Role, float]) -> dict[str, Any]:
    """Learning rate × c, weight decay ÷ c."""
    return {"learning_rate": factors, "weight_decay": {role: 1 / c for role, c in factors.items()}}


def _without_ones(tables: dict[str, Any]) -> dict[str, Any]:
    return {k: {key: c for key, c in t.items() if c != 1.0} if isinstance(t, dict) else t for k, t in tables.items()}


def _numbers(name: str, word: str, given: str | None) -> list[float]:
    """The arguments in brackets after a word of a rule's name."""
    try:
        numbers = [] if given is None else [float(part) for part in given.split(",")]
    except ValueError:
        numbers = [math.nan]
    count = _TAKES.get(word, 0)
    if len(numbers) not in (0, count) or not all(0 < number < math.inf for number in numbers):
        takes = f"{count} positive number{'s' if count > 1 else ''} in brackets, or none" if count else "no numbers"
        raise InputError(f"depth rule {name!r}: {word!r} takes {takes}.")
    return numbers


def depth_rule_names() -> list[str]:
    """Every name that `depth_rule` takes, without arguments."""
    places = ["", *(f":{place}" for place in _PLACES)]
    return [*_NAMED, *(f + branch + place for f in _FACTORS for branch in ("", ":ffn") for place in places)]


BASE_INITS: Mapping[str, float | None] = {
    "fan_in": None,
    "normal": None,
    "normal_cut": 3.0,
    "megatron": 3.0,
    "small": None,
    "xavier": None,
    "tiny": None,
}
"""Every base init, and at how many σ its draw is cut (None: it is not cut)."""


def base_std(
    role: Role,
    fan_in: int,
    fan_out: int,
    *,
    width: int,
    base_init: str = "fan_in",
    initializer_range: float = 0.02,
    tied: bool = False,
    num_layers: int = 1,
) -> float:
    """The σ of a parameter before any depth rule: one table, role → σ.

    | role | `fan_in` (ours) | `xavier` | `normal`, `normal_cut` | `megatron`, `small` (arXiv 1910.05895) |
    |---|---|---|---|---|
    | body matrices, router, projection | fan_in^-1/2 | √(2/(fan_in + fan_out)) | `initializer_range` | (2.5 d)^-1/2 |
    | head | d^-1/2 | d^-1/2 | `initializer_range` | (2.5 d)^-1/2 |
    | embedding | 1 | 1 | `initializer_range` | (2.5 d)^-1/2 |
    | embedding tied to the head (then times √d on input) | d^-1/2 | d^-1/2 | `initializer_range` | (2.5 d)^-1/2 |
    | norm, bias, learned gain | 0: constant | 0 | 0 | 0 |

    `tiny` (TinyInit, Pangu Ultra, arXiv 2504.07866): (2 d L)^-1/2 for every matrix and the head, L blocks. Our
    reading: the embedding is as in `fan_in`, so that the branches' outputs do not outweigh it.

    Args:
        fan_in: the length of a row, so the number of inputs; for embedding and head the width d.
        fan_out: the number of rows.
        width: d, the model's hidden size.
        tied: whether embedding and head share one matrix.
        num_layers: L, which only `tiny` uses.
    """
    one_of("base_init", base_init, BASE_INITS)
    if role in ("norm", "bias", "gain"):
        return 0.0
    if base_init in ("normal", "normal_cut"):
        return initializer_range
    if base_init in ("megatron", "small"):
        return (2.5 * width) ** -0.5
    if role == "embedding":
        return width**-0.5 if tied else 1.0
    if base_init == "tiny" and not (role == "head" and tied):
        return float((2 * width * num_layers) ** -0.5)
    if base_init == "xavier" and role != "head":
        return (2 / (fan_in + fan_out)) ** 0.5
    return fan_in**-0.5


def cut_std(cut: float) -> float:
    """The std of a standard normal in which values beyond ±cut are drawn again."""
    inside = math.erf(cut / 2**0.5)
    return (1 - 2 * cut * math.exp(-cut * cut / 2) / (2 * math.pi) ** 0.5 / inside) ** 0.5
