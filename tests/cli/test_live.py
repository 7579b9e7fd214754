from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from disagg_plugins.cli.checks import Finding, Level, worst
from disagg_plugins.cli.live import SETTLED_S, examine_gateway, judge, may_settle


def worker(name: str, role: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "url": f"http://127.0.0.1/{name}",
        "healthy": True,
        "reason": "",
        "served": 5,
        "failed": {},
        "last_problem": None,
        "hello": {"pid": 1},
        **more,
    }


def status(**more: Any) -> dict[str, Any]:
    return {
        "workers": [worker("p0", "prefill"), worker("d0", "decode")],
        "split_problems": [],
        "split": {
            "recent_requests": 10,
            "routed_disaggregated": 5,
            "happened": 5,
            "not_happening": {},
            "local_reasons": {"short": 5},
        },
        "min_prompt_tokens": 256,
        "tokens_from_handoff": 1000,
        "reports_rejected": {},
        "plugin_failures": {},
        **more,
    }


def bad(found: dict[str, Any]) -> list[Finding]:
    return [f for f in judge(found) if f.level is not Level.OK]


def split(routed: int, happened: int, **more: Any) -> dict[str, Any]:
    return {
        "recent_requests": 10,
        "routed_disaggregated": routed,
        "happened": happened,
        "not_happening": {},
        "local_reasons": {},
        **more,
    }


def test_gateway_whose_splits_happen_is_right() -> None:
    assert bad(status()) == []
    assert any("5 of the last 10 requests were split" in f.detail for f in judge(status()))


def test_a_worker_that_takes_no_handoffs_needs_no_connector() -> None:
    alone = worker("today", "both", hello=None, handoffs=False)
    assert bad(status(workers=[worker("p0", "prefill"), worker("d0", "decode"), alone])) == []


def test_split_that_loads_nothing_is_a_problem_that_tells_the_reason() -> None:
    found = bad(status(split=split(4, 0, not_happening={"no: no report": 4})))
    assert [f.level for f in found] == [Level.PROBLEM]
    assert "4 of 4 split requests loaded no KV: no decode worker reported" in found[0].detail
    assert "--kv-transfer-config" in found[0].fix


def test_split_that_fails_now_and_then_is_a_warning() -> None:
    found = bad(status(split=split(100, 98, not_happening={"no: load failed": 2})))
    assert [f.level for f in found] == [Level.WARNING]


def own(name: str, role: str) -> dict[str, Any]:
    """Return a worker whose engine carries its handoffs itself."""
    return worker(name, role, hello=None, own_transport=True)


def test_what_the_engines_own_transport_carries_is_said_in_words_and_is_no_problem() -> None:
    told = split(6, 0, unobserved=5, ended_by_prefill=1)
    found = status(workers=[own("c", "prefill"), own("g", "decode")], split=told)
    assert bad(found) == []
    said = [f.detail for f in judge(found) if f.subject == "split"]
    assert len(said) == 2
    assert (
        "5 of the last 10 requests were split by the engine's own transport, which nobody"
        in (said[0])
    )
    assert "1 of the last 10 requests were ended by prefill" in said[1]


@pytest.mark.parametrize(("unobserved", "level"), [(0, Level.PROBLEM), (98, Level.WARNING)])
def test_own_transports_that_fall_back_are_found_without_advice_about_a_connector(
    unobserved: int, level: Level
) -> None:
    told = split(
        unobserved + 2,
        0,
        unobserved=unobserved,
        not_happening={"no: prefill no_handoff": 2},
    )
    (found,) = bad(status(workers=[own("c", "prefill"), own("g", "decode")], split=told))
    assert found.level is level
    assert "prefill answered without the parameters of a handoff" in found.detail
    assert "connector" not in found.fix
    assert "`failures`" in found.fix


@pytest.mark.parametrize(
    ("workers", "advice"),
    [
        ([worker("w", "both")], "`failures`"),
        ([worker("w", "decode")], "`failures`"),
        ([worker("w", "both"), worker("v", "both", handoffs=False)], "`failures`"),
        ([worker("w", "both"), worker("v", "both")], "connector"),
        ([worker("p", "prefill"), worker("d", "decode")], "connector"),
    ],
)
def test_workers_that_share_no_handoff_do_not_decide_what_is_advised(
    workers: list[dict[str, Any]], advice: str
) -> None:
    told = split(10, 0, not_happening={"no: prefill no_handoff": 10})
    (found,) = bad(status(workers=[own("c", "prefill"), own("g", "decode"), *workers], split=told))
    assert found.level is Level.PROBLEM
    assert advice in found.fix


