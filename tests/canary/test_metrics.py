"""What a request's record says of its arm: bad ends count as bad, and unknown ones not at all."""

from __future__ import annotations

import math

import pytest

from disagg_plugins.canary.metrics import FAILED, METRICS, Outcome, metric_named, outcome_of
from disagg_plugins.errors import ConfigError
from disagg_plugins.telemetry.records import HandoffRecord, RequestRecord


def outcome(ended="ok", **told):
    return Outcome("candidate", 0.0, ended, **told)


def value(metric, *args, **told):
    return METRICS[metric].of(outcome(*args, **told))


def record(**told):
    values = {
        "request_id": "r", "at_s": 5.0, "endpoint": "/v1/completions", "model": "m",
        "route": "local", "why": "", "prefill": None, "decode": "d", "stream": True,
        "prompt_tokens_estimate": 100, "status": 200, "outcome": "ok", "ttft_s": 0.2,
        "tpot_s": 0.03, "e2e_s": 2.0, "output_tokens": 60,
    }  # fmt: skip
    return RequestRecord(**(values | told))


def split_record(handoff=None, **told):
    told = {"route": "disaggregated", "prefill": "p", "split": "yes"} | told
    return record(handoff=handoff or HandoffRecord("h", "consumed", "complete"), **told)


def test_a_good_request_counts_in_every_metric_that_it_has():
    found = {name: m.of(outcome_of(record(), "baseline")) for name, m in METRICS.items()}
    assert found == {
        "error_rate": 0.0, "ttft": 0.2, "tpot": 0.03, "e2e": 2.0, "goodput": None,
        "abandonment": 0.0, "rejection_rate": 0.0, "kv_failures": None, "lease_ends": None,
        "recompute_share": None, "split_share": 0.0, "goodput_per_worker": None,
        "goodput_per_cost": None,
    }  # fmt: skip


@pytest.mark.parametrize("ended", sorted(FAILED))
def test_a_failed_request_has_infinite_latencies_and_is_no_goodput(ended):
    told = {"within_slo": True, "e2e_s": 0.1, "tpot_s": 0.01}
    assert value("error_rate", ended, **told) == 1.0
    assert [value(name, ended, **told) for name in ("ttft", "tpot", "e2e")] == [math.inf] * 3
    assert value("goodput", ended, **told) == 0.0


def test_a_first_token_that_came_counts_at_its_time_even_if_the_stream_broke():
    assert value("ttft", "broken", ttft_s=0.3) == 0.3
    assert value("tpot", "broken", ttft_s=0.3, tpot_s=0.01) == math.inf


def test_a_client_that_left_waited_as_long_as_it_did():
    assert value("ttft", "client_gone", e2e_s=4.0) == 4.0
    assert value("e2e", "client_gone", e2e_s=4.0) == 4.0
    assert value("ttft", "client_gone", ttft_s=0.2, e2e_s=4.0) == 0.2
    assert value("tpot", "client_gone", tpot_s=0.05, e2e_s=4.0) == 0.05
    assert value("tpot", "client_gone", e2e_s=4.0) is None


def test_a_client_that_left_before_the_first_token_was_lost_and_is_no_error():
    assert value("abandonment", "client_gone", e2e_s=4.0) == 1.0
    assert value("abandonment", "client_gone", ttft_s=0.2, e2e_s=4.0) == 0.0
    assert value("error_rate", "client_gone", e2e_s=4.0) is None
    assert value("split_share", "client_gone", e2e_s=4.0) is None


def test_a_request_that_the_client_got_wrong_counts_as_a_rejection_only():
    told = {"e2e_s": 0.001, "within_slo": True}
    found = {name: value(name, "rejected", **told) for name in METRICS}
    assert {name: v for name, v in found.items() if v is not None} == {"rejection_rate": 1.0}


@pytest.mark.parametrize(
    ("status", "ended"), [(400, "rejected"), (422, "rejected"), (404, "error"), (408, "error"),
                          (429, "error"), (503, "error")],
)  # fmt: skip
def test_an_answer_that_speaks_of_the_worker_is_no_mistake_of_the_client(status, ended):
    told = outcome_of(record(outcome="rejected", status=status, ttft_s=None), "candidate")
    assert told.ended == ended


@pytest.mark.parametrize("ended", ["ok", "error", "broken", "client_gone"])
def test_the_other_ends_of_a_record_are_taken_as_they_are(ended):
    assert outcome_of(record(outcome=ended), "candidate").ended == ended


def test_an_end_that_is_not_known_is_an_error():
    assert outcome_of(record(outcome=""), "candidate").ended == "error"


