"""TPOT is known of every stream, whether or not its client asked for usage: rules learn from it."""

from __future__ import annotations

from collections.abc import Callable

from disagg_plugins.scheduling.prediction import observations
from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, SHORT, Stack

Build = Callable[..., Stack]

SLOWLY = {"d0": Behaviour(chunk_s=0.05)}


def phases(record: dict[str, object]) -> set[str]:
    return {seen.phase for seen in observations(record)}


def test_tokens_of_a_stream_without_usage_are_counted_by_their_ids(build: Build) -> None:
    stack = build(behaviours=SLOWLY)
    stack.complete(LONG, stream=True, max_tokens=6)
    stack.wait_idle()
    (record,) = stack.records(1)
    assert (record["output_tokens"], record["tpot_by"]) == (6, "tokens")
    assert record["prompt_tokens"] is not None
    assert isinstance(record["tpot_s"], float)
    assert "decode" in phases(record)


def test_where_no_ids_are_told_every_piece_counts_as_a_token(build: Build) -> None:
    stack = build(behaviours=SLOWLY, gateway={"resume": False})
    stack.complete(SHORT, stream=True, max_tokens=6)
    stack.wait_idle()
    (record,) = stack.records(1)
    assert (record["output_tokens"], record["tpot_by"]) == (None, "pieces")
    assert isinstance(record["tpot_s"], float)
    assert record["tpot_s"] > 0.0
    assert "decode" in phases(record)


def test_usage_goes_before_what_was_counted(build: Build) -> None:
    stack = build(behaviours=SLOWLY)
    stack.complete(SHORT, stream=True, max_tokens=6, stream_options={"include_usage": True})
    stack.wait_idle()
    (record,) = stack.records(1)
    assert (record["output_tokens"], record["tpot_by"]) == (6, "tokens")
