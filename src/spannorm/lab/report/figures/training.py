"""The figures of a comparison: arms in, matplotlib figures with captions out.

One hue per placement, one dash and shade per depth rule, the same in every figure and in the report's table.
Only `Figure` objects are used, never pyplot's state, so drawing leaves no trace in the calling program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spannorm.lab.report.figures.panels import (
    INK,
    WIDTH,
    band,
    cross,
    curve,
    limits,
    numbers,
    panels,
    plain_log,
    seed_note,
    shortened,
    smooth,
    why,
)
from spannorm.lab.results.arms import Arm

MAX_ARMS = 48  # more lines than this cannot be told apart by anyone; the table still has them all
_POINTS = 300  # a curve needs no more than the figure has room for


@dataclass(frozen=True)
class Drawing:
    """A figure and the words under it."""

    name: str
    title: str
    caption: str
    figure: Figure
    chart: dict[str, Any] | None = None
    """The numbers behind it, where a reader can ask for them; see `spannorm.lab.report.interactive`."""


def draw(arms: Sequence[Arm], unigram_loss: float | None) -> list[Drawing]:
    """Every figure that the arms have data for. Call it inside `matplotlib.rc_context(STYLE)`."""
    arms = arms[:MAX_ARMS]
    made = [_loss(arms, unigram_loss), _grad_norm(arms)]
    made += [_layers(arms, "gradient"), _layers(arms, "signal"), _similarity(arms)]
    return [drawing for drawing in made if drawing is not None]


def draw_rates(arms: Sequence[Arm]) -> list[Drawing]:
    """Loss by learning rate, where there are several. Call it inside `matplotlib.rc_context(STYLE)`."""
    drawing = _rates(arms[:MAX_ARMS])
    return [] if drawing is None else [drawing]


def _loss(arms: Sequence[Arm], unigram: float | None) -> Drawing | None:
    last = max((run.loss.steps[-1] for arm in arms for run in arm.runs if len(run.loss.steps)), default=0.0)
    if not last:
        return None
    window = max(1, int(last) // 20)
    grid = np.unique(np.linspace(1, last, _POINTS).round())
    bands = {arm.label: band(grid, [smooth(run.loss, window, grid) for run in arm.shown]) for arm in arms}
    held = [arm for arm in arms if not arm.failed and len(bands[arm.label][0])]
    late = 0.75 * last
    ends = [bands[arm.label] for arm in held if bands[arm.label][0][-1] >= late]
    zoom = np.concatenate([part[x >= late] for x, *parts in ends for part in parts] or [np.empty(0)])
    finals = [run.val_loss for arm in held for run in arm.shown if run.val_loss is not None]
    zoom = np.concatenate([zoom, finals])

    fig, axes, label = panels(2 if len(zoom) else 1, arms)
    everything = np.concatenate([parts[0] for _, *parts in bands.values()])
    low = float(zoom.min() if len(zoom) else everything.min())
    # Above the unigram model lie only the first steps and the failures: the room belongs to what is below.
    high = max(unigram or 0.0, float(np.quantile(everything, 0.5)))
    axes[0].set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low) + 1e-9)
    axes[0].set(title="whole run", ylabel="training loss (nats per token)", xlim=(0, last))
    if len(zoom):
        axes[1].set(title="last quarter, magnified", xlim=(late, last), ylim=limits(zoom))
    for ax in axes:
        if unigram is not None:
            ax.axhline(unigram, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    if unigram is not None:
        axes[0].annotate("unigram model", (0.93, unigram), (0, 4), xycoords=("axes fraction", "data"),
                         textcoords="offset points", ha="right", fontsize=7, color="#444444")  # fmt: skip
    end = {}
    for arm in arms:
        x, mean, lowest, highest = bands[arm.label]
        for ax in axes:
            curve(ax, arm, x, mean, lowest, highest)
            for run in arm.runs:
                if run.status == "failed" and len(run.loss.steps):
                    if not arm.failed:
                        steps = grid[grid <= run.loss.steps[-1]]
                        ax.plot(steps, smooth(run.loss, window, steps), linewidth=0.8, alpha=0.7, **arm.look.line)
                    y = smooth(run.loss, window, run.loss.steps[-1:])[0]
                    if ax is axes[0] or y <= ax.get_ylim()[1]:
                        cross(ax, run.loss.steps[-1], y, arm)
                elif run.val_loss is not None:
                    ax.plot(last, run.val_loss, "o", color=arm.look.color, markersize=4.5, markeredgecolor="white",
                            markeredgewidth=0.7, clip_on=False, zorder=5)  # fmt: skip
        if not arm.failed:
            values = [run.val_loss for run in arm.shown if run.val_loss is not None]
            if values:
                end[arm.label] = float(np.mean(values))
            elif len(mean) and x[-1] >= 0.98 * last:
                end[arm.label] = float(mean[-1])
    for ax in axes:
        ax.set_xlabel("optimizer step")
    label(axes[-1], end)
    how = f"trailing mean over {window} steps" if window > 1 else "not smoothed"
    caption = (
        f"Training loss ({how}); dots are the final validation loss. {seed_note(arms)} A line that ends in ✕ "
        "failed, with its reason beside the name. The axes are cut so that one diverged arm does not flatten the "
        "others: a ✕ on the upper edge, and a name without a leader, belong to what lies outside."
    )
    return Drawing("loss", "Loss", caption, fig)


def _rates(arms: Sequence[Arm]) -> Drawing | None:
    tried = {arm.label: [r for r in arm.rates if r.learning_rate and (r.losses or r.failures)] for arm in arms}
    known = sorted({r.learning_rate for rates in tried.values() for r in rates if r.learning_rate})
    if len(known) < 2:
        return None
    fig, (ax,), label = panels(1, arms)
    height = fig.get_figheight() * 72 * ax.get_position().height
    piles: dict[float, list[Arm]] = {rate: [] for rate in known}
    end, edge, drawn = {}, [], []
    for arm in arms:
        held = [r for r in tried[arm.label] if r.losses]
        means = [float(np.mean(r.losses)) for r in held]
        drawn += means
        ax.plot([r.learning_rate for r in held], means, marker="o", markersize=3.5, linewidth=1.3, label=arm.label,
                **arm.look.line)  # fmt: skip
        for r in held:
            ax.plot([r.learning_rate] * 2, [min(r.losses), max(r.losses)], color=arm.look.color, lw=3, alpha=0.25)
        if held and held[-1].learning_rate == known[-1]:
            end[arm.label] = means[-1]
        ends = [r.learning_rate for r in tried[arm.label]]
        if len(ends) > 1 and arm.learning_rate in (ends[0], ends[-1]) and not arm.failed:
            edge.append(arm.label)
        for r in tried[arm.label]:
            if r.failures and r.learning_rate:
                piles[r.learning_rate].append(arm)
    tallest = max(map(len, piles.values()))
    strip = min(0.5, (6.5 * tallest + 13) / height) if tallest else 0.0
    for rate, pile in piles.items():
        for i, arm in enumerate(pile):
            y = 1 - strip + (6.5 * i + 5) / height
            ax.plot(rate, y, "x", color=arm.look.color, markersize=4.5, markeredgewidth=1.6,
                    transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
    if strip:
        ax.fill_between([0, 1], 1 - strip, 1, transform=ax.transAxes, color="#f3f3f3", linewidth=0, zorder=0.5)
        ax.text(0.006, 1 - 3 / height, "failed", transform=ax.transAxes, fontsize=7, color="#444444", va="top")
    if drawn:
        low, high = limits(drawn)
        ax.set_ylim(low, low + (high - low) / (1 - strip))
        ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= high])
    ax.set_xscale("log")
    ax.set_xticks(known, [f"{rate:g}" for rate in known])
    ax.minorticks_off()
    ax.set(xlabel="peak learning rate", ylabel="validation loss (nats per token)")
    label(ax, end)
    caption = (
        "Final validation loss by learning rate: mean over the seeds that held, with bars from least to greatest. A ✕ "
        "in the upper strip is an arm that failed at that rate with at least one seed. What lies far above is cut off."
    )
    if edge:
        caption += f" The lowest loss lies on the edge of the grid, which should be extended, for {', '.join(edge)}."
    return Drawing("learning_rate", "Learning rate", caption, fig)


def _layers(arms: Sequence[Arm], what: str) -> Drawing | None:
    key = f"{what}_rms"
    if not any(run.probes for arm in arms for run in arm.runs):
        return None
    fig, axes, label = panels(2, arms, share=True)
    end, seen = {}, []
    for ax, which, title in ((axes[0], 0, "at initialization"), (axes[1], -1, "at the last probe")):
        ax.set(title=title, xlabel="layer", yscale="log", xmargin=0)
        for arm in arms:
            probes = [run.probes[which] for run in arm.shown if run.probes]
            # Half a job is no end: a run with one probe has an initialization only.
            rows = [numbers(p.get(key)) for p in probes if (p.get("step") == 0) == (which == 0)]
            depth = max((len(row) for row in rows), default=0)
            rows = [np.where(row > 0, row, np.nan) for row in rows if len(row) == depth]
            x, mean, lowest, highest = band(np.arange(float(depth)), rows)
            if len(x):
                curve(ax, arm, x, mean, lowest, highest)
                seen += [*lowest, *highest]
                if which == -1 or arm.failed:
                    end[arm.label] = float(mean[-1])
    if not seen:
        return None
    low, high, middle = min(seen), max(seen), float(np.median(seen))
    axes[0].set_ylim(max(low / 1.4, middle / 1e9), min(high * 1.4, middle * 1e9))
    for ax in axes:
        plain_log(ax.yaxis)
    label(axes[1], end)
    if what == "gradient":
        axes[0].set_ylabel("RMS of ∂loss/∂x")
        title, caption = (
            "Gradient by layer",
            (
                "Size of the gradient that reaches the stream at each layer, embedding (0) to last block. A flat line "
                "trains all layers alike; one that falls by decades towards either end starves the layers there."
            ),
        )
    else:
        axes[0].set_ylabel("RMS of x")
        title, caption = (
            "Signal by layer",
            (
                "Size of the stream at each layer, embedding (0) to last block. A stream that grows makes each later "
                "block a smaller part of it; one that stays near 1 is what a norm at the end of the block gives."
            ),
        )
    caption += f" {seed_note(arms)} A failed arm is shown at the last probe it reached."
    return Drawing(f"{what}_by_layer", title, caption, fig)


def _similarity(arms: Sequence[Arm]) -> Drawing | None:
    maps = []
    for arm in arms:
        for run in arm.shown:
            rows = [numbers(row) for row in (run.probes[-1].get("similarity") or [])] if run.probes else []
            if rows and all(len(row) == len(rows) for row in rows) and np.isfinite(rows).any():
                maps.append((arm, np.stack(rows)))
                break
    if not maps:
        return None
    columns = min(5, len(maps))
    rows_ = -(-len(maps) // columns)
    side = (WIDTH - 0.75) / 5
    pitch = side + 0.22
    height = rows_ * pitch + 0.42
    fig = Figure(figsize=(WIDTH, height))
    low = float(np.floor(10 * min(np.nanmin(map_) for _, map_ in maps)) / 10)
    for i, (arm, map_) in enumerate(maps):
        row, column = divmod(i, columns)
        left, bottom = 0.45 + column * side, height - (row + 1) * pitch + 0.08
        box = (left / WIDTH, bottom / height, (side - 0.2) / WIDTH, (side - 0.2) / height)
        ax = fig.add_axes(box)
        image = ax.imshow(map_, cmap="viridis", vmin=min(low, 0.9), vmax=1, origin="lower", interpolation="none")
        image.set_label(arm.label)
        ax.grid(False)
        ax.set_facecolor("#dddddd")
        text = f"{shortened(arm.variant, 25)}{' ✕' if arm.failed else ''}"
        for line, dy, weight in ((arm.placement, 10.5, "bold"), (text, 2.5, "normal")):
            ax.annotate(line, (0, 1), (0, dy), xycoords="axes fraction", textcoords="offset points", fontsize=6.6,
                        weight=weight, color=arm.look.color, parse_math=False)  # fmt: skip
        ticks = [0, len(map_) - 1]
        ax.set(xticks=ticks, yticks=ticks)
        ax.tick_params(length=2, labelsize=6, pad=1.5)
        for spine in ax.spines.values():
            spine.set_visible(False)
    bar = fig.add_axes((0.45 / WIDTH, 0.2 / height, 1.6 / WIDTH, 0.07 / height))
    fig.colorbar(image, cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=6.5, length=2)
    bar.grid(False)
    fig.text(2.2 / WIDTH, 0.2 / height, "cosine between layers (both axes: layer, 0 = embedding)", fontsize=7,
             color="#444444")  # fmt: skip
    caption = (
        "Cosine between the hidden states of every two layers at the last probe of each arm's first seed. A bright "
        "block off the diagonal means that the layers in it hardly change their input; grey: not finite."
    )
    return Drawing("similarity", "Similarity of layers", caption, fig)


def _grad_norm(arms: Sequence[Arm]) -> Drawing | None:
    last = max((r.grad_norm.steps[-1] for arm in arms for r in arm.runs if len(r.grad_norm.steps)), default=0.0)
    if not last:
        return None
    bins = int(min(_POINTS, last))
    middle = (np.arange(bins) + 0.5) * last / bins
    bands = {}
    for arm in arms:
        rows = []
        for run in arm.shown:
            row = np.full(bins, -np.inf)
            index = ((run.grad_norm.steps - 1) * bins / last).astype(int).clip(0, bins - 1)
            np.maximum.at(row, index, run.grad_norm.values)  # the greatest of a bin, so that no spike is lost
            rows.append(np.where(row > 0, row, np.nan))
        bands[arm.label] = band(middle, rows)
    names = list(dict.fromkeys(arm.placement for arm in arms))
    columns = min(3, len(names))
    rows_ = -(-len(names) // columns)
    fig = Figure(figsize=(WIDTH, 0.55 + 1.75 * rows_))
    axes = fig.subplots(rows_, columns, sharex=True, sharey=True, squeeze=False).ravel()
    values = np.concatenate([band[3] for band in bands.values()])
    held = np.concatenate([bands[arm.label][3] for arm in arms if not arm.failed] or [values])
    held = held if len(held) else values
    lows = np.concatenate([band[2] for band in bands.values()])
    axes[0].set(yscale="log", xlim=(0, last))
    axes[0].set_ylim(lows.min() / 1.3, min(values.max(), 30 * held.max()) * 1.6)
    for ax, name in zip(axes, names, strict=False):
        mine = [arm for arm in arms if arm.placement == name]
        for arm in arms:
            if arm.placement != name:
                x, mean = bands[arm.label][:2]
                if len(x):
                    ax.plot(x[::3], np.maximum.reduceat(mean, np.arange(0, len(x), 3)), color="#e2e2e2", lw=0.6,
                            zorder=1)  # fmt: skip
        for i, arm in enumerate(mine):
            x, mean, lowest, highest = bands[arm.label]
            curve(ax, arm, x, mean, lowest, highest, width=1.1)
            if arm.failed and len(x):
                cross(ax, x[-1], mean[-1], arm)
            ax.annotate(f"{shortened(arm.variant)}{why(arm)}", (1, 1), (-1, -2 - 8.5 * i), va="top", ha="right",
                        xycoords="axes fraction", textcoords="offset points", fontsize=6.6, parse_math=False,
                        color=arm.look.color, bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.4},
                        )  # fmt: skip
        ax.set_title(shortened(name), loc="left", weight="bold", color=mine[0].look.color, parse_math=False, pad=3)
        ax.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
        plain_log(ax.yaxis)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    for i in range(len(names)):
        if i + columns >= len(names):
            axes[i].set_xlabel("optimizer step")
            axes[i].tick_params(labelbottom=True)
        if i % columns == 0:
            axes[i].set_ylabel("gradient norm")
    fig.subplots_adjust(left=0.075, right=0.99, top=1 - 0.22 / fig.get_figheight(),
                        bottom=0.42 / fig.get_figheight(), hspace=0.28, wspace=0.06)  # fmt: skip
    per = f"the largest of each {last / bins:.3g} steps" if last > bins else "every step"
    caption = (
        f"Global gradient norm before clipping ({per}), one panel per placement with the other arms in grey. Needles "
        f"are spikes. {seed_note(arms)} A ✕ marks where a failed arm ends, on the upper edge if above it."
    )
    return Drawing("gradient_norm", "Gradient norm", caption, fig)
