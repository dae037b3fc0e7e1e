"""The learning-rate ramp: the rate rises from 0 until training diverges (Keel, arXiv 2601.19895, §5.1).

The paper gives no threshold for divergence. Ours: the model loses a share of what it had learned. What it had learned
is the distance of its lowest loss below the unigram model. A loss that is not finite means that all is lost. Losses are
means of the last `WINDOW` steps. A model that was never 0.2 nats below the unigram model has learned nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from spannorm.train.health import MARGIN_BELOW_UNIGRAM

PEAK = 5e-2
"""Where the published ramp ends, after 5,000 steps."""
WINDOW = 16
SHARE = 0.5
"""The lost share that counts as divergence."""
SHARES = (0.25, SHARE, 1.0)
"""The lost shares that are reported, so that a reader sees how much the threshold matters."""


class Learned:
    """Follows a run's losses and computes the lost share of what was learned."""

    def __init__(self, unigram_loss: float) -> None:
        self.unigram, self.best = unigram_loss, math.inf
        self._window: deque[float] = deque(maxlen=WINDOW)

    @property
    def anything(self) -> bool:
        return self.best <= self.unigram - MARGIN_BELOW_UNIGRAM

    def lost(self, loss: float | None) -> float:
        """Add the next step's loss. Returns the lost share; 0 means that nothing is lost, or nothing was learned."""
        if loss is None or not math.isfinite(loss):
            return math.inf
        self._window.append(loss)
        if len(self._window) < WINDOW:
            return 0.0
        mean = math.fsum(self._window) / WINDOW
        self.best = min(self.best, mean)
        return (mean - self.best) / (self.unigram - self.best) if self.anything else 0.0


def tolerated(records: Iterable[Mapping[str, Any]], unigram_loss: float) -> dict[str, Any]:
    """The learning rate just before each share was lost: the rate at the first step of the window in which it is lost.

    Returns:
        `learned`: whether the model had learned anything. `rates`: by share, None if it was never lost.
    """
    learned, rates = Learned(unigram_loss), dict[float, float]()
    steps: list[float] = []
    for record in records:
        steps.append(record["learning_rate"])
        share = learned.lost(record["loss"])
        for level in SHARES:
            if share >= level:
                rates.setdefault(level, steps[max(0, len(steps) - WINDOW)])
    return {"learned": learned.anything, "rates": {f"{level:g}": rates.get(level) for level in SHARES}}
