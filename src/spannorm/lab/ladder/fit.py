"""Curves through a ladder's losses, and what they say of compute.

    L(C)    = E + A·C^-α              C = 6·N·D operations
    L(N, D) = E + A·N^-α + B·D^-β     N parameters without embeddings, D tokens (Hoffmann et al. 2022)

A, B, α and β belong to an arm; E, what no model of this text gets below, is shared. Least squares of log L, by SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Term = Callable[["Point"], float]


@dataclass(frozen=True)
class Point:
    """One finished run."""

    arm: str
    rung: int
    seed: int
    parameters: float
    tokens: float
    loss: float
    """Nats per token, on the test split."""

    @property
    def compute(self) -> float:
        return 6.0 * self.parameters * self.tokens


COMPUTE: tuple[Term, ...] = (lambda p: p.compute,)
SIZE_AND_TOKENS: tuple[Term, ...] = (lambda p: p.parameters, lambda p: p.tokens)


@dataclass(frozen=True)
class Fit:
    """Loss as a sum of powers, by arm."""

    irreducible: float
    """E, nats per token."""
    scales: tuple[float, ...]
    """The value of each term at which its coefficient is stated: the geometric mean over the points."""
    powers: Mapping[str, tuple[tuple[float, float], ...]]
    """By arm and term: the term's loss at its scale, and its exponent."""
    residuals: tuple[float, ...]
    """log of measured over fitted loss, in the order of the points."""

    def loss(self, arm: str, *values: float) -> float:
        """The loss that is fitted to an arm, nats per token."""
        terms = zip(self.powers[arm], values, self.scales, strict=True)
        return self.irreducible + float(sum(a * (value / scale) ** -power for (a, power), value, scale in terms))

    def compute(self, arm: str, loss: float) -> float:
        """The compute at which an arm's curve (of one term) reaches a loss; infinite at E and below."""
        ((a, power),) = self.powers[arm]
        if loss <= self.irreducible:
            return math.inf
        return float(self.scales[0] * (a / (loss - self.irreducible)) ** (1 / power))

    def multiplier(self, first: str, second: str, loss: float) -> float:
        """How many times the first's compute the second takes to the same loss: above 1 the first saves compute."""
        return self.compute(second, loss) / self.compute(first, loss)


def fit(points: Sequence[Point], terms: Sequence[Term] = COMPUTE, start: Fit | None = None) -> Fit:
    """Fit every arm's curve at once, E shared.

    Args:
        start: where to look first; without it E starts at several shares of the lowest loss, and the best fit counts.
    """
    from scipy.optimize import least_squares

    arms = list(dict.fromkeys(p.arm for p in points))
    values = np.array([[term(p) for term in terms] for p in points])
    scales = np.exp(np.log(values).mean(axis=0)) if start is None else np.array(start.scales)
    x, y = np.log(values / scales), np.array([p.loss for p in points])
    arm_of = np.array([arms.index(p.arm) for p in points])
    lowest, k = y.min(), len(terms)

    def predicted(theta: np.ndarray) -> np.ndarray:
        amplitude, power = theta[1:].reshape(len(arms), k, 2)[arm_of].transpose(2, 0, 1)
        total: np.ndarray = theta[0] + np.exp(amplitude - np.exp(power) * x).sum(axis=1)
        return total

    def solve(theta: np.ndarray) -> tuple[float, np.ndarray]:
        bounds = np.full(len(theta), -np.inf), np.full(len(theta), np.inf)
        bounds[0][0], bounds[1][0] = 0.0, lowest * 0.999
        bounds[0][2::2], bounds[1][2::2] = math.log(1e-3), math.log(3.0)
        solution = least_squares(lambda t: np.log(predicted(t) / y), theta, bounds=bounds, x_scale="jac")
        return float(solution.cost), solution.x

    if start is None:
        starts = []
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            rest = math.log((y.mean() - share * lowest) / k)
            starts.append(np.array([share * lowest, *[rest, math.log(0.2)] * (len(arms) * k)]))
    else:
        flat = [math.log(v) for arm in arms for pair in start.powers[arm] for v in pair]
        starts = [np.array([min(start.irreducible, lowest * 0.99), *flat])]
    _, theta = min((solve(theta) for theta in starts), key=lambda pair: pair[0])
    pairs = np.exp(theta[1:]).reshape(len(arms), k, 2)
    powers = {arm: tuple((float(a), float(p)) for a, p in pairs[i]) for i, arm in enumerate(arms)}
    residuals = tuple(float(r) for r in np.log(y / predicted(theta)))
    return Fit(float(theta[0]), tuple(map(float, scales)), powers, residuals)


def resampled(points: Sequence[Point], draws: int, seed: int = 0) -> Iterable[list[Point]]:
    """Bootstrap samples: rungs drawn with replacement, and of each its seeds, the same ones for all arms.

    A sample of fewer than three different rungs fixes no curve and is drawn again.
    """
    generator = np.random.default_rng(seed)
    rungs = sorted({p.rung for p in points})
    by_rung = {r: {s: [p for p in points if (p.rung, p.seed) == (r, s)] for s in seeds} for r in rungs
               if (seeds := sorted({p.seed for p in points if p.rung == r}))}  # fmt: skip
    made = 0
    while made < draws:
        chosen = generator.choice(rungs, len(rungs))
        if len(set(chosen)) < min(3, len(rungs)):
            continue
        sample: list[Point] = []
        for r in chosen:
            seeds = list(by_rung[r])
            for s in generator.choice(seeds, len(seeds)):
                sample += by_rung[r][int(s)]
        made += 1
        yield sample


def bootstrap(
    points: Sequence[Point], measure: Callable[[Fit], Sequence[float]], draws: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of each number that `measure` reads off a fit: percentiles over bootstrap samples."""
    start, arms, measured = fit(points), {p.arm for p in points}, []
    for sample in resampled(points, draws):
        if {p.arm for p in sample} == arms:
            measured.append(measure(fit(sample, start=start)))
    low, high = np.percentile(np.array(measured), [2.5, 97.5], axis=0)
    return low, high
