"""The theory as one page to play with: choose placement, depth rule and depth, and see variance and gradient by block.

Every number in the page was computed by `spannorm.theory` beforehand. The page's script looks them up and draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from spannorm import theory
from spannorm.errors import InputError
from spannorm.files import write_text
from spannorm.lab.charts.library import INSTALL, library, own_scripts, packed_json, rounded
from spannorm.lab.depth.theory import Case
from spannorm.text import plain_in

WIDTHS = (1, 2, 4, 8)
"""Multiples of the recipe's width that the page offers, where the theory's numbers depend on the width."""
_POINTS = 80  # blocks of a curve
_SAME = 1e-6  # predictions at two widths that differ by less are one
_SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)


@dataclass(frozen=True)
class Stacks:
    """What a page holds: a prediction, or the reason why there is none, for every stack at every width."""

    entries: list[dict[str, Any]]
    widths: list[int]
    """One, where the width does not matter."""


def write_explorer(chosen: Sequence[Case], file: Path, on_case: Callable[[Case], None] = lambda _: None) -> None:
    """Write the page for these stacks.

    Args:
        chosen: every combination that can be chosen on the page.
        file: one HTML file that needs no network.
        on_case: called before each stack.

    Raises:
        InputError: Bokeh, whose JavaScript draws the curves, is not installed.
    """
    bokeh = library()
    if bokeh is None:
        raise InputError(f"the page of --html is drawn with Bokeh, which is not installed: {INSTALL}")
    stacks = predicted(chosen, on_case)
    recipe = chosen[0].recipe
    page = _environment().get_template("explorer.html.jinja").render(
        name=recipe.name, body=chosen[0].body, widths=stacks.widths, library=bokeh,
        own_scripts=own_scripts("charts/live.js", "depth/explorer.js"),
        numbers=packed_json(plain_in({"entries": stacks.entries, "widths": stacks.widths})), factor=theory.FACTOR,
    )  # fmt: skip
    write_text(file, page)


def predicted(chosen: Sequence[Case], on_case: Callable[[Case], None] = lambda _: None) -> Stacks:
    """The theory of every stack, at several widths where these differ."""
    width = chosen[0].body.hidden_size
    factors = WIDTHS if width_matters(chosen) else (1,)
    entries = []
    for case in chosen:
        on_case(case)
        entries += [{"width": width * factor, **_entry(wider(case, factor))} for factor in factors]
    return Stacks(entries, [width * factor for factor in factors])


def wider(case: Case, factor: int) -> Case:
    """The same stack in a model that is so many times as wide, with heads of the same size."""
    sizes = {name: factor * size for name in _SIZES if (size := getattr(case.body, name))}
    return replace(case, body=replace(case.body, **sizes))


def width_matters(chosen: Sequence[Case]) -> bool:
    """Whether the prediction of any placement and rule, at its least depth, differs at eight times the width."""
    least: dict[tuple[str, str], Case] = {}
    for case in sorted(chosen, key=lambda case: case.key[2]):
        least.setdefault(case.key[:2], case)

    def numbers(case: Case) -> list[float]:
        p = case.predicted()
        return [p.log_total_gain, p.log_skip_gain, *(math.log(v) for v in p.variance["output"] if v > 0)]

    for case in least.values():
        try:
            if not np.allclose(numbers(case), numbers(wider(case, WIDTHS[-1])), rtol=0, atol=_SAME):
                return True
        except theory.NoRule:
            continue
    return False


def _entry(case: Case) -> dict[str, Any]:
    placement, rule, depth = case.key
    stack = {"placement": placement, "rule": rule, "depth": depth}
    try:
        p = case.predicted()
    except theory.NoRule as error:
        return {**stack, "unpredicted": str(error)}
    at = np.unique(np.linspace(0, len(p.blocks) - 1, min(_POINTS, len(p.blocks))).round().astype(int))

    def along(values: Sequence[float]) -> list[float | None]:
        return rounded((values[i] for i in at), 4)

    return stack | {
        "blocks": [p.blocks[i] for i in at],
        "variance": {site: along(values) for site, values in p.variance.items()},
        "gradient": along([_amplitude(value) for value in p.log_gradient]),
        "skip": along([_amplitude(value) for value in p.log_skip]),
        "words": [
            f"Gradient, from the stack's output to its input: {theory.times(p.log_total_gain)}.",
            f"Skip path alone: {theory.times(p.log_skip_gain)}.",
            f"Share of the gradient's power that passed through attention {p.total_attention_share:.0%}, "
            f"through feed-forwards {p.total_ffn_share:.0%}.",
            f"Variance of what leaves the last block: {p.variance['output'][-1]:.3g}.",
        ],
    }


def _amplitude(log: float) -> float:
    return math.exp(min(max(log, -690.0), 690.0))  # what a float64 can hold


def _environment() -> Environment:
    loaders = [PackageLoader(f"spannorm.lab.{room}", ".") for room in ("depth", "charts")]
    return Environment(loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)  # fmt: skip