def test_a_client_that_leaves_among_answers_that_prefill_ended_is_no_problem() -> None:
    found = status(split=split(10, 0, ended_by_prefill=9, not_happening={"no: client_gone": 1}))
    assert bad(found) == []
    said = [f.detail for f in judge(found) if f.subject == "split"]
    assert "9 of the last 10 requests were ended by prefill" in said[0]
    assert "1 of 10 requests ended before KV could be loaded (client_gone 1)" in said[1]


def test_requests_that_ended_early_do_not_hide_that_all_others_were_split() -> None:
    found = status(split=split(10, 6, not_happening={"no: client_gone": 3, "no: deadline": 1}))
    assert bad(found) == []
    said = "\n".join(f.detail for f in judge(found))
    assert "6 of the last 10 requests were split, all with KV loaded" in said
    assert "(client_gone 3, deadline 1)" in said


def test_where_every_client_left_no_split_has_completed_yet() -> None:
    (found,) = bad(status(split=split(4, 0, not_happening={"no: client_gone": 4})))
    assert found.level is Level.WARNING
    assert found.detail.startswith("no split has completed yet: 4 of 4 requests ended before")
    assert "connector" not in found.fix


def test_clients_that_leave_do_not_make_a_load_that_failed_look_rare() -> None:
    told = {"no: client_gone": 95, "no: load failed": 2}
    (found,) = bad(status(split=split(100, 3, not_happening=told)))
    assert found.level is Level.PROBLEM
    assert "2 of 100 split requests loaded no KV: decode could not load" in found.detail


def test_answers_that_prefill_ended_do_not_hide_that_no_handoff_happened() -> None:
    told = split(100, 0, ended_by_prefill=98, not_happening={"no: no report": 2})
    (found,) = bad(status(split=told))
    assert found.level is Level.PROBLEM
    assert "--kv-transfer-config" in found.fix, "no split has shown that there is a connector"


def test_answers_of_a_hedge_are_no_splits_that_failed() -> None:
    assert bad(status(split=split(5, 4, not_happening={"no: hedged": 1}))) == []


def test_of_two_kinds_of_splits_each_is_told() -> None:
    found = status(split=split(5, 3, unobserved=2))
    assert bad(found) == []
    said = "\n".join(f.detail for f in judge(found))
    assert "2 of the last 10 requests were split by the engine's own transport" in said
    assert "3 of the last 10 requests were split, all with KV loaded" in said


def test_prompts_that_all_stay_local_are_a_warning_with_the_reasons() -> None:
    found = bad(status(split=split(0, 0, local_reasons={"prompt is short": 10})))
    assert [f.level for f in found] == [Level.WARNING]
    assert "10 times: prompt is short" in found[0].detail
    assert "(256)" in found[0].fix


def test_fleet_without_prefill_workers_splits_nothing_and_that_is_right() -> None:
    found = status(workers=[worker("d0", "decode")], split=split(0, 0))
    assert bad(found) == []


def test_gateway_without_traffic_says_to_ask_again() -> None:
    found = status(split={**split(0, 0), "recent_requests": 0})
    assert bad(found) == []
    assert any("ask again after some traffic" in f.detail for f in judge(found))


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        (
            {"workers": [worker("p0", "prefill", healthy=False, reason="refused")]},
            Level.PROBLEM,
            "unhealthy: refused",
        ),
        (
            {"workers": [worker("d0", "decode", failed={"timeout": 2}, last_problem="timeout")]},
            Level.WARNING,
            "2 of 7 calls failed",
        ),
        (
            {"workers": [worker("d0", "decode", hello=None), worker("p0", "prefill")]},
            Level.PROBLEM,
            "never heard of the connector in d0",
        ),
        ({"reports_rejected": {"signature": 3}}, Level.PROBLEM, "3 reports of workers had a false"),
        ({"split_problems": ["dtype differs"]}, Level.PROBLEM, "dtype differs"),
        ({"plugin_failures": {"mine": 7}}, Level.WARNING, "failed 7 times"),
    ],
)
def test_each_thing_that_keeps_splits_from_happening_is_found(
    change: dict[str, Any], level: Level, said: str
) -> None:
    found = bad(status(**change))
    assert worst(found) is level
    assert any(said in f.detail for f in found)
    assert all(f.fix for f in found)


