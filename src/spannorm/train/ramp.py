"""The learning-rate ramp: the rate rises from 0 until the model no longer takes it (Keel, arXiv 2601.19895, §5.1).

The paper gives no threshold for divergence. Ours: of what the model had learned, the distance of its lowest loss below
the unigram model, a share is lost again. A loss that is not finite has lost everything. Losses are means of the last
`WINDOW` steps; a model that never came 0.2 nats below the unigram model has learned nothing that it could lose.
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
"""The share that counts as divergence."""
SHARES = (0.25, SHARE, 1.0)
"""Those that are reported, so that a reader sees how much hangs on the threshold."""


class Learned:
    """Follows a run's losses and says which share of what was learned is lost."""

    def __init__(self, unigram_loss: float) -> None:
        self.unigram, self.best = unigram_loss, math.inf
        self._window: deque[float] = deque(maxlen=WINDOW)

    @property
    def anything(self) -> bool:
        return self.best <= self.unigram - MARGIN_BELOW_UNIGRAM

    def lost(self, loss: float | None) -> float:
        """Take in the next step's loss; 0 means that nothing is lost, or that nothing was learned."""
        if loss is None or not math.isfinite(loss):
            return math.inf
        self._window.append(loss)
        if len(self._window) < WINDOW:
            return 0.0
        mean = math.fsum(self._window) / WINDOW
        self.best = min(self.best, mean)
        return (mean - self.best) / (self.unigram - self.best) if self.anything else 0.0


def tolerated(records: Iterable[Mapping[str, Any]], unigram_loss: float) -> dict[str, Any]:
    """The learning rate just before each share was lost: that of the first step of the window that shows it.

    Returns:
        `learned`: whether there was anything to lose; `rates`: by share, None where it was never lost.
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
