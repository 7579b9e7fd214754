"""Coefficients are found in noise, followed when they drift, and never nonsense."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.scheduling.regression import Regression, solve_non_negative

# DistServe's OPT-13B on one A100 (profiler-a100-80g.distserve.json), in seconds.
PREFILL = (0.01646, 9.265e-5, 6.475e-9)
SCALES = (1.0, 1e3, 1e6)
SHARES = (0.2, 0.8, 0.0)


def features(tokens):
    return (1.0, float(tokens), float(tokens * tokens))


def truth(tokens, factor=1.0):
    return factor * sum(c * f for c, f in zip(PREFILL, features(tokens), strict=True))


def feed(fit, count, rng, factor=1.0, noise=0.05):
    for _ in range(count):
        tokens = int(2 ** rng.uniform(5, 13))
        fit.observe(features(tokens), truth(tokens, factor) * rng.lognormvariate(0, noise))


def worst_error(fit, factor=1.0):
    return max(
        abs(fit.predict(features(n)) / truth(n, factor) - 1) for n in (64, 256, 1024, 4096, 8192)
    )


@pytest.fixture
def rng():
    return random.Random(7)


@pytest.fixture
def fit():
    return Regression(SCALES, SHARES)


def test_known_coefficients_are_recovered_from_noise(fit, rng):
    feed(fit, 2000, rng)
    assert worst_error(fit) < 0.05
    assert fit.coefficients[1] == pytest.approx(PREFILL[1], rel=0.1)
    assert 0.02 < fit.error < 0.08  # the noise


def test_a_worker_that_becomes_slower_is_followed(fit, rng):
    feed(fit, 500, rng)
    feed(fit, 1000, rng, factor=2.0)
    assert worst_error(fit, factor=2.0) < 0.1


def test_a_slow_drift_is_followed(fit, rng):
    for i in range(2000):
        feed(fit, 1, rng, factor=1 + i / 2000)
    assert worst_error(fit, factor=2.0) < 0.1


def test_outliers_do_not_move_it(fit, rng):
    feed(fit, 300, rng)
    for _ in range(300):
        feed(fit, 1, rng)
        if rng.random() < 0.05:
            fit.observe(features(512), 30.0)
    assert worst_error(fit) < 0.15


def test_a_first_observation_that_is_far_off_is_soon_forgotten(fit, rng):
    fit.observe(features(512), 30.0)  # an engine that compiles its kernels
    feed(fit, 200, rng)
    assert worst_error(fit) < 0.1


def test_the_first_observation_is_predicted_and_grows_with_the_prompt(fit):
    assert not fit.known
    fit.observe(features(500), 0.1)
    assert fit.predict(features(500)) == pytest.approx(0.1)
    assert fit.predict(features(5000)) > 0.4


def test_prompts_of_one_length_leave_the_rest_at_what_was_known(fit, rng):
    fit.seed(PREFILL)
    for _ in range(500):
        fit.observe(features(1000), truth(1000) * rng.lognormvariate(0, 0.05))
    assert worst_error(fit) < 0.25


def test_a_seed_is_outweighed_by_what_is_measured(fit, rng):
    fit.seed([5 * c for c in PREFILL])
    assert worst_error(fit, 5.0) < 1e-9
    feed(fit, 100, rng)
    assert worst_error(fit) < 0.2


@given(
    st.lists(
        st.tuples(st.integers(0, 1_000_000), st.floats(0, 1e6), st.floats(0, 1e9)), max_size=60
    )
)
@settings(max_examples=150, deadline=None)
def test_predictions_are_finite_not_negative_and_grow_with_tokens(observed):
    fit = Regression(SCALES, SHARES)
    for tokens, seconds, other in observed:
        fit.observe((1.0, float(tokens), other), seconds)
    times = [fit.predict(features(n)) for n in (0, 1, 100, 10_000, 1_000_000)]
    assert all(0.0 <= t < float("inf") for t in times)
    assert times == sorted(times)
    assert all(c >= 0.0 for c in fit.coefficients)


@pytest.mark.parametrize(
    ("row", "seconds"),
    [
        ((1.0, 10.0, 100.0), float("nan")),
        ((1.0, 10.0, 100.0), float("inf")),
        ((1.0, 10.0, 100.0), -1.0),
        ((1.0, float("nan"), 0.0), 1.0),
        ((1.0, -5.0, 0.0), 1.0),
    ],
)
def test_what_is_no_measurement_is_left_out(fit, row, seconds):
    fit.observe(row, seconds)
    assert fit.observations == 0


def test_memory_does_not_grow_with_observations(fit, rng):
    feed(fit, 100, rng)
    held = ("_pairs", "_matrix", "_vector", "_solution", "coefficients")
    before = [len(getattr(fit, name)) for name in held]
    feed(fit, 500, rng)
    assert [len(getattr(fit, name)) for name in held] == before


def test_times_below_a_microsecond_are_not_told_apart(fit):
    fit.seed((5e-7, 0.0, 0.0))
    for _ in range(3):
        fit.observe(features(100), 0.0)
    assert fit.error < 1.0


@pytest.mark.parametrize(
    ("vector", "found"),
    [((4.0, 6.0), (2.0, 3.0)), ((4.0, -6.0), (2.0, 0.0)), ((-1.0, -1.0), (0.0, 0.0))],
)
def test_no_coefficient_is_negative(vector, found):
    diagonal = [[2.0, 0.0], [0.0, 2.0]]
    assert solve_non_negative(diagonal, vector, [9.0, 9.0]) == pytest.approx(list(found))


def test_a_feature_that_was_never_seen_keeps_its_coefficient():
    assert solve_non_negative([[2.0, 0.0], [0.0, 0.0]], (4.0, 0.0), [1.0, 7.0]) == [2.0, 7.0]


@pytest.mark.parametrize("tiny", [7.5e-250, 5e-324, 1e-16])
def test_a_start_from_a_coefficient_near_zero_is_a_start_from_none(fit, rng, tiny):
    fit.seed((0.01, tiny, 0.0))
    feed(fit, 500, rng)
    assert worst_error(fit) < 0.1
