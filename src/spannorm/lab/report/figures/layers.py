"""Figures by layer: gradient, signal and similarity at two moments, gradient and signal through training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from spannorm.lab.report.arms import Arm
from spannorm.lab.report.figures.panels import (
    MAX_ARMS,
    WIDTH,
    Band,
    Drawing,
    band,
    color_bar,
    curve,
    map_axes,
    name_map,
    numbers,
    panels,
    plain_log,
    seed_note,
    shortened,
)
from spannorm.lab.results.runs import Array, Run

_MOST_MAPS = 12
_THROUGH = {"gradient_rms": "gradient", "signal_rms": "signal"}


def draw_layers(arms: Sequence[Arm]) -> list[Drawing]:
    """What the arms have data for. Call it inside `matplotlib.rc_context(STYLE)`."""
    few = arms[:MAX_ARMS]
    drawings = [_by_layer(few, "gradient"), _by_layer(few, "signal"), _similarity(few), _through(arms)]
    return [drawing for drawing in drawings if drawing is not None]


_BY_LAYER = {
    "gradient": (
        "RMS of ∂loss/∂x",
        "Size of the gradient that reaches the stream at each layer, embedding (0) to last block. A flat line "
        "trains all layers alike; one that falls by decades towards either end starves the layers there.",
    ),
    "signal": (
        "RMS of x",
        "Size of the stream at each layer, embedding (0) to last block. A stream that grows makes each later "
        "block a smaller part of it; one that stays near 1 is what a norm at the end of the block gives.",
    ),
}
"""Label of the axis, and caption."""


def _by_layer(arms: Sequence[Arm], what: str) -> Drawing | None:
    if not any(run.probes for arm in arms for run in arm.runs):
        return None
    fig, axes, label = panels(2, arms, share=True)
    ends, drawn = {}, []
    for ax, which, title in ((axes[0], 0, "at initialization"), (axes[1], -1, "at the last probe")):
        ax.set(title=title, xlabel="layer", yscale="log", xmargin=0)
        for arm in arms:
            x, mean, low, high = _layer_band(arm, f"{what}_rms", which)
            if len(x):
                curve(ax, arm, x, mean, low, high)
                drawn += [*low, *high]
                if which == -1 or arm.failed:
                    ends[arm.label] = float(mean[-1])
    if not drawn:
        return None
    least, most, middle = min(drawn), max(drawn), float(np.median(drawn))
    axes[0].set_ylim(max(least / 1.4, middle / 1e9), min(most * 1.4, middle * 1e9))
    for ax in axes:
        plain_log(ax.yaxis)
    label(axes[1], ends)
    ylabel, caption = _BY_LAYER[what]
    axes[0].set_ylabel(ylabel)
    caption += f" {seed_note(arms)} A failed arm is shown at the last probe it reached."
    return Drawing(f"{what}_by_layer", f"{what.capitalize()} by layer", caption, fig)


def _layer_band(arm: Arm, key: str, which: int) -> Band:
    """A quantity by layer over an arm's seeds, at the first probe (0) or at the last one (-1)."""
    probes = [run.probes[which] for run in arm.shown if run.probes]
    # Half a job is no end: a run with one probe has an initialization only.
    rows = [numbers(probe.get(key)) for probe in probes if (probe.get("step") == 0) == (which == 0)]
    depth = max((len(row) for row in rows), default=0)
    return band(np.arange(float(depth)), [np.where(row > 0, row, np.nan) for row in rows if len(row) == depth])