@pytest.mark.parametrize(
    ("young", "waits"),
    [
        ({}, False),
        ({"workers": [worker("p0", "prefill", hello=None), worker("d0", "decode")]}, True),
        ({"workers": [own("c", "prefill"), own("g", "decode")]}, False),
        ({"workers": [worker("d0", "decode", hello=None, handoffs=False)]}, False),
        ({"workers": [worker("d0", "decode", healthy=False, reason="not probed yet")]}, True),
        ({"workers": [worker("d0", "decode", healthy=False, reason="refused")]}, False),
        ({"split_problems": ["p0 has not said yet where it serves KV"]}, True),
    ],
)
def test_what_a_young_gateway_has_not_heard_yet_is_waited_for(
    young: dict[str, Any], waits: bool
) -> None:
    assert may_settle(status(up_s=3.0, **young)) is waits
    assert not may_settle(status(up_s=60.0, **young))
    assert not may_settle(status(**young)), "a gateway that does not tell its age"


@pytest.mark.parametrize(
    ("happened", "why", "waits"),
    [(0, "no report", False), (1, "no report", True), (0, "client_gone", True)],
)
def test_splits_of_which_none_happened_are_told_at_once(
    happened: int, why: str, waits: bool
) -> None:
    split = {"happened": happened, "not_happening": {f"no: {why}": 1}}
    workers = [worker("p0", "prefill"), worker("d0", "decode", hello=None)]
    assert may_settle(status(up_s=3.0, split=split, workers=workers)) is waits


def test_a_young_gateway_is_asked_again_until_its_workers_are_heard_of() -> None:
    silent = worker("d0", "decode", hello=None)
    young = status(up_s=2.0, workers=[worker("p0", "prefill"), silent])
    waited: list[float] = []
    with answering(200, json.dumps(young).encode(), json.dumps(status(up_s=3.0)).encode()) as url:
        found = examine_gateway(url, pause=waited.append)
    assert [f for f in found if f.level is not Level.OK] == []
    assert len(waited) == 1


def test_a_gateway_that_does_not_grow_older_is_not_waited_for_without_an_end() -> None:
    young = status(up_s=2.0, split_problems=["dtype differs"])
    waited: list[float] = []
    with answering(200, json.dumps(young).encode()) as url:
        found = examine_gateway(url, pause=waited.append)
    assert found[0].detail == "dtype differs"
    assert sum(waited) == SETTLED_S


def test_a_worker_that_is_never_heard_of_is_found_in_the_end() -> None:
    looks = [
        json.dumps(
            status(
                up_s=age_s, workers=[worker("p0", "prefill"), worker("d0", "decode", hello=None)]
            )
        ).encode()
        for age_s in (2.0, 9.0, 60.0)
    ]
    with answering(200, *looks) as url:
        found = examine_gateway(url, pause=lambda _: None)
    assert found[0].level is Level.PROBLEM
    assert "never heard of the connector in d0" in found[0].detail


@contextmanager
def answering(code: int, *bodies: bytes) -> Iterator[str]:
    """Serve answers for every path, the last one again and again."""
    left = list(bodies)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_gateway_that_answers_is_judged_worst_first() -> None:
    answer = status(workers=[worker("d0", "decode"), worker("p0", "prefill", healthy=False)])
    with answering(200, json.dumps(answer).encode()) as url:
        found = examine_gateway(url)
    assert found[0].level is Level.PROBLEM
    assert [f.level for f in found] == sorted((f.level for f in found), key=list(Level).index)[::-1]


@pytest.mark.parametrize(("code", "body"), [(404, b"{}"), (200, b"<html>"), (200, b"[]")])
def test_address_of_something_else_is_a_problem(code: int, body: bytes) -> None:
    with answering(code, body) as url:
        found = examine_gateway(url)
    assert [f.level for f in found] == [Level.PROBLEM]
    assert "give the gateway's address" in found[0].fix


def test_gateway_that_does_not_answer_is_a_problem(free_port: Callable[[], int]) -> None:
    found = examine_gateway(f"http://127.0.0.1:{free_port()}")
    assert [f.level for f in found] == [Level.PROBLEM]
    assert "Connection refused" in found[0].detail


def test_gateway_of_another_host_says_where_to_ask() -> None:
    with answering(403, b'{"error": {"message": "from this host only"}}') as url:
        (found,) = examine_gateway(url)
    assert found.level is Level.PROBLEM
    assert found.fix == "run this command on the gateway's host"
