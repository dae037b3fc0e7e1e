"""Statistics against printed tables, hand-made cases and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spannorm.lab.results.statistics import Estimate, estimate, holm, pair_in_words, paired, sensitivity

# Student (1908) as any table prints it: p = 0.975.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("degrees", "t"), TABLE.items())
def test_margins_are_those_of_the_printed_table(degrees: int, t: float) -> None:
    found = estimate([float(i) for i in range(degrees + 1)])
    assert found is not None and found.count == degrees + 1 and found.spread is not None
    assert found.margin == pytest.approx(t * found.spread / math.sqrt(degrees + 1), rel=4e-4)


def test_a_p_value_is_the_mass_beyond_and_agrees_with_the_interval() -> None:
    # Two degrees of freedom have a closed form: P(T ≤ t) = ½ + t / (2 √(2 + t²)); here t = 2 / (1 / √3) = 2 √3.
    found = estimate([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert found is not None and found.p_value == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    for values in np.random.default_rng(1).normal(0.8, 1.0, (200, 5)):
        one = estimate(list(values))
        assert one is not None and one.p_value is not None and (one.p_value < 0.05) == bool(one.direction)
    assert Estimate(0.2, 1, None, None).p_value is None
    assert Estimate(0.2, 3, 0.0, 0.0).p_value == 0 and Estimate(0.0, 3, 0.0, 0.0).p_value == 1


def test_holms_correction_by_hand() -> None:
    # 4 · 0.005, then the largest so far of that, 3 · 0.01, 2 · 0.03 and 1 · 0.04
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.04]) == [0.04] and holm([]) == []


def test_holms_correction_keeps_accidents_rarer_than_it_says() -> None:
    draws = np.random.default_rng(2).normal(0.0, 1.0, (1500, 6, 4))  # six pairs between which there is no difference
    found = [[e.p_value for row in rows if (e := estimate(list(row)))] for rows in draws]
    assert np.mean([min(p) <= 0.05 for p in found]) > 0.2, "uncorrected: 1 − 0.95⁶ = 0.26"
    assert np.mean([min(holm(p)) <= 0.05 for p in found]) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 1500)


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
    words = pair_in_words("a", "b", difference, NONE_FAILED)
    assert says in words and not_said not in words


@pytest.mark.parametrize(
    ("p_holm", "says"),
    [
        (0.02, "a ends below b (difference -0.1000, 95% interval -0.1600 to -0.0400, 5 seeds, p 0.011, after Holm over "
               "3 pairs 0.02)"),
        (0.07, "a ends below b at 95%, but not after Holm over 3 pairs (difference -0.1000"),
        (None, "a ends below b (difference -0.1000, 95% interval -0.1600 to -0.0400, 5 seeds, p 0.011)"),
    ],
)  # fmt: skip
def test_words_say_what_is_left_after_the_correction(p_holm: float | None, says: str) -> None:
    assert pair_in_words("a", "b", Estimate(-0.1, 5, 0.05, 0.06), NONE_FAILED, p_holm, 3).startswith(says)


def test_a_failed_seed_is_told_and_no_loss_is_compared() -> None:
    words = pair_in_words("a", "b", Estimate(-0.1, 4, 0.01, 0.02), {"a": (0, 5), "b": (1, 5)})
    assert "b failed with 1 of 5 seeds, a with none" in words and "below" not in words
