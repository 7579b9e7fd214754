"""From records to a profile, with the quality of the fit."""

from __future__ import annotations

import random

import pytest

from disagg_plugins.scheduling.prediction import Observation, prefill_features
from disagg_plugins.scheduling.profile_fit import LEAST_OBSERVATIONS, ProfileFit, fit_phase
from tests.scheduling import queueing as q


def records(number=400, seed=2):
    """Return what a gateway would have recorded of a fleet under a light load."""
    told = []
    rng = random.Random(seed)
    q.run(lambda *_: rng.random() < 0.6, q.jobs(seed, number, 2, 600), 1, 1, ended=told.append)
    return told


def fitted(kinds=None, told=None):
    fit = ProfileFit(kinds)
    for each in records() if told is None else told:
        fit.take(each)
    return fit.profile()


def test_coefficients_and_error_are_those_of_the_measured_fleet():
    profile, remarks = fitted()
    p0 = next(e for e in profile.measured if e.worker == "p0")
    assert p0.prefill.per_token_s == pytest.approx(q.PREFILL[1], rel=0.2)
    assert p0.prefill.fit.observations > 100
    assert 2 < p0.prefill.fit.error_percent < 15
    assert any("worker p0, prefill" in r and "percentage error" in r for r in remarks)
    d0 = next(e for e in profile.measured if e.worker == "d0")
    assert d0.decode.base_s == pytest.approx(q.DECODE[0], rel=0.2)
    assert d0.handoff is not None


def test_workers_of_one_kind_are_fitted_together():
    kinds = {"p0": ("vllm", "a100"), "d0": ("vllm", "a100")}
    profile, _ = fitted(kinds)
    [entry] = profile.measured
    assert (entry.worker, entry.engine, entry.hardware) == (None, "vllm", "a100")
    assert entry.prefill.fit.observations == 400


def test_too_few_are_left_out_and_told():
    profile, remarks = fitted(told=records(LEAST_OBSERVATIONS - 2))
    assert profile is None
    assert all("left out" in remark for remark in remarks)


def test_an_exact_fit_has_no_error():
    features = [prefill_features(100.0 * i, 0, 0) for i in range(1, 40)]
    seen = [Observation("prefill", "p", f, 0.01 + 1e-4 * f[1]) for f in features]
    found = fit_phase("prefill", seen)
    assert found.fit.error_percent < 0.5
    assert (found.base_s, found.per_token_s) == pytest.approx((0.01, 1e-4), rel=0.05)
