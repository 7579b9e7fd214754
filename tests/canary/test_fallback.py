"""One answer to each request, whole and from one arm, however the candidate fails."""

from __future__ import annotations

import json

from disagg_plugins.canary.arm_client import ArmClient
from disagg_plugins.testing.fake_engine import Behaviour
from tests.gateway.harness import LONG, eventually

ALWAYS = {"steps": [100], "bake_s": 3600}


def at_the_candidate(arms, **more):
    """Return a site whose candidate gets every request."""
    site = arms(canary={**ALWAYS, **more.pop("canary", {})}, **more)
    site.command("start")
    site.wait_weight(100)
    return site


def raw_request(name: str, version: str = "1.1", prompt: str = "hello") -> bytes:
    body = json.dumps({"model": "fake-model", "prompt": prompt, "max_tokens": 2}).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\nx-request-id: {name}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def read_all(sock, until: bytes) -> bytes:
    found = b""
    while until not in found:
        data = sock.recv(65536)
        if not data:
            break
        found += data
    return found


class PretendConnection:
    started = False

    def __init__(self) -> None:
        self.sent: list[str] = []

    def answer(self, *_: object) -> None:
        self.sent.append("answer")

    def break_off(self, _: bytes) -> None:
        self.sent.append("break_off")


def test_an_arm_that_gave_its_request_away_says_nothing_more() -> None:
    connection, given = PretendConnection(), []
    client = ArmClient(connection, elsewhere=lambda: given.append("elsewhere"))  # type: ignore[arg-type]
    client.answer(503, b"", b"")
    client.answer(500, b"", b"")  # the gateway failed at it after it was refused
    client.break_off(b"")
    assert given == ["elsewhere"]
    assert connection.sent == []


def test_requests_sent_ahead_are_answered_in_their_order(arms) -> None:
    site = at_the_candidate(arms, behaviours={"c0": Behaviour(status=503)})
    names = [f"request-{n}" for n in range(8)]
    sock = site.raw(b"".join(raw_request(name) for name in names) + b"GET /health HTTP/1.1\r\n\r\n")
    text = read_all(sock, b'{"status":"ok"}').decode()
    told = [line.split(": ")[1] for line in text.split("\r\n") if line.startswith("x-request-id")]
    assert told == names
    assert text.count("HTTP/1.1 200 OK") == 9


def test_a_client_of_http_1_0_gets_one_whole_answer(arms) -> None:
    site = at_the_candidate(arms, behaviours={"c0": Behaviour(status=503)})
    text = read_all(site.raw(raw_request("old", "1.0")), b"never")
    assert text.count(b"HTTP/1.1 200 OK") == 1
    assert text.count(b'"choices"') == 1


def test_clients_that_leave_at_once_leave_nothing_behind(arms) -> None:
    site = at_the_candidate(arms, behaviours={"c0": Behaviour(status=503)})
    for n in range(30):
        site.raw(raw_request(f"gone-{n}")).close()
    front = site.front
    eventually(lambda: not front.connections, "no connection")
    eventually(lambda: not any(g.active for g in front.arms.values()), "nothing in flight")
    eventually(lambda: sum(front.traffic.counted.values()) == 30, "counted")
    assert len(front.traffic) == 0
    assert front._asked == {}


def test_a_wait_in_the_candidates_queue_that_lasts_too_long_ends_at_the_baseline(arms) -> None:
    queue = {"max_waiting": 4, "max_wait_s": 0.2, "prefills_per_worker": 1}
    site = at_the_candidate(
        arms,
        behaviours={"c0": Behaviour(hang="head")},
        candidate={"scheduler": {"split": {"min_prompt_tokens": 50}, "queue": queue}},
        b0="both",
        c0="prefill",
        c1="decode",
    )
    site.raw(raw_request("first", prompt=LONG))
    eventually(lambda: site.front.candidate.active, "the only slot is taken")
    assert site.complete(LONG)[0] == 200


def test_a_prompt_too_crowded_for_its_prefix_goes_where_the_weight_says(arms) -> None:
    site = at_the_candidate(arms, canary={"sticky": "prefix"})
    assert site.complete("a:[" * 70_000)[0] == 200
    counts = site.gateway.metrics.counts("disagg_canary_requests")
    assert [labels.split()[0] for labels in counts] == ["candidate"]
