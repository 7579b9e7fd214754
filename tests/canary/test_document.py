"""The document: bounded, and plain JSON whatever the evidence is."""

from __future__ import annotations

from disagg_plugins.canary.document import SHOWN_POINTS, _distribution, _split, _thin, finite
from disagg_plugins.canary.histogram import Histogram
from disagg_plugins.canary.lookout import Point


def test_a_long_history_is_thinned_and_keeps_its_newest_point() -> None:
    points = [Point(float(i), 1, 50, {}) for i in range(1_000)]
    shown = _thin(points)
    assert len(shown) <= SHOWN_POINTS
    assert shown[-1] is points[-1]
    assert [p.at_s for p in shown] == sorted(p.at_s for p in shown)
    assert _thin(points[:7]) == points[:7]
    assert _thin([]) == []


def test_what_json_has_no_word_for_is_null() -> None:
    assert finite(float("inf")) is None
    assert finite(None) is None
    assert finite(1.5) == 1.5


def test_splits_that_could_not_be_seen_are_told_apart_from_those_that_failed() -> None:
    ends = ["yes", "yes", "unobserved", "no: ended by prefill", "no: load failed"]
    recent = [("disaggregated", end, "") for end in ends] + [("local", "no", "short")]
    assert _split(recent) == {
        "routed": 5, "happened": 2, "unobserved": 1, "ended_by_prefill": 1,
    }  # fmt: skip


def test_a_distribution_counts_every_request_of_both_arms_once() -> None:
    baseline = Histogram.of([0.01, 0.02, 0.5, 3.0])
    candidate = Histogram.of([0.02, float("inf")])
    found = _distribution("ttft", baseline, candidate)
    edges = found["edges"]
    assert isinstance(edges, list)
    assert edges == sorted(edges)
    assert len(edges) == len(found["baseline"]) + 1  # type: ignore[arg-type]
    assert sum(found["baseline"]) == 4  # type: ignore[call-overload]
    assert sum(found["candidate"]) == 2  # type: ignore[call-overload]
    empty = _distribution("ttft", Histogram(), Histogram())
    assert empty["edges"] == []
