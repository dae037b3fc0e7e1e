"""Figures of what was measured after training: collapse, and the use of depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from spannorm.lab.report.arms import Arm
from spannorm.lab.report.figures.panels import (
    MAX_ARMS,
    Drawing,
    band,
    curve,
    limits,
    numbers,
    panels,
    plain_log,
    seed_note,
)


def draw_collapse(arms: Sequence[Arm]) -> list[Drawing]:
    """What the arms have data for. Call it inside `matplotlib.rc_context(STYLE)`."""
    arms = arms[:MAX_ARMS]
    drawings = [_collapse(arms), *(_use(arms, *part) for part in _USE)]
    return [drawing for drawing in drawings if drawing is not None]


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
