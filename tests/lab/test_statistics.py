"""Statistics against printed tables, hand-made cases and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spannorm.lab.statistics import Estimate, estimate, paired, sensitivity, t_cdf, t_quantile, verdict

# Student (1908) as any table prints it: p = 0.975.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("degrees", "t"), TABLE.items())
def test_quantiles_are_those_of_the_printed_table(degrees: int, t: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(t, abs=5.1e-4)
    assert t_quantile(0.025, degrees) == pytest.approx(-t, abs=5.1e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("t", [-2.5, 0.0, 0.3, 4.0])
def test_the_distribution_is_the_integral_of_its_density(degrees: int, t: float) -> None:
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
    x = np.linspace(0, t, 200_001)
    density = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(x * x / degrees))
    assert t_cdf(t, degrees) == pytest.approx(0.5 + np.trapezoid(density, x), abs=1e-9)


@given(st.floats(0.001, 0.999), st.integers(1, 40))
def test_a_quantile_is_the_inverse_of_the_distribution(p: float, degrees: int) -> None:
    assert t_cdf(t_quantile(p, degrees), degrees) == pytest.approx(p, abs=1e-9)


def test_an_estimate_by_hand() -> None:
    found = estimate([1.0, 2.0, 3.0])
    assert found is not None and found.mean == 2 and found.spread == 1 and found.count == 3
    assert found.margin == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert estimate([]) is None
    assert estimate([4.0]) == Estimate(4.0, 1, None, None)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(0.3, 2.0, (4000, 4))
    found = [estimate(list(row)) for row in draws]
    share = np.mean([e.low <= 0.3 <= e.high for e in found])
    assert share == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_pairing_drops_what_a_seed_does_to_both() -> None:
    luck = {0: 0.5, 1: -2.0, 2: 7.0}
    first = {seed: 1.0 + shift for seed, shift in luck.items()} | {9: 100.0}
    found = paired(first, {seed: 1.25 + shift for seed, shift in luck.items()})
    assert found is not None and found.count == 3
    assert found.mean == pytest.approx(-0.25) and found.spread == pytest.approx(0, abs=1e-12)
    assert paired({0: 1.0}, {1: 2.0}) is None


def test_sensitivity_by_hand() -> None:
    # min(ℓ, ℓ₀) = 2, 3, 5, 5, less ℓ* = 2
    assert sensitivity({1e-3: 2.0, 1e-2: 3.0, 1e-1: 9.0, 1.0: None}, initial=5.0) == pytest.approx(1.75)
    assert sensitivity({1e-3: 2.0, 1e-2: 2.0}, initial=5.0) == 0
    assert sensitivity({1e-3: None}, initial=5.0) is None


NONE_FAILED = {"a": (0, 5), "b": (0, 5)}


@pytest.mark.parametrize(
    ("difference", "says", "not_said"),
    [
        (Estimate(-0.1, 5, 0.05, 0.06), "a ends below b", "look"),
        (Estimate(0.1, 5, 0.05, 0.06), "b ends below a", "look"),
        (Estimate(-0.1, 3, 0.02, 0.06), "a look, not a claim", "no difference"),
        (Estimate(-0.1, 5, 0.1, 0.12), "no difference shown", "below"),
        (Estimate(-0.1, 1, None, None), "nothing shown", "below"),
        (None, "not compared yet", "below"),
    ],
)
def test_words_follow_from_the_interval(difference: Estimate | None, says: str, not_said: str) -> None:
    words = verdict("a", "b", difference, NONE_FAILED)
    assert says in words and not_said not in words


def test_a_failed_seed_is_told_and_no_loss_is_compared() -> None:
    words = verdict("a", "b", Estimate(-0.1, 4, 0.01, 0.02), {"a": (0, 5), "b": (1, 5)})
    assert "b failed with 1 of 5 seeds, a with none" in words and "below" not in words
