"""Figures across conditions: loss and best learning rate against depth (or width), and how high a rate is tolerated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

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


def draw_conditions(races: Sequence[ArmsThere]) -> list[Drawing]:
    """Loss and best learning rate against each number that the conditions differ in, all else equal."""
    drawings: list[Drawing | None] = []
    for key in _axes([condition for condition, _ in races]):
        groups: dict[str, list[ArmsThere]] = {}
        others = _others([condition for condition, _ in races], key)
        for condition, arms in races:
            groups.setdefault(json.dumps({k: condition.get(k) for k in others}), []).append((condition, arms))
        several = [(rest, of) for rest, of in groups.items() if len(of) > 1]
        drawings += [_against(key, json.loads(rest), of, i) for i, (rest, of) in enumerate(several)]
    return [drawing for drawing in drawings if drawing is not None]


def _axes(conditions: Sequence[Condition]) -> list[str]:
    """The numbers that vary, depth first, without those that another one decides, as depth does width at fixed size."""
    keys = sorted(
        dict.fromkeys(k for condition in conditions for k in condition),
        key=lambda k: not k.endswith("num_hidden_layers"),
    )
    found: list[str] = []
    for key in keys:
        values = [condition.get(key) for condition in conditions]
        varies = all(_number(v) for v in values) and len(set(values)) > 1
        if varies and all(key in _others(conditions, axis) for axis in found):
            found.append(key)
    return found


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
    return [k for k in names if any(len({json.dumps(c.get(k)) for c in of}) > 1 for of in by_x.values())]


def _against(key: str, rest: Condition, races: Sequence[ArmsThere], number: int) -> Drawing | None:
    if not any(run.status in ("ok", "failed") for _, arms in races for arm in arms for run in arm.runs):
        return None
    races = sorted(races, key=lambda race: race[0][key])
    arms = list({arm.label: replace(arm, runs=[]) for _, arms in races for arm in arms}.values())[:MAX_ARMS]
    fig, axes, label = panels(2, arms)
    known = [condition[key] for condition, _ in races]
    losses, end, drawn = [], {}, list[Any]()
    for arm in arms:
        points, lost, rates = [], [], []
        for condition, of in races:
            here = next((a for a in of if a.label == arm.label), None)
            if here is None:
                continue
            loss = estimate(here.final_losses)
            if loss is None:
                lost.append(condition[key])
                continue
            points.append((condition[key], loss.mean))
            losses.append(loss.mean)
            tried = [rate.learning_rate for rate in here.rates]
            rates.append(
                (condition[key], here.learning_rate, len(tried) > 1 and here.learning_rate in (tried[0], tried[-1]))
            )
            axes[0].plot([condition[key]] * loss.count, here.final_losses, "o", color=arm.look.color, markersize=2.5)
        axes[0].plot(*_columns(points), linewidth=1.4, label=arm.label, **arm.look.line)
        for x in lost:
            axes[0].plot(x, 0.985, "x", color=arm.look.color, markersize=5, markeredgewidth=1.6, clip_on=False,
                         transform=axes[0].get_xaxis_transform())  # fmt: skip
        rates = [(x, rate, edge) for x, rate, edge in rates if rate and rate > 0]
        drawn += rates
        axes[1].plot(*_columns([(x, rate) for x, rate, _ in rates]), linewidth=1.4, label=arm.label, **arm.look.line)
        for x, rate, edge in rates:
            axes[1].plot(x, rate, "o", color=arm.look.color, markersize=4.5, markerfacecolor="white" if edge else None)
        if rates and rates[-1][0] == known[-1]:
            end[arm.label] = float(rates[-1][1] or np.nan)
    if losses:
        axes[0].set_ylim(*limits(losses))
    name = key.rpartition(".")[2]
    what = _NAMES.get(name, name)
    for ax in axes:
        _scale(ax, known)
        ax.set_xlabel(what, parse_math=False)
    axes[0].set(title="loss at its best learning rate", ylabel="loss (nats per token)")
    axes[1].set(title="best learning rate")
    if drawn:
        axes[1].set_yscale("log")
        plain_log(axes[1].yaxis)
    label(axes[1], end)
    caption = (
        f"Each arm at its own best learning rate against {what}{f' ({condition_words(rest)})' if rest else ''}. Left: "
        "mean over the seeds that held, and every seed (the test split where it was confirmed on fresh seeds, else "
        "validation); an arm with a ✕ on the upper edge has none that held. Right: that learning rate, a ring where it "
        "lies on the edge of those tried."
    )
    return Drawing(f"against_{what}{number or ''}", f"Loss against {what}", caption, fig)


def _columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    return [float(x) for x, _ in points], [float(y) for _, y in points]


def draw_tolerances(found: Sequence[Tolerance], looks: Mapping[tuple[str, str], Look], peak: float) -> list[Drawing]:
    """The largest tolerable learning rate against the conditions' first number, in the order of the conditions."""
    key = next(iter(_axes([t.condition for t in found])), None)
    known = sorted({t.condition[key] for t in found}) if key else [0]
    keys = list(dict.fromkeys((t.placement, t.arm.partition(" ")[2]) for t in found))[:MAX_ARMS]
    arms = [Arm(*key, looks[key], [], None, []) for key in keys]
    fig, (ax,), label = panels(1, arms)
    ax.set_yscale("log")
    rates = [rate for t in found for share in SHARES if (rate := t.rate(share))]
    low = min(rates, default=peak / 10) / 2
    ax.set_ylim(low, peak * 1.5)
    end = {}
    for i, arm in enumerate(arms):
        apart = i - len(arms) / 2  # arms at one value stand side by side
        points = []
        mine = [t for t in found if t.arm == f"{arm.placement} {arm.variant}"]
        for t in sorted(mine, key=lambda t: t.condition[key] if key else 0):
            x, rate = t.condition[key] if key else 1, t.rate()
            if key and known[0] <= 0:
                x += 0.006 * apart * (known[-1] - known[0])
            else:
                x *= 1 + (0.012 if key else 0.03) * apart
            if not t.rates[f"{SHARE:g}"]:
                ax.plot(x, low, "x", color=arm.look.color, markersize=5, markeredgewidth=1.6, clip_on=False)
            elif rate is None:
                ax.plot(x, peak, "^", color=arm.look.color, markersize=5, clip_on=False)
                end[arm.label] = peak
            else:
                points.append((x, rate))
                end[arm.label] = rate
                ends = [r for share in (SHARES[0], SHARES[-1]) if (r := t.rate(share))]
                ax.plot([x] * len(ends), ends, color=arm.look.color, linewidth=0.8, alpha=0.7)
                ax.plot([x] * len(seeds := [r for r in t.rates[f"{SHARE:g}"] if r]), seeds, "o", markersize=2.5,
                        color=arm.look.color)  # fmt: skip
        ax.plot(*_columns(points), marker="o", markersize=4.5, linewidth=1.3, label=arm.label, **arm.look.line)
    if key:
        _scale(ax, known)
        ax.set_xlabel(_NAMES.get(key.rpartition(".")[2], key.rpartition(".")[2]), parse_math=False)
    else:
        ax.set_xticks([])
    ax.set_ylabel("learning rate")
    plain_log(ax.yaxis)
    label(ax, end)
    caption = (
        f"The rate at which {SHARE:.0%} of what was learned below a unigram model was lost again, on a ramp up to "
        f"{peak:g}: geometric mean over the seeds, and every seed. The bar reaches from {SHARES[0]:.0%} to "
        f"{SHARES[-1]:.0%} and shows how much hangs on the threshold. A triangle took the whole ramp; a ✕ at the "
        "bottom never learned."
    )
    return [Drawing("tolerance", "Largest tolerable learning rate", caption, fig)]
