"""Joining records and reports: each handoff is judged once, whatever order things come in."""

from __future__ import annotations

import itertools

import pytest

from disagg_plugins.telemetry.ledger import HandoffLedger
from disagg_plugins.telemetry.metrics import Metrics
from disagg_plugins.telemetry.records import FailureRecord, RequestRecord

ID = "00" * 16
PUBLISHED = {"kind": "published", "handoff_id": ID, "num_tokens": 100, "seconds": 0.5}
LOADED = {
    "kind": "loaded",
    "handoff_id": ID,
    "num_tokens": 99,
    "tokens_recomputed": 1,
    "bytes": 4096,
    "transport": "shm",
    "form": "native",
    "seconds": 0.1,
}
ENDED = {"kind": "ended", "handoff_id": ID, "outcome": "consumed"}
FAILED = {"kind": "failed", "handoff_id": ID, "problem": "ring is full", "tokens_recomputed": 100}


def record(outcome: str = "ok", failures: tuple[FailureRecord, ...] = ()) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        at_s=0.0,
        endpoint="/v1/completions",
        model="m",
        route="disaggregated",
        why="long",
        prefill="p0",
        decode="d0",
        stream=False,
        prompt_tokens_estimate=100,
        outcome=outcome,
        failures=list(failures),
    )


def ledger() -> tuple[HandoffLedger, Metrics, list[RequestRecord]]:
    metrics, settled = Metrics(), []  # type: ignore[var-annotated]
    return HandoffLedger(metrics, wait_s=2.0, settle=settled.append), metrics, settled


ORDERS = list(itertools.permutations(["published", "loaded", "ended", "end"]))


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_settles_once_with_everything(order: tuple[str, ...]) -> None:
    book, metrics, settled = ledger()
    book.open(ID)
    for what in order:
        if what == "end":
            book.close(ID, record(), 10.0)
        else:
            assert book.report({"published": PUBLISHED, "loaded": LOADED, "ended": ENDED}[what])
    (done,) = settled
    assert done.split == "yes"
    assert done.handoff is not None
    assert (done.handoff.outcome, done.handoff.report) == ("consumed", "complete")
    assert (done.handoff.tokens_loaded, done.handoff.tokens_recomputed) == (99, 1)
    assert len(book) == 0
    assert metrics.value("disagg_handoffs", ("consumed",)) == 1
    assert metrics.value("disagg_tokens_from_handoff") == 99
    assert metrics.value("disagg_kv_bytes", ("shm",)) == 4096
    assert metrics.value("disagg_split_not_happening") == 0


def test_missing_reports_settle_after_the_wait() -> None:
    book, metrics, settled = ledger()
    book.open(ID)
    book.close(ID, record(), 10.0)
    book.sweep(11.9)
    assert not settled
    book.sweep(12.0)
    assert settled[0].handoff is not None
    assert settled[0].handoff.report == "missing"
    assert settled[0].split == "no: no report"
    assert metrics.value("disagg_split_not_happening", ("no report",)) == 1
    assert not book.report(LOADED), "a late report changes nothing"


def test_failed_load_is_not_a_split() -> None:
    book, metrics, settled = ledger()
    book.open(ID)
    book.report(PUBLISHED)
    book.report(FAILED)
    book.report({**ENDED, "outcome": "failed"})
    book.close(ID, record(), 10.0)
    assert settled[0].split == "no: load failed"
    assert settled[0].handoff is not None
    assert settled[0].handoff.problem == "ring is full"
    assert metrics.value("disagg_tokens_recomputed") == 100


def test_prompt_that_decode_had_cached_counts_as_split() -> None:
    book, _, settled = ledger()
    book.open(ID)
    for report in (PUBLISHED, {**LOADED, "num_tokens": 0, "tokens_local": 99}, ENDED):
        book.report(report)
    book.close(ID, record(), 10.0)
    assert settled[0].split == "yes"


