"""Which placements are tested under which depth rules, and what each placement consists of, written by hand."""

from __future__ import annotations

import pytest

from spannorm.placements import PLACEMENTS
from spannorm.scaling import depth_rule_names

FULL = ("pre", "post", "span")
"""The placements that meet every depth rule; the others meet their own and some that stand for their kind."""

DEFAULT_RULE = dict.fromkeys(PLACEMENTS, "none") | {
    "pre": "1/sqrt(2L)", "span": "1/sqrt(L)", "hybrid": "1/sqrt(2L)", "hybrid_star": "1/sqrt(2L)",
    "deepnorm": "deepnorm", "subln": "subln",
}  # fmt: skip
REPRESENTATIVE = ("none", "1/sqrt(L)", "1/sqrt(2L):forward", "rezero")
TWO_STREAMS = ("residual", "siamese")
NO_FINAL_NORM = ("post", "span", "deepnorm", "residual", "siamese", "keel")

DISCOURAGED = pytest.mark.filterwarnings("ignore:LayerNormScaling with depth rule '1/sqrt")
"""Its authors warn against an init factor on the outputs; the arms below run it all the same."""


def rules_of(placement: str) -> list[str]:
    if placement in FULL:
        return depth_rule_names()
    return list(dict.fromkeys([DEFAULT_RULE[placement], *REPRESENTATIVE]))


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
