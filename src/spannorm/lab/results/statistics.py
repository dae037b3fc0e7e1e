"""What may be said of a few seeds: means, spreads, paired differences with intervals, corrected for their number.

Student's distribution is SciPy's, imported when it is first needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""Of every interval."""
LOOK, CLAIM = 3, 5
"""Fresh seeds that make a look worth taking, and those that a claim takes."""


@dataclass(frozen=True)
class Estimate:
    """A mean with what its seeds say of it. Spread is the standard deviation (n − 1); both are None for one seed."""

    mean: float
    count: int
    spread: float | None
    margin: float | None
    """Half of the interval: the mean of infinitely many such seeds lies within ± margin, at `LEVEL`."""

    @property
    def low(self) -> float | None:
        return None if self.margin is None else self.mean - self.margin

    @property
    def high(self) -> float | None:
        return None if self.margin is None else self.mean + self.margin

    @property
    def direction(self) -> int:
        """−1 or 1 where the whole interval lies on that side of 0; 0 where it holds 0, or where there is none."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return -1 if self.mean < 0 else 1

    @property
    def p_value(self) -> float | None:
        """Student's two-sided p for a true mean of 0: how often seeds alone would bring the mean at least so far."""
        if self.spread is None:
            return None
        if not self.spread:
            return float(self.mean == 0)
        from scipy.special import stdtr

        t = abs(self.mean) / (self.spread / math.sqrt(self.count))
        return float(2 * stdtr(self.count - 1, -t))


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate | None:
    """Mean, spread and Student's interval, mean ± t·s/√n with n − 1 degrees of freedom; None of nothing."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, 1, None, None)
    from scipy.special import stdtrit

    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, count, spread, float(stdtrit(count - 1, (1 + level) / 2)) * spread / math.sqrt(count))


def paired(first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL) -> Estimate | None:
    """first − second, seed by seed: what a seed does to both drops out. Seeds of one alone do not count."""
    return estimate([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())], level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value corrected for how many there are, by Holm's method (Scand. J. Statist. 6, 1979), in their order.

    Of all that stay at or below α, the chance that even one is an accident is at most α, however the tests hang
    together: the smallest p is multiplied by their number k, the next by k − 1, and so on; none falls below a smaller
    one's, nor exceeds 1.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        corrected[i] = largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return corrected


def sensitivity(losses: Mapping[float, float | None], initial: float) -> float | None:
    """Learning-rate sensitivity: mean over the grid of min(ℓ(η), ℓ₀) − ℓ* (Wortsman et al. 2023, arXiv 2309.14322).

    Args:
        losses: final validation loss by learning rate; None where it is not finite, which counts as ℓ₀.
        initial: ℓ₀, the loss at init.

    Returns:
        None where no loss is finite.
    """
    capped = [initial if loss is None else min(loss, initial) for loss in losses.values()]
    if all(loss is None for loss in losses.values()):
        return None
    return math.fsum(capped) / len(capped) - min(capped)


def pair_in_words(
    first: str,
    second: str,
    difference: Estimate | None,
    failures: Mapping[str, tuple[int, int]],
    p_holm: float | None = None,
    pairs: int = 1,
) -> str:
    """The result of a pair named beforehand, in words that follow from the numbers.

    Args:
        difference: first − second in loss, so that a negative one favours the first.
        failures: (failed, run) seeds of each of the two.
        p_holm: the difference's p-value after Holm's correction; None where it is the only pair.
        pairs: how many it was corrected for.
    """
    failed = {name: count for name, count in failures.items() if count[0]}
    if failed:
        counts = " and ".join(f"{name} failed with {bad} of {run} seeds" for name, (bad, run) in failed.items())
        sound = [name for name in (first, second) if name not in failed and failures[name][1]]
        return f"{counts}{f', {sound[0]} with none' if sound else ''}: no difference in loss is claimed"
    if difference is None:
        return f"{first} against {second}: not compared yet"
    if difference.margin is None:
        return f"{first} against {second}: one seed in common, no interval, nothing shown"
    numbers = f"{difference.mean:+.4f}, {LEVEL:.0%} interval {difference.low:+.4f} to {difference.high:+.4f}"
    numbers += f", {difference.count} seeds, p {difference.p_value:.2g}"
    numbers += "" if p_holm is None else f", after Holm over {pairs} pairs {p_holm:.2g}"
    if not difference.direction:
        return f"{first} against {second}: no difference shown ({numbers})"
    better, worse = (first, second) if difference.direction < 0 else (second, first)
    weight = "" if difference.count >= CLAIM else f"; a look, not a claim, which takes {CLAIM} seeds"
    alone = "" if stands(p_holm) else f" at {LEVEL:.0%}, but not after Holm over {pairs} pairs"
    return f"{better} ends below {worse}{alone} (difference {numbers}{weight})"


def stands(p_holm: float | None) -> bool:
    """Whether a difference that is shown at `LEVEL` is shown after Holm's correction too."""
    return p_holm is None or p_holm <= 1 - LEVEL
