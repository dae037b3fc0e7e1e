"""The ladder's picture: loss against compute with its curves, and what one arm saves over another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spannorm.lab.ladder.fit import Fit
from spannorm.lab.report.arms import Arm
from spannorm.lab.report.figures.panels import Drawing, panels, plain_log
from spannorm.lab.report.looks import Look


def draw_ladder(ladder: Mapping[str, Any], looks: Mapping[tuple[str, str], Look]) -> list[Drawing]:
    """Nothing until there is a fit."""
    if not ladder.get("fit"):
        return []
    drawings = [_curves(ladder, looks)]
    return drawings + ([_multipliers(ladder, looks)] if ladder["pairs"] else [])


def _arms(names: Sequence[str], looks: Mapping[tuple[str, str], Look]) -> list[Arm]:
    keys = [(name.partition(" ")[0], name.partition(" ")[2]) for name in names]
    return [Arm(*key, looks[key], [], None, []) for key in keys if key in looks]


def _curve(ladder: Mapping[str, Any]) -> Fit:
    fit = ladder["fit"]
    powers = {arm: tuple((t["loss_at_scale"], t["exponent"]) for t in terms) for arm, terms in fit["arms"].items()}
    return Fit(fit["irreducible"], tuple(fit["scales"]), powers, ())


def _curves(ladder: Mapping[str, Any], looks: Mapping[tuple[str, str], Look]) -> Drawing:
    curve = _curve(ladder)
    arms = _arms(list(curve.powers), looks)
    fig, (ax,), label = panels(1, arms)
    sizes = [rung["compute"] for rung in ladder["rungs"] if rung["kind"] == "size"]
    x = np.geomspace(min(sizes) / 1.5, max(sizes) * 3, 100)
    ends = {}
    for i, arm in enumerate(arms):
        name, aside = f"{arm.placement} {arm.variant}", 1.04 ** (i - (len(arms) - 1) / 2)
        points = [p for p in ladder["points"] if p["arm"] == name and p["kind"] == "size"]
        y = [curve.loss(name, c) for c in x]
        ax.plot(x, y, linewidth=1.2, label=arm.label, **arm.look.line)
        ax.plot([p["compute"] * aside for p in points], [p["loss"] for p in points], "o", markersize=3.2,
                label=f"{arm.label}, runs", color=arm.look.color)  # fmt: skip
        predicted = ((ladder["prediction"] or {}).get("losses") or {}).get(name)
        if predicted:
            interval = [predicted["low"], predicted["high"]]
            ax.plot([max(sizes) * aside] * 2, interval, linewidth=3.5, alpha=0.25, color=arm.look.color,
                    label=f"{arm.label}, predicted interval")  # fmt: skip
        ends[arm.label] = y[-1]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("training compute, 6·N·D operations")
    ax.set_ylabel("test loss, nats per token")
    plain_log(ax.yaxis)
    label(ax, ends)
    caption = (
        "Every run at its arm's own learning rate, the arms of one size side by side, and the curve E + A·C^-α through "
        f"them, E = {curve.irreducible:.3f} shared by all. The pale bar at the largest size is the interval predicted "
        "from the smaller sizes before it was run. Right of it the curves are extrapolation."
    )
    return Drawing("ladder", "Loss against compute", caption, fig)


def _multipliers(ladder: Mapping[str, Any], looks: Mapping[tuple[str, str], Look]) -> Drawing:
    names = list(dict.fromkeys(pair["first"] for pair in ladder["pairs"]))
    seconds = list(dict.fromkeys(pair["second"] for pair in ladder["pairs"]))
    fig, axes, label = panels(len(seconds), _arms(names, looks), share=True)
    by_name = {f"{arm.placement} {arm.variant}": arm for arm in _arms(names, looks)}
    for ax, second in zip(axes, seconds, strict=True):
        ends = {}
        for pair in (p for p in ladder["pairs"] if p["second"] == second and p["first"] in by_name):
            arm, rows = by_name[pair["first"]], pair["multipliers"]
            x = [row["compute"] for row in rows]
            known = [row for row in rows if not row["extrapolated"]]
            ax.plot([r["compute"] for r in known], [r["multiplier"] for r in known], marker="o", markersize=3.5,
                    label=arm.label, **arm.look.line)  # fmt: skip
            ax.plot(x[len(known) - 1 :], [r["multiplier"] for r in rows[len(known) - 1 :]], ":", linewidth=1.0,
                    color=arm.look.color, label=f"{arm.label}, extrapolated")  # fmt: skip
            ax.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=arm.look.color, alpha=0.13,
                            linewidth=0)  # fmt: skip
            ends[arm.label] = rows[-1]["multiplier"]
        ax.axhline(1.0, color="#666666", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"over {second}", parse_math=False)
        ax.set_xlabel("training compute, operations")
        plain_log(ax.yaxis)
        if ax is axes[-1]:
            label(ax, ends)
    axes[0].set_ylabel("compute multiplier")
    caption = (
        "How many times an arm's compute the other arm takes to the same loss: above 1 the arm saves compute. Bands "
        "are 95 % intervals by bootstrap over sizes and seeds; dotted lines are extrapolation."
    )
    return Drawing("ladder_multipliers", "Compute multiplier", caption, fig)
