"""What may be said of a few seeds: means, spreads, paired differences with intervals. Standard library only."""

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


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate | None:
    """Mean, spread and Student's interval, mean ± t·s/√n with n − 1 degrees of freedom; None of nothing."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, 1, None, None)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, count, spread, t_quantile((1 + level) / 2, count - 1) * spread / math.sqrt(count))


def paired(first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL) -> Estimate | None:
    """first − second, seed by seed: what a seed does to both drops out. Seeds of one alone do not count."""
    return estimate([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())], level)


def t_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t) of Student's distribution with whole degrees of freedom (finite series, Abramowitz & Stegun 26.7.3–4).

    With θ = atan(t/√ν), the mass within ±t is sin θ · (1 + ½cos²θ + ½·¾cos⁴θ + … up to cos^(ν−2)) for even ν, and
    2/π · (θ + sin θ · (cos θ + ⅔cos³θ + ⅔·⅘cos⁵θ + … up to cos^(ν−2))) for odd ν.
    """
    theta = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = total = 0.0
    for power in range(odd, degrees - 1, 2):
        term = (math.cos(theta) if odd else 1.0) if power == odd else term * math.cos(theta) ** 2 * (power - 1) / power
        total += term
    within = math.sin(theta) * total
    return 0.5 + ((theta + within) / math.pi if odd else within / 2)


def t_quantile(p: float, degrees: int) -> float:
    """The t below which Student's distribution has mass p, 0 < p < 1, by bisection over θ = atan(t/√ν)."""
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if t_cdf(math.sqrt(degrees) * math.tan(middle), degrees) < p:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


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


def verdict(first: str, second: str, difference: Estimate | None, failures: Mapping[str, tuple[int, int]]) -> str:
    """What a pair named beforehand comes to, in words that follow from the numbers.

    Args:
        difference: first − second in loss, so that a negative one favours the first.
        failures: (failed, run) seeds of each of the two.
    """
    failed = {name: count for name, count in failures.items() if count[0]}
    if failed:
        told = " and ".join(f"{name} failed with {bad} of {run} seeds" for name, (bad, run) in failed.items())
        held = [name for name in (first, second) if name not in failed and failures[name][1]]
        return f"{told}{f', {held[0]} with none' if held else ''}: no difference in loss is claimed"
    if difference is None:
        return f"{first} against {second}: not compared yet"
    if difference.margin is None:
        return f"{first} against {second}: one seed in common, no interval, nothing shown"
    numbers = f"{difference.mean:+.4f}, {LEVEL:.0%} interval {difference.low:+.4f} to {difference.high:+.4f}"
    numbers += f", {difference.count} seeds"
    if not difference.direction:
        return f"{first} against {second}: no difference shown ({numbers})"
    better, worse = (first, second) if difference.direction < 0 else (second, first)
    weight = "" if difference.count >= CLAIM else f"; a look, not a claim, which takes {CLAIM} seeds"
    return f"{better} ends below {worse} (difference {numbers}{weight})"
