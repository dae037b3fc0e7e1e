"""Figures of the layers beyond one moment: gradient and signal through training, collapse after it, and ramps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from spannorm.lab.report.figures.panels import (
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
)
from spannorm.lab.report.figures.training import MAX_ARMS, Drawing
from spannorm.lab.results.arms import Arm, Run

_MOST_MAPS = 12
_POINTS = 300
_THROUGH = {"gradient_rms": "gradient", "signal_rms": "signal"}


def draw_layers(arms: Sequence[Arm]) -> list[Drawing]:
    """What the arms have data for. Call it inside `matplotlib.rc_context(STYLE)`."""
    made = [_through(arms), _collapse(arms[:MAX_ARMS]), *(_use(arms[:MAX_ARMS], *part) for part in _USE)]
    return [drawing for drawing in made if drawing is not None]


def _through(arms: Sequence[Arm]) -> Drawing | None:
    """Layer against step, a pair of maps per arm."""
    maps = {
        arm.label: next(
            (run.through for run in arm.shown if all(len(run.through[key][0]) > 2 for key in _THROUGH)), None
        )
        for arm in arms
    }
    arms = [arm for arm in arms if maps[arm.label] is not None][:_MOST_MAPS]
    if not arms:
        return None
    columns = min(3, len(arms))
    lines = -(-len(arms) // columns)
    pitch, room = 1.3, (WIDTH - 0.5) / 3
    height = lines * pitch + 0.55
    fig = Figure(figsize=(WIDTH, height))
    ranges = {}
    for key in _THROUGH:
        every = np.concatenate([found[key][1].ravel() for arm in arms if (found := maps[arm.label])])
        every = every[np.isfinite(every) & (every > 0)]
        # Ten decades are more than a colour can tell; the rest is shown as the end of the scale.
        middle = float(np.median(every)) if len(every) else 1.0
        low, high = (float(every.min()), float(every.max())) if len(every) else (0.5, 2.0)
        ranges[key] = LogNorm(max(low, middle / 1e5), max(min(high, middle * 1e5), 1.01 * max(low, middle / 1e5)))
    bars = {}
    for i, arm in enumerate(arms):
        line, column = divmod(i, columns)
        left, bottom = 0.35 + column * room, height - (line + 1) * pitch + 0.22
        for half, (key, name) in enumerate(_THROUGH.items()):
            steps, values = (maps[arm.label] or {})[key]
            width = (room - 0.28) / 2
            box = (left + half * (width + 0.05), bottom, width, pitch - 0.52)
            ax = fig.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
            shown = np.ma.masked_invalid(np.clip(values.T, ranges[key].vmin, ranges[key].vmax))
            bars[key] = ax.imshow(shown, cmap=("magma", "viridis")[half], norm=ranges[key], origin="lower",
                                  interpolation="none", aspect="auto")  # fmt: skip
            bars[key].set_label(f"{arm.label}: {name}")
            ax.grid(False)
            ax.set_facecolor("#dddddd")
            ax.set_xticks([0, len(steps) - 1], [f"{steps[0]:g}", f"{steps[-1]:g}"])
            ax.set_yticks([] if half else [0, values.shape[1] - 1])
            ax.tick_params(length=2, labelsize=6, pad=1.5)
            for spine in ax.spines.values():
                spine.set_visible(False)
            ax.annotate(name, (0, 1), (0, 2), xycoords="axes fraction", textcoords="offset points", fontsize=6.2,
                        color="#444444")  # fmt: skip
            if not half:
                text = f"{shortened(arm.label, 36)}{' ✕' if arm.failed else ''}"
                ax.annotate(text, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", fontsize=6.6,
                            weight="bold", color=arm.look.color, parse_math=False)  # fmt: skip
    for half, (key, name) in enumerate(_THROUGH.items()):
        left = 0.35 + half * 3.3
        bar = fig.add_axes((left / WIDTH, 0.22 / height, 1.5 / WIDTH, 0.07 / height))
        fig.colorbar(bars[key], cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=6.5, length=2)
        bar.grid(False)
        bar.xaxis.set_minor_formatter(NullFormatter())
        plain_log(bar.xaxis)
        fig.text((left + 1.6) / WIDTH, 0.22 / height, f"RMS of the {name}", fontsize=7, color="#444444")
    caption = (
        "RMS of gradient and stream at each layer (up: 0 = embedding) at every probe (across: step), of each arm's "
        "first seed shown. The colours are common to all arms and cut five decades from the median; grey: not finite."
    )
    return Drawing("through_training", "Gradient and signal through training", caption, fig)


def _several(run: Run) -> bool:
    """Whether there are probes enough for both maps."""
    return all(len(run.through[key][0]) > 2 for key in _THROUGH)


def _collapse(arms: Sequence[Arm]) -> Drawing | None:
    arms = [arm for arm in arms if any(run.collapse for run in arm.shown)]
    if not arms:
        return None
    fig, axes, label = panels(3, arms)
    end, costs = {}, []
    for arm in arms:
        for ax, key in zip(axes, ("effective_rank", "skip_cost", "spectrum"), strict=True):
            rows = [numbers(run.collapse[key]) for run in arm.shown if run.collapse]
            x, mean, low, high = band(np.arange(float(len(rows[0]))) + (key != "effective_rank"), rows)
            if len(x):
                curve(ax, arm, x, mean, low, high, width=1.2)
                if key == "spectrum":
                    end[arm.label] = float(mean[-1])
                if key == "skip_cost":
                    costs += [*mean]
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set(title="effective rank", xlabel="layer")
    axes[1].set(title="loss rise, block skipped", xlabel="block")
    if costs:
        least, most = limits(costs)
        axes[1].set_ylim(max(least, -0.5), most)
    axes[2].set(title="singular values at the end", xlabel="index", yscale="log")
    floor = min((value for value in end.values() if value > 0), default=1e-3)
    axes[2].set_ylim(max(1e-6, floor / 2), 1.3)
    plain_log(axes[2].yaxis)
    label(axes[2], end)
    caption = (
        "After training, on held-out text. Effective rank of the stream at each layer (exp of the entropy of the "
        "normalized singular values); the rise of the loss, nats per token, when one block is skipped, its norms with "
        "it (a block at 0 is good for nothing); singular values of what the last block returns, as shares of the "
        f"largest. {seed_note(arms)}"
    )
    return Drawing("collapse", "Collapse", caption, fig)


_USE = (
    (
        "use_of_depth", "Use of depth: each block",
        {"angular_distance": "input to output, angle / π", "usefulness": "loss rise, made linear",
         "causal": "effect on later blocks"},
        "After training, on held-out text, each block by itself (1 is the first). Left: the angle between what it is "
        "given and what it hands on. Middle: the rise of the loss, nats per token, when the best linear map of its "
        "input takes its place (0: a linear map would do). Right: when it is skipped, the relative change of what the "
        "later blocks do, mean over them. Points of several streams are what the readout would hand on. ",
    ),
    (
        "use_of_depth_together", "Use of depth: blocks together",
        {"permutation": "exchanged with the next", "logit_lens": "loss, read out there",
         "jacobian": "Jacobian of the end"},
        "After training, on held-out text. Left: the relative change of the loss when a block exchanges its weights "
        "with the next one (0: their order is nothing). Middle: the loss, nats per token, when the rest of the blocks "
        "is skipped (layer 0: the embedding). Right: the size of the derivative of the stack's output by the stream, "
        "by all streams at once where there are several. ",
    ),
)  # fmt: skip


def _use(arms: Sequence[Arm], name: str, title: str, measures: dict[str, str], caption: str) -> Drawing | None:
    """Three measures of `spannorm.probes.DepthUse`, line by arm."""
    arms = [arm for arm in arms if any(run.collapse.get("logit_lens") for run in arm.shown)]
    if not arms:
        return None
    fig, axes, label = panels(3, arms)
    end = {}
    for ax, (key, heading) in zip(axes, measures.items(), strict=True):
        points = key in ("logit_lens", "jacobian")
        for arm in arms:
            rows = [numbers(run.collapse[key]) for run in arm.shown if run.collapse.get(key)]
            x, mean, low, high = band(np.arange(float(len(rows[0]))) + (not points), rows)
            if len(x):
                curve(ax, arm, x, mean, low, high, width=1.2)
                if ax is axes[-1]:
                    end[arm.label] = float(mean[-1])
        ax.set(title=heading, xlabel="layer" if points else "block")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if key == "jacobian":
            ax.set_yscale("log")
            ax.autoscale_view()
            plain_log(ax.yaxis)
    label(axes[-1], end)
    return Drawing(name, title, caption + seed_note(arms), fig)


def draw_ramps(arms: Sequence[Arm], unigram: float | None) -> list[Drawing]:
    """Loss against the learning rate while it rises."""
    arms = [arm for arm in arms[:MAX_ARMS] if any(len(run.learning_rate.steps) for run in arm.runs)]
    if not arms:
        return []
    peak = max(run.learning_rate.values[-1] for arm in arms for run in arm.runs if len(run.learning_rate.steps))
    last = max((run.loss.steps[-1] for arm in arms for run in arm.runs if len(run.loss.steps)), default=0)
    if not (last and peak > 0):
        return []
    grid = np.unique(np.linspace(1, last, _POINTS).round())
    fig, (ax,), label = panels(1, arms)
    end, lows, ends = {}, [], []
    for arm in arms:
        rows = [smooth(run.loss, 16, grid) for run in arm.shown]
        x, mean, low, high = band(grid / last * peak, rows)
        if not len(x):
            continue
        curve(ax, arm, x, mean, low, high)
        lows += [*mean]
        end[arm.label] = float(mean[-1])
        ends.append((arm, x[-1], mean[-1]))
    top = (unigram or max(lows)) + 0.3
    ax.set(xlim=(0, peak), ylim=(min(lows) - 0.1, top), xlabel="learning rate", ylabel="training loss (nats per token)")
    for arm, x, y in ends:
        if x < 0.98 * peak:
            cross(ax, x, y, arm)
    if unigram is not None:
        ax.axhline(unigram, color="#222222", linewidth=0.9, linestyle=(0, (1, 2)))
        ax.annotate("unigram model", (0.98, unigram), (0, 4), xycoords=("axes fraction", "data"), ha="right",
                    textcoords="offset points", fontsize=7, color="#444444")  # fmt: skip
    label(ax, end)
    caption = (
        "Training loss (trailing mean over 16 steps) while the learning rate rises evenly with the steps. A ✕ marks a "
        f"ramp that ended because all that was learned was lost. {seed_note(arms)}"
    )
    return [Drawing("ramp", "Loss on the ramp", caption, fig)]
