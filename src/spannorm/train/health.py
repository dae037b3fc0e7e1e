"""What counts as a spike and as a failed training run. The criteria are applied to the records alone.

Losses are in nats per token. A value that was not finite is None, as in the records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from spannorm.values import finite

Reason = Literal["non-finite", "unigram", "spike"]

ROUTING = ("router_aux_loss", "router_z_loss", "router_entropy", "router_logit_rms", "max_violation", "dead_experts")
"""Further values in the records of a mixture of experts, about its routers (see spannorm.routing)."""

WINDOW = 128
"""The number of earlier values with which a new value is compared."""
SIGMAS = 6.0
MARGIN_BELOW_UNIGRAM = 0.2
"""A trained model must be at least this many nats per token below the unigram model; a collapsed one is within 0.01."""
TAIL = 32
"""The number of losses in the means that are compared before and after the last spike."""
MARGIN_AFTER_SPIKE = 0.1
"""After a spike the loss may stay this many nats per token above its earlier value."""

CRITERIA = {
    "non-finite": "the loss became non-finite",
    "unigram": f"the final validation loss is not at least {MARGIN_BELOW_UNIGRAM} nats per token below a unigram model "
    "of the training tokens",
    "spike": f"after the last spike, the mean of the last {TAIL} losses stays more than {MARGIN_AFTER_SPIKE} above the "
    f"{TAIL} before it",
}


def spikes(values: Sequence[float | None]) -> list[int]:
    """Indices of the spikes in a series (OLMo-core's SpikeScore).

    A value is a spike if it is above mean + 6σ (population) of the 128 values before it. The window must be full, and
    its σ at least 1e-10. Every finite value joins the window after it was judged. If the window is full, a value that
    is not finite is a spike.
    """
    found: list[int] = []
    window: list[float] = []
    for i, value in enumerate(values):
        if len(window) == WINDOW:
            mean = math.fsum(window) / WINDOW
            sigma = math.sqrt(math.fsum((w - mean) ** 2 for w in window) / WINDOW)
            if value is None or (sigma >= 1e-10 and value > mean + SIGMAS * sigma):
                found.append(i)
        if value is not None:
            window.append(value)
            del window[:-WINDOW]
    return found


def spike_steps(losses: Sequence[float | None], grad_norms: Sequence[float | None]) -> list[int]:
    """Indices of the steps at which the loss or the gradient norm spikes."""
    return sorted({*spikes(losses), *spikes(grad_norms)})


def failure(
    losses: Sequence[float | None], spiked: Sequence[int], val_loss: float | None, unigram_loss: float
) -> Reason | None:
    """Why training failed, or None.

    Args:
        losses: training loss of every step.
        spiked: indices from `spike_steps`.
        val_loss: the final validation loss; None if it is not finite.
        unigram_loss: the same split under a unigram model of the training tokens.
    """
    if finite(val_loss) is None or any(finite(loss) is None for loss in losses):
        return "non-finite"
    if val_loss is None or val_loss > unigram_loss - MARGIN_BELOW_UNIGRAM:
        return "unigram"
    if spiked:
        before = [x for x in losses[max(0, spiked[-1] - TAIL) : spiked[-1]] if x is not None]
        after = [x for x in losses[-TAIL:] if x is not None]
        if sum(after) / len(after) > sum(before) / len(before) + MARGIN_AFTER_SPIKE:
            return "spike"
    return None
