"""Figures across conditions: loss and best learning rate against depth (or width), and how high a rate is tolerated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from spannorm.lab.report.arms import Arm
from spannorm.lab.report.figures.panels import MAX_ARMS, Drawing, limits, panels, plain_log
from spannorm.lab.report.looks import Look
from spannorm.lab.results.files import LARGEST
from spannorm.lab.results.groups import condition_words
from spannorm.lab.results.statistics import estimate
from spannorm.lab.results.tolerance import Tolerance
from spannorm.train.ramp import SHARE, SHARES

_NAMES = {"num_hidden_layers": "blocks", "hidden_size": "width"}
Condition = Mapping[str, Any]
ArmsThere = tuple[Condition, Sequence[Arm]]
"""A condition, and the arms under it."""


def draw_conditions(arms_by_condition: Sequence[ArmsThere]) -> list[Drawing]:
    """Loss and best learning rate against each number that the conditions differ in, all else equal."""
    drawings: list[Drawing | None] = []
    conditions = [condition for condition, _ in arms_by_condition]
    for key in _axes(conditions):
        groups: dict[str, list[ArmsThere]] = {}
        others = _others(conditions, key)
        for condition, arms in arms_by_condition:
            groups.setdefault(json.dumps({k: condition.get(k) for k in others}), []).append((condition, arms))
        several = [(rest, group) for rest, group in groups.items() if len(group) > 1]
        drawings += [_against(key, json.loads(rest), group, i) for i, (rest, group) in enumerate(several)]
    return [drawing for drawing in drawings if drawing is not None]


def _axes(conditions: Sequence[Condition]) -> list[str]:
    """The numbers that vary, depth first, without those that another one decides, as depth does width at fixed size."""
    keys = sorted(
        dict.fromkeys(k for condition in conditions for k in condition),
        key=lambda k: not k.endswith("num_hidden_layers"),
    )
    axes: list[str] = []
    for key in keys:
        values = [condition.get(key) for condition in conditions]
        varies = all(_number(v) for v in values) and len(set(values)) > 1
        if varies and all(key in _others(conditions, axis) for axis in axes):
            axes.append(key)
    return axes


def _number(value: Any) -> bool:
    """Whether a figure can have it on an axis: true and false are names, not 1 and 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _scale(ax: Any, known: Sequence[float]) -> None:
    """A log axis where every value has a logarithm, else a linear one; each value is marked."""
    ax.set_xscale("log" if known[0] > 0 else "linear")
    ax.set_xticks(known, [f"{value:g}" for value in known])
    ax.minorticks_off()


def _others(conditions: Sequence[Condition], key: str) -> list[str]:
    """The keys that vary at one value of the axis; what changes with the axis, as width at fixed size, is not one."""
    by_x: dict[Any, list[Condition]] = {}
    for condition in conditions:
        by_x.setdefault(condition[key], []).append(condition)
    names = dict.fromkeys(k for condition in conditions for k in condition if k != key)
    return [k for k in names if any(len({json.dumps(c.get(k)) for c in alike}) > 1 for alike in by_x.values())]


def _against(key: str, rest: Condition, group: Sequence[ArmsThere], number: int) -> Drawing | None:
    if not any(run.status in ("ok", "failed") for _, arms in group for arm in arms for run in arm.runs):
        return None
    group = sorted(group, key=lambda pair: pair[0][key])
    arms = list({arm.label: replace(arm, runs=[]) for _, arms in group for arm in arms}.values())[:MAX_ARMS]
    fig, axes, label = panels(2, arms)
    known = [condition[key] for condition, _ in group]
    losses, ends, best = list[float](), {}, set[float]()
    for arm in arms:
        there = [(condition[key], a) for condition, arms_there in group for a in arms_there if a.label == arm.label]
        losses += _losses_against(axes[0], arm, there)
        rates = _rates_against(axes[1], arm, [(x, a) for x, a in there if a.final_losses])
        best.update(rate for _, rate in rates)
        if rates and rates[-1][0] == known[-1]:
            ends[arm.label] = rates[-1][1]
    if losses:
        axes[0].set_ylim(*limits(losses))
    if best:
        axes[1].set_yscale("log")
        axes[1].set_yticks(sorted(best), [f"{rate:.3g}" for rate in sorted(best)])
    what = _name(key)
    for ax in axes:
        _scale(ax, known)
        ax.set_xlabel(what, parse_math=False)
    axes[0].set(title="loss at its best learning rate", ylabel="loss (nats per token)")
    axes[1].set(title="best learning rate")
    label(axes[1], ends)
    caption = (
        f"Each arm at its own best learning rate against {what}{f' ({condition_words(rest)})' if rest else ''}. Left: "
        "mean over the seeds that did not fail, and every seed (the test split where it was confirmed on fresh seeds, "
        "else validation); an arm with a ✕ on the upper edge has no such seed. Right: that learning rate, a ring where "
        "it lies on the edge of those tried."
    )
    return Drawing(f"against_{what}{number or ''}", f"Loss against {what}", caption, fig)


