"""Who may read and change a fleet over HTTP, and what is told to those who ask wrongly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from disagg_plugins.errors import AuthenticationError
from disagg_plugins.gateway.admin import MAX_SIGNATURES, PATH, Signatures, signed_headers
from disagg_plugins.gateway.client_connection import Request
from disagg_plugins.telemetry.reports import report_key, sign
from tests.gateway.harness import SECRET, Stack

Build = Callable[..., Stack]
HEADER = "X-Disagg-Signature"


def ask(
    stack: Stack, verb: str, name: str = "", body: object = None, **signed: Any
) -> tuple[int, Any]:
    """Ask with a signature, of something else where ``signed`` says so."""
    path = f"{PATH}/{name}" if name else PATH
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    headers = proof(**{"method": verb, "path": path, "body": raw, **signed})
    status, _, answer = stack.request(verb, path, raw, headers)
    return status, json.loads(answer)


def proof(
    method: str,
    path: str,
    body: bytes,
    secret: bytes = SECRET,
    at_s: float | None = None,
    nonce: str = "",
) -> dict[str, str]:
    at_s = time.time() if at_s is None else at_s
    if method == "GET":
        return {HEADER: sign(report_key(secret), body, at_s)}
    return signed_headers(secret, method, path, body, at_s, nonce=nonce)


@pytest.fixture
def stack(build: Build) -> Stack:
    return build()


def message(answer: Any) -> str:
    return str(answer["error"]["message"])


NEW = {"name": "d1", "url": "http://127.0.0.1:9", "role": "decode"}


def test_this_host_may_read_without_a_signature(stack: Stack) -> None:
    status, _, answer = stack.request("GET", PATH)
    assert status == 200
    assert [w["name"] for w in json.loads(answer)["workers"]] == ["p0", "d0"]
    status, _, answer = stack.request("GET", f"{PATH}/d0")
    assert (status, json.loads(answer)["by"]) == (200, "policy")
    assert SECRET not in answer


def test_what_came_through_a_proxy_may_read_only_with_a_signature(stack: Stack) -> None:
    for path in (PATH, f"{PATH}/d0"):
        assert stack.request("GET", path, headers={"X-Forwarded-For": "10.0.0.1"})[0] == 403
    assert ask(stack, "GET")[0] == 200
    assert ask(stack, "GET", secret=b"another secret of 32 bytes......")[0] == 403


@pytest.mark.parametrize(("method", "name"), [("POST", ""), ("POST", "d0"), ("DELETE", "d0")])
def test_nobody_writes_without_the_secret_of_the_fleet(
    stack: Stack, method: str, name: str
) -> None:
    body = NEW if not name else {"drain": True} if method == "POST" else None
    path = f"{PATH}/{name}" if name else PATH
    raw = b"" if body is None else json.dumps(body).encode()
    assert stack.request(method, path, raw)[0] == 403
    assert stack.request(method, path, raw, {HEADER: "t=1,v1=zz"})[0] == 403
    other = {"secret": b"another secret of 32 bytes......"}
    assert ask(stack, method, name, body, **other)[0] == 403
    assert ask(stack, method, name, body, at_s=time.time() - 3600)[0] == 403
    reports = sign(report_key(SECRET), raw, time.time())  # what workers sign with
    assert stack.request(method, path, raw, {HEADER: reports})[0] == 403
    assert ask(stack, method, name, body, path=f"{PATH}/p0")[0] == 403
    assert ask(stack, method, name, body, method="PUT")[0] == 403
    assert list(stack.gateway.fleet.states) == ["p0", "d0"]
    assert not stack.gateway.fleet.states["d0"].draining


def test_a_signature_is_good_once(stack: Stack) -> None:
    once = {"at_s": time.time(), "nonce": "n1"}
    assert ask(stack, "POST", "d0", {"drain": True}, **once)[0] == 202
    status, answer = ask(stack, "POST", "d0", {"drain": True}, **once)
    assert status == 403
    assert "used before" in message(answer)
    raw = json.dumps({"drain": False}).encode()
    headers = {**proof("POST", f"{PATH}/d0", raw, **once), "X-Disagg-Nonce": "n2"}
    assert stack.request("POST", f"{PATH}/d0", raw, headers)[0] == 403


def signed(body: bytes, at_s: float) -> Request:
    headers = signed_headers(SECRET, "POST", "/x", body, at_s)
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return Request(b"POST", b"/x", lines, body, True, False)


def test_signatures_that_are_remembered_are_bounded_and_forgotten_in_time() -> None:
    signatures = Signatures(SECRET)
    for i in range(MAX_SIGNATURES):
        signatures.check(signed(b"%d" % i, 0.0), 0.0)
    with pytest.raises(AuthenticationError, match="too many"):
        signatures.check(signed(b"last", 0.0), 0.0)
    signatures.check(signed(b"last", 1000.0), 1000.0)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        ({}, 400, "name: is missing"),
        ({**NEW, "role": "prefil"}, 400, "role: 'prefil' is not allowed"),
        ({**NEW, "url": "https://x"}, 400, "url: 'https://x' is not of the form"),
        ({**NEW, "capasity": 3}, 400, "did you mean capacity?"),
        ({**NEW, "capacity": 0}, 400, "capacity: "),
        ({**NEW, "launch": {"model": "m"}}, 400, "launch: only `disagg up` starts workers"),
        ({**NEW, "role_switch": True}, 400, "role_switch needs the role both"),
        ({**NEW, "labels": {"token": "x" * 20}}, 400, "labels.token: looks like a secret"),
        ({**NEW, "engine": "nonesuch"}, 409, "engine: no plugin offers a dialect"),
        ({**NEW, "name": "d0"}, 409, "name: a worker of the name 'd0' is in the fleet already"),
        (b'{"name": "' + b"x" * 70_000 + b'"}', 413, "exceeds 65536 bytes"),
    ],
)
def test_a_wrong_worker_is_refused_with_the_key(
    stack: Stack, body: object, status: int, words: str
) -> None:
    got, answer = ask(stack, "POST", body=body)
    assert got == status
    assert words in message(answer)
    assert "x" * 20 not in message(answer)
    assert list(stack.gateway.fleet.states) == ["p0", "d0"]


def test_two_workers_have_two_addresses_and_neither_is_the_gateways(stack: Stack) -> None:
    taken = stack.engines["d0"].url
    status, answer = ask(stack, "POST", body={**NEW, "url": taken})
    assert (status, "worker d0 has the same url" in message(answer)) == (409, True)
    own = f"http://127.0.0.1:{stack.port}"
    status, answer = ask(stack, "POST", body={**NEW, "url": own})
    assert (status, "the gateway's own" in message(answer)) == (409, True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "exactly one of drain"),
        ({"drain": True, "role": "both"}, "exactly one of drain"),
        ({"drain": "yes"}, "drain: is not true or false"),
        ({"role": "king"}, "role: is not one of prefill, decode, both"),
        ({"role": ["both"]}, "role: is not one of prefill, decode, both"),
        ({"capacity": 5}, "exactly one of drain"),
    ],
)
def test_a_wrong_change_is_refused_with_the_key(stack: Stack, body: object, words: str) -> None:
    status, answer = ask(stack, "POST", "d0", body)
    assert status == 400
    assert words in message(answer)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_worker_is_404(stack: Stack, method: str) -> None:
    body = {"drain": True} if method == "POST" else None
    for name in ("nobody", "no/body", "%ff"):
        status, answer = ask(stack, method, name, body)
        assert status == 404
        assert answer["error"]["code"] == "unknown_worker"


def test_other_methods_and_paths_are_refused(stack: Stack) -> None:
    assert stack.request("PUT", PATH)[0] == 405
    assert stack.request("DELETE", PATH)[0] == 405
    assert stack.request("GET", f"{PATH}x")[0] == 404


def test_a_worker_declared_for_one_role_cannot_change_it(stack: Stack) -> None:
    status, answer = ask(stack, "POST", "d0", {"role": "prefill"})
    assert status == 409
    assert "declared both" in message(answer)
