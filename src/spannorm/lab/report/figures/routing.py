"""The figures of a mixture of experts: what its routers did over the steps, and where the tokens went."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spannorm.lab.report.arms import Arm
from spannorm.lab.report.figures.panels import (
    MAX_ARMS,
    WIDTH,
    Drawing,
    band,
    color_bar,
    curve,
    map_axes,
    name_map,
    numbers,
    seed_note,
    shortened,
    smooth,
    why,
)
from spannorm.lab.results.runs import Array

_PANELS = {
    "max_violation": "max violation (busiest layer)",
    "dead_experts": "dead experts (all layers)",
    "router_entropy": "router entropy (nats)",
    "router_logit_rms": "RMS of router logits",
    "router_aux_loss": "load-balancing loss (sum)",
    "router_z_loss": "router z-loss (sum)",
}
_POINTS = 200


def draw_routing(arms: Sequence[Arm]) -> list[Drawing]:
    """The figures for the arms that are mixtures of experts. Call it inside `matplotlib.rc_context(STYLE)`."""
    arms = [arm for arm in arms[:MAX_ARMS] if any(run.routing for run in arm.runs)]
    made = [_health(arms), _load(arms)] if arms else []
    return [drawing for drawing in made if drawing is not None]


def _health(arms: Sequence[Arm]) -> Drawing:
    last = max(series.steps[-1] for arm in arms for run in arm.runs for series in run.routing.values())
    window, grid = max(1, int(last) // 40), np.unique(np.linspace(1, last, _POINTS).round())
    rows = -(-len(arms) // 2)
    height = 4.3 + 0.15 * rows
    fig = Figure(figsize=(WIDTH, height))
    axes = fig.subplots(2, 3, sharex=True).ravel()
    fig.subplots_adjust(left=0.06, right=0.99, top=1 - 0.22 / height, bottom=(0.5 + 0.15 * rows) / height,
                        hspace=0.22, wspace=0.2)  # fmt: skip
    for ax, (name, title) in zip(axes, _PANELS.items(), strict=True):
        ax.set(title=title, xlim=(0, last))
        for arm in arms:
            measured = [smooth(run.routing[name], window, grid) for run in arm.shown if name in run.routing]
            curve(ax, arm, *band(grid, measured), width=1.2)
        ax.xaxis.set_major_locator(MaxNLocator(4, prune="upper"))
        ax.margins(y=0.08)
    for ax in axes[3:]:
        ax.set_xlabel("optimizer step")
    for i, arm in enumerate(arms):
        x, y = (0.06, 0.53)[i % 2], (0.08 + 0.15 * (rows - 1 - i // 2)) / height
        fig.add_artist(Line2D([x, x + 0.035], [y, y], linewidth=1.6, **arm.look.line))
        fig.text(x + 0.045, y, shortened(arm.label, 44) + why(arm), fontsize=7, color=arm.look.color,
                 va="center_baseline", parse_math=False)  # fmt: skip
    how = f"trailing mean over {window} steps" if window > 1 else "every step"
    caption = (
        f"What the routers did on the training batches ({how}). Violation: how far a layer's busiest expert lies above "
        "the even load, as a share of it. Dead: no token of the step went there. Entropy: ln E where a router does "
        f"not care, 0 where it is sure. {seed_note(arms)}"
    )
    return Drawing("router_health", "Router health", caption, fig)


def _load(arms: Sequence[Arm]) -> Drawing | None:
    maps = [(arm, load) for arm in arms if (load := _relative_load(arm)) is not None]
    if not maps:
        return None
    columns, side, pitch = min(4, len(maps)), (WIDTH - 0.45) / 4, 1.75
    height = -(-len(maps) // columns) * pitch + 0.45
    fig = Figure(figsize=(WIDTH, height))
    for i, (arm, load) in enumerate(maps):
        row, column = divmod(i, columns)
        ax = map_axes(fig, 0.45 + column * side, height - (row + 1) * pitch + 0.1, side - 0.25, pitch - 0.5)
        image = ax.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, origin="lower", interpolation="none", aspect="auto")
        image.set_label(arm.label)
        ax.grid(False)
        ax.set_facecolor("#dddddd")
        name_map(ax, arm, 30)
        ax.set(xticks=[0, load.shape[1] - 1], yticks=[0, len(load) - 1])
        ax.tick_params(length=2, labelsize=6, pad=1.5)
    color_bar(fig, image, "load ÷ even load (across: expert, up: sparse layer)")
    caption = (
        "Where the tokens of the last probe went, of each arm's first seed: white is the even load, blue less, red "
        "more (2 and above alike)."
    )
    return Drawing("expert_load", "Load of the experts", caption, fig)


def _relative_load(arm: Arm) -> Array | None:
    """Each expert's tokens over the even share, (sparse layers, experts), at the first seed's last probe."""
    last = [run.probes[-1] for run in arm.shown if run.probes and "routing" in run.probes[-1]]
    rows = [numbers(row) for row in (last[0]["routing"].get("load") or [])] if last else []
    if rows and len({len(row) for row in rows}) == 1 and np.isfinite(rows).any():
        return np.stack(rows) * len(rows[0])
    return None