def test_an_answer_in_one_piece_has_no_first_token_of_its_own():
    told = outcome_of(record(stream=False, tpot_s=None), "candidate")
    assert METRICS["ttft"].of(told) is None
    assert METRICS["tpot"].of(told) is None
    assert METRICS["e2e"].of(told) == 2.0
    assert value("tpot", "error", stream=False) is None


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({}, True),
        ({"ttft_s": 0.6}, False),
        ({"tpot_s": 0.06}, False),
        ({"tpot_s": None}, True),
        ({"outcome": "broken"}, False),
        ({"outcome": "error", "ttft_s": None, "tpot_s": None}, False),
        ({"outcome": "client_gone"}, None),
        ({"outcome": "client_gone", "ttft_s": None, "e2e_s": 0.4}, None),
        ({"outcome": "client_gone", "ttft_s": None, "e2e_s": 0.6}, False),
        ({"outcome": "client_gone", "tpot_s": 0.06}, False),
    ],
)
def test_a_request_keeps_its_slo_or_misses_it_or_nobody_knows(told, kept):
    found = outcome_of(record(**told), "candidate", ttft_slo_s=0.5, tpot_slo_s=0.05)
    assert found.within_slo is kept
    assert METRICS["goodput"].of(found) == (None if kept is None else float(kept))


def test_a_request_without_an_slo_class_is_no_sample_of_goodput():
    assert METRICS["goodput"].of(outcome_of(record(outcome="error"), "candidate")) is None


def test_a_split_request_tells_of_its_handoff():
    handoff = HandoffRecord("h", "consumed", "complete", tokens_recomputed=25)
    told = outcome_of(split_record(handoff, prompt_tokens=50), "candidate")
    names = ("split_share", "kv_failures", "lease_ends", "recompute_share")
    assert [METRICS[name].of(told) for name in names] == [1.0, 0.0, 0.0, 0.5]


def test_a_handoff_whose_kv_never_came_is_a_failure_though_the_answer_was_right():
    handoff = HandoffRecord("h", "expired", tokens_recomputed=400)
    told = outcome_of(split_record(handoff, split="no: no report"), "candidate")
    names = ("error_rate", "split_share", "kv_failures", "lease_ends", "recompute_share")
    assert [METRICS[name].of(told) for name in names] == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("told", "numbers"),
    [
        ({"split": "unobserved"}, [1.0, 0.0, None, None]),
        ({"split": "no: prefill no_handoff"}, [0.0, 1.0, None, None]),
        ({"split": "no: decode http_400"}, [0.0, 1.0, None, None]),
        ({"split": "no: ended by prefill", "ended_by_prefill": True}, [0.0, None, None, None]),
    ],
)
def test_of_a_handoff_that_nobody_observes_what_can_be_seen_is_counted(told, numbers):
    handoff = HandoffRecord("h", "unobserved", "none")
    found = outcome_of(split_record(handoff, **told), "candidate")
    names = ("split_share", "kv_failures", "lease_ends", "recompute_share")
    assert [METRICS[name].of(found) for name in names] == numbers


@pytest.mark.parametrize("ended", ["client_gone", "rejected"])
def test_a_handoff_that_the_client_cut_short_tells_nothing(ended):
    told = outcome_of(split_record(split=f"no: {ended}", outcome=ended, status=400), "candidate")
    names = ("kv_failures", "lease_ends", "recompute_share")
    assert [METRICS[name].of(told) for name in names] == [None] * 3


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'ttfb'.*known: abandonment, e2e, .*tpot, ttft"):
        metric_named("ttfb")


def test_every_metric_says_what_it_means():
    for name, metric in METRICS.items():
        assert metric.name == name
        assert metric.meaning
        assert metric.unit == ("s" if name in ("ttft", "tpot", "e2e") else "")


def test_goodput_per_worker_is_goodput_times_the_scale_of_its_fleet():
    told = {"per_worker": 0.5, "per_cost": 0.25, "ttft_slo_s": 1.0}
    good = outcome_of(record(), "candidate", **told)
    late = outcome_of(record(), "candidate", **{**told, "ttft_slo_s": 0.1})
    assert METRICS["goodput_per_worker"].of(good) == 0.5
    assert METRICS["goodput_per_cost"].of(good) == 0.25
    assert METRICS["goodput_per_worker"].of(late) == 0.0


def test_without_a_scale_or_an_slo_a_request_is_no_sample_of_goodput_per_worker():
    assert (
        METRICS["goodput_per_worker"].of(outcome_of(record(), "candidate", ttft_slo_s=1.0)) is None
    )
    assert (
        METRICS["goodput_per_worker"].of(outcome_of(record(), "candidate", per_worker=1.0)) is None
    )
