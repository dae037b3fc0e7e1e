"""Figures by layer: gradient, signal and similarity at two moments, gradient and signal through training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from spannorm.lab.report.arms import Arm
from spannorm.lab.report.figures.panels import (
    MAX_ARMS,
    WIDTH,
    Drawing,
    band,
    curve,
    numbers,
    panels,
    plain_log,
    seed_note,
    shortened,
)
from spannorm.lab.results.runs import Run

_MOST_MAPS = 12
_THROUGH = {"gradient_rms": "gradient", "signal_rms": "signal"}


def draw_layers(arms: Sequence[Arm]) -> list[Drawing]:
    """What the arms have data for. Call it inside `matplotlib.rc_context(STYLE)`."""
    few = arms[:MAX_ARMS]
    drawings = [_by_layer(few, "gradient"), _by_layer(few, "signal"), _similarity(few), _through(arms)]
    return [drawing for drawing in drawings if drawing is not None]


def _by_layer(arms: Sequence[Arm], what: str) -> Drawing | None:
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
