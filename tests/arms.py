"""Which placements are tested under which depth rules, and what the rules do to each matrix, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from facts import FACTS

from spannorm.placements import PLACEMENTS

NAMED_RULES = (
    *("none", "deepnorm", "subln", "rezero", "layerscale"),
    *("ds-init", "wang", "torchtitan", "completep", "depth-mup"),
)
FULL = ("pre", "post", "span")
"""The placements that meet every depth rule; the others meet their own and some that stand for their kind."""

DEFAULT_RULE = {name: fact.rule for name, fact in FACTS.items()}
FULL_RULES = [
    *NAMED_RULES,
    *(f"1/sqrt(L){branch}{place}" for branch in ("", ":ffn") for place in ("", ":forward", ":init+lr", ":forward+lr")),
    *("1/sqrt(2L)", "1/sqrt(2L):ffn:forward", "1/L:init+lr", "1/L:ffn:forward"),
    *("1/sqrt(2(b+1))", "1/sqrt(b+1):forward+lr"),
]
"""Every name, every place and every factor; `:gain` is for placements with norms on their branches' outputs."""
REPRESENTATIVE = ("none", "1/sqrt(L)", "1/sqrt(2L):forward", "rezero")
SEVERAL_STREAMS = [name for name, fact in FACTS.items() if fact.several]
NO_FINAL_NORM = [name for name, fact in FACTS.items() if not fact.final_norm]

DISCOURAGED = pytest.mark.filterwarnings("ignore:LayerNormScaling with depth rule '1/sqrt")
"""Its authors warn against an init factor on the outputs; the arms below run it all the same."""


def rules_of(placement: str) -> list[str]:
    if placement in FULL:
        return FULL_RULES
    gains = ["1/sqrt(L):gain(0.283,0.432)"] if len(FACTS[placement].output_norms) == 2 else []
    return list(dict.fromkeys([DEFAULT_RULE[placement], *REPRESENTATIVE, *gains]))


def arm(placement: str, rule: str):
    warned = placement == "lns" and rule in ("1/sqrt(L)", "1/sqrt(2L)")
    return pytest.param(placement, rule, marks=[DISCOURAGED] if warned else [], id=f"{placement}-{rule}")


ARMS = [arm(placement, rule) for placement in PLACEMENTS for rule in rules_of(placement)]

TIED_ARMS = [
    pytest.param(*a.values, tied, marks=a.marks, id=f"{a.id}-{'tied' if tied else 'untied'}")
    for i, a in enumerate(ARMS)
    for tied in ((False, True) if a.values[0] in FULL else (i % 2 == 0,))
]
"""Each arm with embedding and head apart and as one; of the others, one of the two."""

OUT, BODY = ("o_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What a rule multiplies the std of at block b of L, and by how much.
_NAMED: dict[str, tuple[tuple[str, ...], Callable[[int, int], float]]] = {
    "deepnorm": (BODY[2:], lambda b, L: (8 * L) ** -0.25),
    "subln": (BODY[2:], lambda b, L: math.sqrt(math.log(2 * L))),
    "ds-init": (BODY, lambda b, L: 1 / math.sqrt(b + 1)),
    "wang": (OUT, lambda b, L: math.sqrt(10) / L),
    "torchtitan": (("o_proj", "up_proj", "down_proj"), lambda b, L: 1 / math.sqrt(2 * b + 2)),
}
_FACTORS: dict[str, Callable[[int, int], float]] = {
    "1/sqrt(L)": lambda b, L: 1 / math.sqrt(L),
    "1/sqrt(2L)": lambda b, L: 1 / math.sqrt(2 * L),
    "1/L": lambda b, L: 1 / L,
    "1/sqrt(b+1)": lambda b, L: 1 / math.sqrt(b + 1),
    "1/sqrt(2(b+1))": lambda b, L: 1 / math.sqrt(2 * b + 2),
}


def init_factor(rule: str, leaf: str, b: int, L: int) -> float:
    """The factor on a matrix's std."""
    word, *more = rule.split(":")
    scaled, c = _NAMED.get(rule) or ((OUT[1:] if "ffn" in more else OUT), _FACTORS.get(word, lambda b, L: 1.0))
    elsewhere = any(place.startswith(("forward", "gain")) for place in more)
    return c(b, L) if leaf in scaled and not elsewhere else 1.0


def rate_factor(rule: str, leaf: str, b: int, L: int) -> float:
    """The factor on a matrix's learning rate."""
    if rule == "depth-mup":
        return (L / 2) ** -0.5  # its base depth
    word, *more = rule.split(":")
    if more[-1:] == ["forward+lr"] and leaf in (BODY[4:] if "ffn" in more else BODY):
        return _FACTORS[word](b, L)
    return init_factor(rule, leaf, b, L) if more[-1:] == ["init+lr"] else 1.0
