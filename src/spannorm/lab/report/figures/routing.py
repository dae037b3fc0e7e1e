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
    curve,
    numbers,
    seed_note,
    shortened,
    smooth,
    why,
)

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
    maps = []
    for arm in arms:
        loads = [
            run.probes[-1]["routing"].get("load") for run in arm.shown if run.probes and "routing" in run.probes[-1]
        ]
        rows = [numbers(row) for row in (loads[0] or [])] if loads else []
        if rows and len({len(row) for row in rows}) == 1 and np.isfinite(rows).any():
            maps.append((arm, np.stack(rows) * len(rows[0])))
    if not maps:
        return None
    columns = min(4, len(maps))
    lines = -(-len(maps) // columns)
    side, pitch = (WIDTH - 0.45) / 4, 1.75
    height = lines * pitch + 0.45
    fig = Figure(figsize=(WIDTH, height))
    for i, (arm, load) in enumerate(maps):
        row, column = divmod(i, columns)
        box = (0.45 + column * side, height - (row + 1) * pitch + 0.1, side - 0.25, pitch - 0.5)
        ax = fig.add_axes((box[0] / WIDTH, box[1] / height, box[2] / WIDTH, box[3] / height))
        image = ax.imshow(load, cmap="RdBu_r", vmin=0, vmax=2, origin="lower", interpolation="none", aspect="auto")
        image.set_label(arm.label)
        ax.grid(False)
        ax.set_facecolor("#dddddd")
        text = f"{shortened(arm.variant, 30)}{' ✕' if arm.failed else ''}"
        for words, dy, weight in ((arm.placement, 10.5, "bold"), (text, 2.5, "normal")):
            ax.annotate(words, (0, 1), (0, dy), xycoords="axes fraction", textcoords="offset points", fontsize=6.6,
                        weight=weight, color=arm.look.color, parse_math=False)  # fmt: skip
        ax.set(xticks=[0, load.shape[1] - 1], yticks=[0, len(load) - 1])
        ax.tick_params(length=2, labelsize=6, pad=1.5)
    bar = fig.add_axes((0.45 / WIDTH, 0.2 / height, 1.6 / WIDTH, 0.07 / height))
    fig.colorbar(image, cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=6.5, length=2)
    bar.grid(False)
    fig.text(2.2 / WIDTH, 0.2 / height, "load ÷ even load (across: expert, up: sparse layer)", fontsize=7,
             color="#444444")  # fmt: skip
    caption = (
        "Where the tokens of the last probe went, of each arm's first seed: white is the even load, blue less, red "
        "more (2 and above alike)."
    )
    return Drawing("expert_load", "Load of the experts", caption, fig)
