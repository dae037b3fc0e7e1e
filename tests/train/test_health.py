"""Spikes and failures, held against the protocol's own words (spec: OLMo-core's SpikeScore; "training failed")."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spannorm.train.health import failure, spike_steps, spikes


def by_definition(values: list[float]) -> list[int]:
    """Above mean + 6σ (population) of the 128 values before it; a full window; σ of at least 1e-10."""
    found = []
    for i in range(128, len(values)):
        window = np.array(values[i - 128 : i])
        if window.std() >= 1e-10 and values[i] > window.mean() + 6 * window.std():
            found.append(i)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 500))
def test_spikes_are_what_the_definition_says(seed: int, length: int) -> None:
    draw = np.random.default_rng(seed)
    values = (
        3 + 0.1 * draw.standard_normal(length) + draw.choice([0, 0, 0, 0, 2], length) * draw.random(length)
    ).tolist()
    assert spikes(values) == by_definition(values)


def test_a_spike_needs_a_full_window_and_some_spread() -> None:
    noise = [1.0 + 0.01 * (i % 2) for i in range(200)]
    assert spikes([*noise[:127], 9.0]) == []
    assert spikes([*noise[:128], 9.0]) == [128]
    assert spikes([1.0] * 128 + [9.0]) == [], "σ below 1e-10 is no spike"
    # k values of 9 among 128 of about 1: mean + 6σ ≈ 1 + 8k/128 + 48·√(k/128), which passes 9 at k = 4
    assert spikes([*noise[:128], *[9.0] * 7]) == [128, 129, 130, 131]


def test_loss_and_gradient_spikes_count_once_a_step() -> None:
    noise = [1.0 + 0.01 * (i % 2) for i in range(140)]
    loss, norm = noise.copy(), noise.copy()
    loss[130] = norm[130] = norm[135] = 50.0
    assert spike_steps(loss, norm) == [130, 135]


def test_a_value_that_is_not_finite_is_a_spike_and_does_not_enter_the_window() -> None:
    noise = [1.0 + 0.01 * (i % 2) for i in range(200)]
    assert spikes([*noise[:128], None, *noise[:20], 5.0]) == [128, 149]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails(bad: float | None) -> None:
    assert failure([3.0, bad], [], 1.0, 3.0) == "non-finite"
    assert failure([3.0, 2.0], [], bad, 3.0) == "non-finite"


def test_a_model_near_the_unigram_loss_fails() -> None:
    assert failure([3.0], [], 2.81, 3.0) == "unigram"
    assert failure([3.0], [], 2.79, 3.0) is None


def test_a_spike_that_the_loss_does_not_recover_from_fails() -> None:
    assert failure([2.0] * 100 + [4.0] + [2.11] * 50, [100], 2.0, 3.2) == "spike"
    assert failure([2.0] * 100 + [4.0] + [2.09] * 50, [100], 2.0, 3.2) is None
    assert failure([2.0] * 100 + [4.0] + [2.5] * 50, [], 2.0, 3.2) is None, "without a spike nothing was lost to one"
    recovered = [2.0] * 50 + [4.0] + [2.5] * 50 + [4.5] + [2.4] * 50
    assert failure(recovered, [50, 101], 2.0, 3.2) is None, "the last spike counts"