def _losses_against(ax: Any, arm: Arm, there: Sequence[tuple[Any, Arm]]) -> list[float]:
    """Draw an arm's losses, and a cross where every seed failed; returns the means.

    Args:
        there: the arm at each value of the axis.
    """
    points, lost = [], []
    for x, at in there:
        loss = estimate(at.final_losses)
        if loss is None:
            lost.append(x)
            continue
        points.append((x, loss.mean))
        ax.plot([x] * loss.count, at.final_losses, "o", color=arm.look.color, markersize=2.5)
    ax.plot(*_columns(points), linewidth=1.4, label=arm.label, **arm.look.line)
    for x in lost:
        ax.plot(x, 0.985, "x", color=arm.look.color, markersize=5, markeredgewidth=1.6, clip_on=False,
                transform=ax.get_xaxis_transform())  # fmt: skip
    return [mean for _, mean in points]


def _rates_against(ax: Any, arm: Arm, there: Sequence[tuple[Any, Arm]]) -> list[tuple[Any, float]]:
    """Draw an arm's best learning rates, with a ring where one lies on the edge of those tried; returns them."""
    points = []
    for x, at in there:
        best, tried = at.learning_rate, [rate.learning_rate for rate in at.rates]
        if best and best > 0:
            points.append((x, best, len(tried) > 1 and best in (tried[0], tried[-1])))
    ax.plot(*_columns([(x, rate) for x, rate, _ in points]), linewidth=1.4, label=arm.label, **arm.look.line)
    for x, rate, edge in points:
        ax.plot(x, rate, "o", color=arm.look.color, markersize=4.5, markerfacecolor="white" if edge else None)
    return [(x, rate) for x, rate, _ in points]


def _name(key: str) -> str:
    """What an axis is called."""
    name = key.rpartition(".")[2]
    return _NAMES.get(name, name)


def _columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def draw_tolerances(ramps: Sequence[Tolerance], looks: Mapping[tuple[str, str], Look], peak: float) -> list[Drawing]:
    """The largest tolerable learning rate against the conditions' first number, in the order of the conditions."""
    key = next(iter(_axes([ramp.condition for ramp in ramps])), None)
    known = sorted({ramp.condition[key] for ramp in ramps}) if key else [0]
    names = list(dict.fromkeys((ramp.placement, ramp.arm.partition(" ")[2]) for ramp in ramps))[:MAX_ARMS]
    arms = [Arm(*name, looks[name], [], None, []) for name in names]
    fig, (ax,), label = panels(1, arms)
    ax.set_yscale("log")
    low = min((rate for ramp in ramps for share in SHARES if (rate := ramp.rate(share))), default=peak / 10) / 2
    ax.set_ylim(low, peak * 1.5)
    ends = {}
    for i, arm in enumerate(arms):
        apart = i - len(arms) / 2  # arms at one value stand side by side
        its_ramps = [ramp for ramp in ramps if ramp.arm == f"{arm.placement} {arm.variant}"]
        points = []
        for ramp in sorted(its_ramps, key=lambda ramp: ramp.condition[key] if key else 0):
            x = ramp.condition[key] if key else 1
            if key and known[0] <= 0:
                x += 0.006 * apart * (known[-1] - known[0])
            else:
                x *= 1 + (0.012 if key else 0.03) * apart
            rate = _tolerance(ax, arm, ramp, x, low, peak)
            if rate is not None:
                ends[arm.label] = rate
            if ramp.rate() is not None:
                points.append((x, rate))
        ax.plot(*_columns(points), marker="o", markersize=4.5, linewidth=1.3, label=arm.label, **arm.look.line)
    if key:
        _scale(ax, known)
        ax.set_xlabel(_name(key), parse_math=False)
    else:
        ax.set_xticks([])
    ax.set_ylabel("learning rate")
    plain_log(ax.yaxis)
    label(ax, ends)
    caption = (
        f"The rate at which {SHARE:.0%} of what was learned below a unigram model was lost again, on a ramp up to "
        f"{peak:g}: geometric mean over the seeds, and every seed. The bar reaches from {SHARES[0]:.0%} to "
        f"{SHARES[-1]:.0%} and shows how much hangs on the threshold. A triangle took the whole ramp; a ✕ at the "
        "bottom never learned."
    )
    return [Drawing("tolerance", "Largest tolerable learning rate", caption, fig)]


def _tolerance(ax: Any, arm: Arm, ramp: Tolerance, x: float, low: float, peak: float) -> float | None:
    """Draw one arm under one condition; returns where its name belongs, None where it never learned."""
    seeds, rate = ramp.rates[f"{SHARE:g}"], ramp.rate()
    if not seeds:
        ax.plot(x, low, "x", color=arm.look.color, markersize=5, markeredgewidth=1.6, clip_on=False)
        return None
    if rate is None:
        ax.plot(x, peak, "^", color=arm.look.color, markersize=5, clip_on=False)
        return peak
    bar = [r for share in (SHARES[0], SHARES[-1]) if (r := ramp.rate(share))]
    ax.plot([x] * len(bar), bar, color=arm.look.color, linewidth=0.8, alpha=0.7)
    reached = [r for r in seeds if r]
    ax.plot([x] * len(reached), reached, "o", markersize=2.5, color=arm.look.color)
    return rate
