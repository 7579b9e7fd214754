"""``disagg top``: one look at the fleet as a table."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_plugins.cli.main import main
from disagg_plugins.cli.top import Look, table


def worker(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "engine": "vllm", "role": "decode", "healthy": True, "reason": "",
        "requests": 2, "capacity": 64, "prompt_tokens": 0, "kv_tokens": 500, "kv_room_tokens": None,
        "kv_usage": None, "tokens_read": 1000, "tokens_written": 50, "served": 5, "failed": {},
        **more,
    }  # fmt: skip


def status(*workers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "m", "in_flight": 2, "requests": {"local ok 200": 10}, "handoffs_open": 1,
        "handoffs": {"consumed": 4}, "workers": list(workers), "split_problems": [],
        "split": {"recent_requests": 10, "routed_disaggregated": 5, "happened": 4},
        "plugin_failures": {}, **more,
    }  # fmt: skip


def test_rates_are_what_changed_between_two_looks() -> None:
    before = Look(status(worker("d0")), 10.0)
    now = status(worker("d0", tokens_read=3000, tokens_written=150), requests={"local ok 200": 14})
    told = list(table(Look(now, 12.0), before))
    assert "2.0/s, 14 requests in all" in told[0]
    assert told[4].split() == "d0 vllm decode ok 2/64 0 1000 50 500 t 5 0".split()


def test_the_first_look_has_no_rates() -> None:
    told = list(table(Look(status(worker("d0")), 1.0)))
    assert told[0] == "m   2 in flight   10 requests in all   1 handoffs open"
    assert told[1] == "split: 4 of 5 happened (10 last requests)   handoffs: consumed 4"
    assert told[4].split()[6:8] == ["-", "-"]


@pytest.mark.parametrize("key", ["unobserved", "ended_by_prefill"])
def test_splits_of_which_no_kv_was_seen_and_need_not_be_are_told_apart(key: str) -> None:
    split = {"recent_requests": 10, "routed_disaggregated": 5, "happened": 0, key: 5}
    told = list(table(Look(status(worker("d0"), split=split), 1.0)))
    said = key.replace("_", " ")
    assert told[1].startswith(f"split: 0 of 5 happened, 5 {said} (10 last requests)")


def test_what_is_wrong_stands_below() -> None:
    sick = worker("d0", healthy=False, reason="refused: nobody listens", failed={"refused": 3})
    found = status(sick, split_problems=["other model"], plugin_failures={"x": 2})
    told = list(table(Look(found, 1.0)))
    assert "OUT" in told[4]
    assert told[-3:] == [
        "d0: refused: nobody listens",
        "no split: other model",
        "plugin x failed 2 times",
    ]


def test_a_worker_that_rests_for_slowness_is_told_apart_with_its_figures() -> None:
    resting = worker("d0", healthy=False, slow=True, reason="slow: its TPOT of 0.2 s is too long")
    told = list(table(Look(status(resting), 1.0)))
    assert "SLOW" in told[4]
    assert told[-1] == "d0: slow: its TPOT of 0.2 s is too long"


def test_kv_is_told_by_the_engine_else_by_its_room_else_in_tokens() -> None:
    rows = [worker("a", kv_usage=0.25), worker("b", kv_room_tokens=1000), worker("c")]
    told = list(table(Look(status(*rows), 1.0)))
    assert [line.split()[8] for line in told[4:]] == ["25%", "50%", "500"]


def test_a_worker_that_began_anew_has_no_negative_rate() -> None:
    before = Look(status(worker("d0")), 10.0)
    told = list(table(Look(status(worker("d0", tokens_read=0, tokens_written=0)), 11.0), before))
    assert told[4].split()[6:8] == ["0", "0"]


def test_a_gateway_that_does_not_answer_is_an_error(capsys: Any) -> None:
    assert main(["top", "--once", "--gateway", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err
