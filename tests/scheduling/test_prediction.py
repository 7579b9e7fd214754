"""What records teach, and what is predicted from it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.scheduling.prediction import (
    MAX_WAITING,
    MAX_WORKERS,
    OWN_AFTER,
    PATIENT_AFTER,
    Observation,
    Predictor,
    decode_features,
    expected_output,
    observations,
    prefill_features,
)
from disagg_plugins.types import IDLE, Role, Worker, WorkerLoad

# DistServe's OPT-13B on one A100, in seconds; decode is its line for small batches.
PREFILL = (0.01646, 9.265e-5, 6.475e-9, 9.265e-5, 0.0)
DECODE = (0.019935, 3.85e-5, 6.27e-7, 9.265e-5)


def worker(name, role=Role.BOTH, hardware="a100"):
    return Worker(name, f"http://127.0.0.1/{name}", "vllm", role, labels={"hardware": hardware})


P0, P1, D0 = worker("p0", Role.PREFILL), worker("p1", Role.PREFILL), worker("d0", Role.DECODE)


def record(**changes):
    return {
        "outcome": "ok",
        "stream": True,
        "route": "disaggregated",
        "split": "yes",
        "retries": 0,
        "failures": [],
        "prefill": "p0",
        "decode": "d0",
        "prompt_tokens_estimate": 1000,
        "prompt_tokens": 1100,
        "output_tokens": 101,
        "sent_s": 0.5,
        "prefill_s": 0.1,
        "ttft_s": 0.65,
        "tpot_s": 0.02,
        "prefill_queued_tokens": 300,
        "prefill_requests": 2,
        "prefill_cached_tokens": 100,
        "decode_requests": 4,
        "decode_kv_tokens": 5000,
        "decode_read_tokens": 2000,
        **changes,
    }


def by_phase(told):
    return {seen.phase: seen for seen in observations(told)}


def test_a_split_request_tells_of_reading_handoff_and_steps_where_each_happened():
    seen = by_phase(record())
    assert seen["prefill"] == Observation(
        "prefill", "p0", prefill_features(1000.0, 300.0, 2.0), 0.1
    )
    assert (seen["handoff"].worker, seen["handoff"].features) == ("d0", (1.0, 1100.0))
    assert seen["handoff"].seconds == pytest.approx(0.05)  # not the wait before the first call
    assert seen["decode"] == Observation(
        "decode", "d0", decode_features(5.0, 5000 + 1100 + 50.5, 20.0), 0.02
    )


def test_a_handoff_counts_the_tokens_that_really_moved():
    assert by_phase(record(handoff={"tokens_loaded": 640}))["handoff"].features == (1.0, 640.0)
    assert by_phase(record(handoff={"tokens_loaded": None}))["handoff"].features == (1.0, 1100.0)


def test_a_local_request_tells_of_reading_among_answers_on_its_decode_worker():
    seen = by_phase(record(route="local", split="no", prefill=None, prefill_s=None))
    assert set(seen) == {"prefill", "decode"}
    assert seen["prefill"].worker == "d0"
    assert seen["prefill"].features == prefill_features(1000.0, 300.0, 4.0)
    assert seen["prefill"].seconds == pytest.approx(0.15)


@pytest.mark.parametrize(
    "trouble",
    [
        {"outcome": "broken"},
        {"retries": 1},
        {"failures": [{"kind": "closed"}]},
        {"stream": False},
        {"decode": None},
    ],
)
def test_a_request_that_had_trouble_tells_nothing(trouble):
    assert list(observations(record(**trouble))) == []


@pytest.mark.parametrize("split", ["no: nothing loaded", "no: no report"])
def test_a_split_of_which_nobody_says_that_it_happened_tells_what_it_cost(split):
    seen = by_phase(record(split=split))
    assert set(seen) == {"prefill", "handoff", "decode"}
    assert seen["handoff"].seconds == pytest.approx(0.05)


def test_an_answer_whose_tokens_nobody_counted_tells_of_steps_by_its_length():
    assert by_phase(record(output_tokens=None, e2e_s=2.65))["decode"].features == (
        decode_features(5.0, 5000 + 1100 + 50.5, 20.0)
    )


@pytest.mark.parametrize("odd", [{}, {"outcome": "ok"}, record(ttft_s="soon", tpot_s=[1])])
def test_odd_records_do_no_harm(odd):
    list(observations(odd))


def teach(predictor, name, rng, count, prefill=PREFILL, decode=DECODE):
    for _ in range(count):
        noise = rng.lognormvariate(0, 0.05)
        read = prefill_features(rng.uniform(32, 4096), rng.uniform(0, 4000), rng.randrange(8))
        predictor.learn(Observation("prefill", name, read, noise * dot(prefill, read)))
        requests = rng.randrange(1, 64)
        step = decode_features(requests, requests * rng.uniform(100, 1000), rng.uniform(0, 40))
        predictor.learn(Observation("decode", name, step, noise * dot(decode, step)))


def dot(coefficients, features):
    return sum(c * f for c, f in zip(coefficients, features, strict=True))


@pytest.fixture
def taught():
    predictor = Predictor()
    for each in (P0, P1, D0):
        predictor.know(each)
    teach(predictor, "p0", random.Random(3), 400)
    return predictor


def test_reading_is_predicted_with_the_queue_before_it(taught):
    load = WorkerLoad(requests=2, prompt_tokens=3000)
    assert taught.prefill_s(P0, load, 2000) == pytest.approx(
        dot(PREFILL, prefill_features(2000, 3000, 2)), rel=0.05
    )
    assert taught.prefill_s(P0, IDLE, 2000) < taught.prefill_s(P0, load, 2000)


def test_a_step_is_predicted_with_the_requests_and_kv_of_the_batch(taught):
    load = WorkerLoad(requests=20, kv_tokens=10_000)
    expected = dot(DECODE, decode_features(21, 10_500, 20))  # prompts go on being read there
    assert taught.step_s(P0, load, 500) == pytest.approx(expected, rel=0.1)


def test_what_reading_costs_the_answers_beside_it_is_learnt_from_disturbed_answers(taught):
    assert taught.delay_s(P0, 1000) == pytest.approx(1000 * DECODE[3], rel=0.1)


def test_where_no_answer_was_disturbed_reading_costs_the_others_its_own_time():
    predictor = Predictor()
    predictor.seed_worker("d0", "prefill", PREFILL)
    assert predictor.delay_s(D0, 1000) == pytest.approx(dot(PREFILL[1:3], (1e3, 1e6)))


def test_a_new_worker_is_predicted_like_the_others_of_its_engine_and_hardware(taught):
    assert taught.prefill_s(P1, IDLE, 1000) == pytest.approx(taught.prefill_s(P0, IDLE, 1000), 0.05)
    assert taught.prefill_s(worker("q", hardware="l4"), IDLE, 1000) is None


def test_a_worker_that_differs_from_its_kind_is_told_apart_once_it_has_data(taught):
    slow = [3 * c for c in PREFILL]
    teach(taught, "p1", random.Random(4), OWN_AFTER, prefill=slow)
    expected = dot(slow, prefill_features(1000, 0, 0))
    assert taught.prefill_s(P1, IDLE, 1000) == pytest.approx(expected, rel=0.15)


def test_a_worker_that_joined_later_teaches_its_kind_and_learns_from_it():
    predictor = Predictor()
    joined, next_one = worker("p8", Role.PREFILL), worker("p9", Role.PREFILL)
    assert predictor.prefill_s(joined, IDLE, 1000) is None  # it was asked about
    predictor.learn(Observation("prefill", "p8", prefill_features(1000, 0, 0), 0.1))
    assert predictor.prefill_s(next_one, IDLE, 1000) == pytest.approx(0.1)


def test_another_worker_under_an_old_name_starts_anew():
    predictor = Predictor()
    old = worker("p8", Role.PREFILL)
    predictor.know(old)
    for _ in range(100):
        predictor.learn(Observation("prefill", "p8", prefill_features(1000, 0, 0), 0.1))
    new = replace(old, labels={"hardware": "other"})
    assert predictor.prefill_s(new, IDLE, 1000) is None


def test_nothing_is_predicted_of_what_nobody_measured():
    predictor = Predictor()
    assert predictor.prefill_s(P0, IDLE, 10) is None
    assert predictor.step_s(P0, IDLE, 10) is None
    assert predictor.handoff_s(P0, 10) is None
    assert predictor.delay_s(P0, 10) == 0.0


def test_one_observation_is_enough_to_predict():
    predictor = Predictor()
    predictor.know(P0)
    predictor.observe(record())
    predictor.catch_up()
    assert predictor.prefill_s(P0, IDLE, 1000) > 0.0


def test_a_seeded_worker_is_not_predicted_like_its_kind():
    predictor = Predictor()
    predictor.seed_kind(("vllm", "a100"), "prefill", PREFILL)
    predictor.seed_worker("p0", "prefill", [2 * c for c in PREFILL])
    ratio = predictor.prefill_s(P0, IDLE, 500) / predictor.prefill_s(P1, IDLE, 500)
    assert ratio == pytest.approx(2.0)


def test_a_seed_does_not_replace_what_was_measured(taught):
    before = taught.prefill_s(P0, IDLE, 1000)
    taught.seed_kind(("vllm", "a100"), "prefill", [9.0] * 5)
    taught.seed_worker("p0", "prefill", [9.0] * 5)
    assert taught.prefill_s(P0, IDLE, 1000) == before


def test_workers_that_come_and_go_do_not_add_up():
    predictor = Predictor()
    for i in range(2 * MAX_WORKERS + 10):
        predictor.know(worker(f"w{i}"))
        predictor.learn(Observation("handoff", f"w{i}", (1.0, 10.0), 0.1))
        predictor.fits(worker(f"w{i}"))
    assert len(predictor._of_worker) <= MAX_WORKERS
    assert len(predictor._kinds) <= 2 * MAX_WORKERS
    assert len(predictor._fits) <= 2 * MAX_WORKERS


@pytest.mark.parametrize(("bound", "tokens"), [(None, 256), (10, 10), (0, 1), (10**9, 4096)])
def test_output_is_expected_within_reason(bound, tokens):
    assert expected_output(bound) == tokens


def test_records_wait_bounded_until_somebody_asks():
    predictor = Predictor()
    for _ in range(5000):
        predictor.observe(record())
    assert len(predictor._waiting) == MAX_WAITING
    predictor.catch_up()
    assert not predictor._waiting


def test_a_worker_that_is_known_well_is_followed_by_a_part_of_its_requests():
    predictor = Predictor()
    for _ in range(4 * PATIENT_AFTER):
        predictor.observe(record())
        predictor.catch_up()
    learnt = predictor._of_worker["d0"].observations
    assert PATIENT_AFTER < learnt < 3 * PATIENT_AFTER


COSTS = st.just(0.0) | st.floats(1e-9, 1e-2)


@given(
    st.lists(COSTS, min_size=5, max_size=5),
    st.lists(COSTS, min_size=4, max_size=4),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 1000),
)
def test_predictions_are_the_fits_of_the_features(prefill, decode, tokens, queued, requests):
    predictor = Predictor()
    for phase, known in (("prefill", prefill), ("decode", decode), ("handoff", prefill[:2])):
        predictor.seed_worker("d0", phase, known)
    load = WorkerLoad(requests, queued, kv_tokens=3 * queued)
    fits = predictor.fits(D0)
    expected = {
        "prefill": fits.prefill.predict(prefill_features(tokens, queued, requests)),
        "decode": fits.decode.predict(decode_features(requests + 1, 3 * queued + tokens, 0.0)),
        "handoff": fits.handoff.predict((1.0, tokens)),
    }
    assert predictor.prefill_s(D0, load, tokens) == pytest.approx(expected["prefill"], rel=1e-12)
    assert predictor.step_s(D0, load, tokens) == pytest.approx(expected["decode"], rel=1e-12)
    assert predictor.handoff_s(D0, tokens) == pytest.approx(expected["handoff"], rel=1e-12)


@given(st.lists(st.tuples(st.sampled_from([P0, P1, D0]), st.booleans()), max_size=80))
def test_what_is_remembered_of_fits_is_what_a_fresh_look_finds(steps):
    predictor = Predictor()
    for number, (each, learn) in enumerate(steps):
        if learn:
            seen = Observation("prefill", each.name, prefill_features(100.0 + number, 0, 0), 0.1)
            for _ in range(OWN_AFTER // 3):
                predictor.learn(seen)
        remembered = [predictor.fits(w) for w in (P0, P1, D0)]
        predictor._fits.clear()
        assert all(
            getattr(fits, part) is getattr(predictor.fits(w), part)
            for w, fits in zip((P0, P1, D0), remembered, strict=True)
            for part in ("worker", "prefill", "decode", "handoff", "own")
        )