def test_failed_prefill_settles_at_once() -> None:
    book, metrics, settled = ledger()
    book.open(ID)
    book.close(ID, record(failures=(FailureRecord("p0", "prefill", "timeout", ""),)), 10.0)
    assert settled[0].split == "no: prefill timeout"
    assert metrics.value("disagg_handoffs", ("not_published",)) == 1


@pytest.mark.parametrize("outcome", ["client_gone", "rejected"])
def test_what_the_client_caused_is_not_held_against_the_split(outcome: str) -> None:
    book, metrics, settled = ledger()
    book.open(ID)
    book.close(ID, record(outcome), 10.0)
    assert settled[0].split == f"no: {outcome}"
    assert metrics.value("disagg_split_not_happening") == 0


def test_ranks_add_up() -> None:
    book, _, settled = ledger()
    book.open(ID)
    book.report(PUBLISHED)
    book.report(LOADED)
    book.report({**LOADED, "seconds": 0.3})
    book.report(ENDED)
    book.close(ID, record(), 10.0)
    assert settled[0].handoff is not None
    assert settled[0].handoff.bytes == 8192
    assert settled[0].handoff.load_s == 0.3


@pytest.mark.parametrize("value", [-1, 1 << 63, "99", None, True, 1.5])
def test_nonsense_numbers_count_as_nothing(value: object) -> None:
    book, _, settled = ledger()
    book.open(ID)
    for report in (PUBLISHED, {**LOADED, "num_tokens": value, "seconds": "x"}, ENDED):
        book.report(report)
    book.close(ID, record(), 10.0)
    assert settled[0].handoff is not None
    assert settled[0].handoff.tokens_loaded == 0


def test_shutdown_settles_what_waits() -> None:
    book, _, settled = ledger()
    book.open(ID)
    book.close(ID, record(), 10.0)
    book.settle_all()
    assert len(settled) == 1


def unobserved(told: RequestRecord) -> tuple[RequestRecord, Metrics]:
    """Return the settled record of a handoff of which nobody reports; it waits for nothing."""
    book, metrics, settled = ledger()
    book.open(ID, observed=False)
    book.close(ID, told, 10.0)
    (done,) = settled
    assert done.handoff is not None
    assert done.handoff.report == "none"
    return done, metrics


@pytest.mark.parametrize("outcome", ["ok", "broken", "client_gone", "deadline"])
def test_a_handoff_that_decode_answered_to_is_unobserved_whatever_came_after(outcome: str) -> None:
    told = record(outcome)
    told.status = 200
    if outcome == "broken":
        told.failures = [FailureRecord("d0", "decode", "truncated", "")]
    done, metrics = unobserved(told)
    assert done.handoff is not None
    assert (done.split, done.handoff.outcome) == ("unobserved", "unobserved")
    assert metrics.value("disagg_handoffs", ("unobserved",)) == 1
    assert metrics.value("disagg_split_not_happening") == 0


@pytest.mark.parametrize(
    ("failure", "retries", "outcome"),
    [
        (FailureRecord("p0", "prefill", "no_handoff", ""), 0, "not_published"),
        (FailureRecord("d0", "decode", "http_400", ""), 1, "abandoned"),
    ],
)
def test_a_request_that_fell_back_was_not_carried(
    failure: FailureRecord, retries: int, outcome: str
) -> None:
    told = record(failures=(failure,))
    told.status, told.retries = 200, retries
    done, metrics = unobserved(told)
    assert done.handoff is not None
    assert done.split == f"no: {failure.side} {failure.kind}"
    assert done.handoff.outcome == outcome
    assert metrics.value("disagg_split_not_happening", (f"{failure.side} {failure.kind}",)) == 1


def test_an_answer_that_prefill_ended_needed_no_handoff() -> None:
    told = record()
    told.status, told.ended_by_prefill = 200, True
    done, metrics = unobserved(told)
    assert done.handoff is not None
    assert (done.split, done.handoff.outcome) == ("no: ended by prefill", "not_needed")
    assert metrics.value("disagg_split_not_happening") == 0