def _similarity(arms: Sequence[Arm]) -> Drawing | None:
    maps = [(arm, cosines) for arm in arms if (cosines := _cosines(arm)) is not None]
    if not maps:
        return None
    columns, side = min(5, len(maps)), (WIDTH - 0.75) / 5
    pitch = side + 0.22
    height = -(-len(maps) // columns) * pitch + 0.42
    fig = Figure(figsize=(WIDTH, height))
    low = float(np.floor(10 * min(np.nanmin(cosines) for _, cosines in maps)) / 10)
    for i, (arm, cosines) in enumerate(maps):
        row, column = divmod(i, columns)
        ax = map_axes(fig, 0.45 + column * side, height - (row + 1) * pitch + 0.08, side - 0.2, side - 0.2)
        image = ax.imshow(cosines, cmap="viridis", vmin=min(low, 0.9), vmax=1, origin="lower", interpolation="none")
        image.set_label(arm.label)
        ax.grid(False)
        ax.set_facecolor("#dddddd")
        name_map(ax, arm, 25)
        ticks = [0, len(cosines) - 1]
        ax.set(xticks=ticks, yticks=ticks)
        ax.tick_params(length=2, labelsize=6, pad=1.5)
        for spine in ax.spines.values():
            spine.set_visible(False)
    color_bar(fig, image, "cosine between layers (both axes: layer, 0 = embedding)")
    caption = (
        "Cosine between the hidden states of every two layers at the last probe of each arm's first seed. A bright "
        "block off the diagonal means that the layers in it hardly change their input; grey: not finite."
    )
    return Drawing("similarity", "Similarity of layers", caption, fig)


def _cosines(arm: Arm) -> Array | None:
    """The similarity of an arm's layers at the last probe of its first seed that has one, (layers, layers)."""
    for run in arm.shown:
        rows = [numbers(row) for row in (run.probes[-1].get("similarity") or [])] if run.probes else []
        if rows and all(len(row) == len(rows) for row in rows) and np.isfinite(rows).any():
            return np.stack(rows)
    return None


def _through(arms: Sequence[Arm]) -> Drawing | None:
    """Layer against step, a pair of maps per arm."""
    pairs = [(arm, run.through) for arm in arms if (run := next(filter(_has_maps, arm.shown), None))][:_MOST_MAPS]
    if not pairs:
        return None
    columns = min(3, len(pairs))
    pitch, room = 1.3, (WIDTH - 0.5) / 3
    height = -(-len(pairs) // columns) * pitch + 0.55
    fig = Figure(figsize=(WIDTH, height))
    ranges = {key: _color_range([maps[key][1] for _, maps in pairs]) for key in _THROUGH}
    images = {}
    for i, (arm, maps) in enumerate(pairs):
        row, column = divmod(i, columns)
        left, bottom, width = 0.35 + column * room, height - (row + 1) * pitch + 0.22, (room - 0.28) / 2
        for half, (key, name) in enumerate(_THROUGH.items()):
            ax = map_axes(fig, left + half * (width + 0.05), bottom, width, pitch - 0.52)
            images[key] = _through_map(ax, *maps[key], ranges[key], ("magma", "viridis")[half])
            images[key].set_label(f"{arm.label}: {name}")
            ax.set_yticks([] if half else [0, maps[key][1].shape[1] - 1])
            ax.annotate(name, (0, 1), (0, 2), xycoords="axes fraction", textcoords="offset points", fontsize=6.2,
                        color="#444444")  # fmt: skip
            if not half:
                text = f"{shortened(arm.label, 36)}{' ✕' if arm.failed else ''}"
                ax.annotate(text, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", fontsize=6.6,
                            weight="bold", color=arm.look.color, parse_math=False)  # fmt: skip
    for half, (key, name) in enumerate(_THROUGH.items()):
        left = 0.35 + half * 3.3
        bar = map_axes(fig, left, 0.22, 1.5, 0.07)
        fig.colorbar(images[key], cax=bar, orientation="horizontal")
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


def _has_maps(run: Run) -> bool:
    """Whether there are probes enough for both maps."""
    return all(len(run.through[key][0]) > 2 for key in _THROUGH)


def _color_range(maps: Sequence[Array]) -> LogNorm:
    """One scale for all arms. A colour cannot tell more than ten decades: the rest is shown as the end of the scale."""
    values = np.concatenate([values.ravel() for values in maps])
    values = values[np.isfinite(values) & (values > 0)]
    middle = float(np.median(values)) if len(values) else 1.0
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.5, 2.0)
    return LogNorm(max(low, middle / 1e5), max(min(high, middle * 1e5), 1.01 * max(low, middle / 1e5)))


def _through_map(ax: Any, steps: Array, values: Array, scale: LogNorm, colors: str) -> Any:
    """Layers up, probes across."""
    clipped = np.ma.masked_invalid(np.clip(values.T, scale.vmin, scale.vmax))
    image = ax.imshow(clipped, cmap=colors, norm=scale, origin="lower", interpolation="none", aspect="auto")
    ax.grid(False)
    ax.set_facecolor("#dddddd")
    ax.set_xticks([0, len(steps) - 1], [f"{steps[0]:g}", f"{steps[-1]:g}"])
    ax.tick_params(length=2, labelsize=6, pad=1.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image
