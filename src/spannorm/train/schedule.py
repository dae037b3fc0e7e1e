"""The learning rate of every step, as a share of the peak.

With n steps of which w warm up, step k = 1 … n, and f the final share:

    k ≤ w                k/w
    cosine, k > w        f + (1 − f)·(1 + cos(π·(k − w)/(n − w)))/2
    wsd, k > w           min(1, f + (1 − f)·(n − k)/d), d = decay_fraction · n rounded, at least 1
    ramp                 k/n

So step w has the peak, step n has f (in a ramp: the peak), and no step has the rate 0 unless f is 0. All schedules have
the same warm-up. A depth rule's factor on a group's rate (`:init+lr`) is multiplied with it.
"""

from __future__ import annotations

import math

from spannorm.train.recipe import TrainRecipe


def share_of_peak(t: TrainRecipe, step: int) -> float:
    """The learning rate of a step, counted from 1, divided by `t.learning_rate`."""
    n, w, f = t.steps, t.warmup_steps, t.final_learning_rate
    step = min(step, n)  # the scheduler looks one step ahead
    if t.schedule == "ramp":
        return step / n
    if step <= w:
        return step / w
    if t.schedule == "cosine":
        return f + (1 - f) * (1 + math.cos(math.pi * (step - w) / (n - w))) / 2
    return min(1.0, f + (1 - f) * (n - step) / max(1, round(t.decay_fraction * n)))
