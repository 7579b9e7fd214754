"""The fleet's administration over HTTP: ``/internal/workers`` and ``/internal/workers/NAME``.

Reading is for clients on this host and for holders of the fleet's secret, like the status. Writing
always wants a signature, over the method, the path, the body and a number used once, with a key of
its own; a signature is good once.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, cast

import msgspec

from disagg_plugins.errors import AuthenticationError, ConfigError, DisaggError
from disagg_plugins.gateway.endpoints import encode, may_see, worker_status
from disagg_plugins.gateway.wire import header_value
from disagg_plugins.handoff.keys import Purpose, derive_key
from disagg_plugins.placement.types import RoleChange
from disagg_plugins.policy_file import check_worker
from disagg_plugins.telemetry.reports import MAX_AGE_S, sign, verify
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from disagg_plugins.gateway.client_connection import ClientConnection, Request
    from disagg_plugins.gateway.server import Gateway

PATH = "/internal/workers"
SIGNATURE_HEADER = "X-Disagg-Signature"
NONCE_HEADER = "X-Disagg-Nonce"
MAX_NONCE_CHARS = 64
MAX_BODY_BYTES = 64 * 1024
"""One worker with many labels is below 4 KiB."""

MAX_SIGNATURES = 8192
"""Remembered within their time; more writes than that in two minutes are refused."""

READ = (b"GET", b"HEAD")


class Signatures:
    """Proves that a write comes from a holder of the secret, once each.

    Args:
        secret: The fleet's secret.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = admin_key(secret)
        self._used: OrderedDict[str, float] = OrderedDict()  # and when each is void anyway

    def check(self, request: Request, now_s: float) -> None:
        """Take one request.

        Raises:
            AuthenticationError: Its signature is missing, false, stale or was used before.
        """
        header, nonce = (_header(request, name) for name in (SIGNATURE_HEADER, NONCE_HEADER))
        text = signed_text(request.method, request.path, nonce[:MAX_NONCE_CHARS], request.body)
        verify(self._key, header, text, now_s)
        while self._used and next(iter(self._used.values())) < now_s:
            self._used.popitem(last=False)
        proof = header.partition(",v1=")[2]
        if proof in self._used:
            raise AuthenticationError("this signature was used before: sign the request anew")
        if len(self._used) >= MAX_SIGNATURES:
            raise AuthenticationError("too many signed requests at once: try again in a minute")
        self._used[proof] = now_s + 2 * MAX_AGE_S  # a stamp may be that much ahead


def admin_key(secret: bytes) -> bytes:
    """Return the key that signs what changes a fleet."""
    return derive_key(secret, Purpose.ADMIN)


def signed_text(method: bytes, path: bytes, nonce: str, body: bytes) -> bytes:
    """Return what a signature covers: one request cannot be turned into another."""
    return b"%b %b\n%b\n%b" % (method, path, nonce.encode("latin-1"), body)


def signed_headers(
    secret: bytes, method: str, path: str, body: bytes, now_s: float, *, nonce: str = ""
) -> dict[str, str]:
    """Return the headers that prove a request; without ``nonce`` with a new random one."""
    nonce = nonce or secrets.token_hex(16)
    text = signed_text(method.encode("ascii"), path.encode("ascii"), nonce, body)
    return {SIGNATURE_HEADER: sign(admin_key(secret), text, now_s), NONCE_HEADER: nonce}


def _header(request: Request, name: str) -> str:
    return (header_value(request.headers, name.lower().encode()) or b"").decode("latin-1")


def route(path: bytes) -> tuple[tuple[bytes, ...], Callable[..., None]] | None:
    """Return the methods and the handler of a path, or None where it is not ours."""
    prefix = PATH.encode()
    if path == prefix:
        return (*READ, b"POST"), workers
    if path.startswith(prefix + b"/"):
        return (*READ, b"POST", b"DELETE"), one_worker
    return None


def workers(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer all workers, or take a new one."""
    if request.method in READ:
        if may_see(gateway, request, client):
            client.answer(200, encode({"workers": fleet_status(gateway)}))
        return
    _write(gateway, request, client, _add)


def one_worker(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer one worker, change it (POST) or let it leave (DELETE)."""
    name = _name(request)
    if request.method in READ and not may_see(gateway, request, client):
        return
    if request.method not in READ:
        _write(gateway, request, client, _remove if request.method == b"DELETE" else _change)
    elif name in gateway.members:
        client.answer(200, encode(_status(gateway, name)))
    else:
        _unknown(gateway, client, name)


def fleet_status(gateway: Gateway) -> list[dict[str, object]]:
    """Return every worker as ``GET`` of it answers."""
    return [_status(gateway, name) for name in gateway.fleet.states]


def _status(gateway: Gateway, name: str) -> dict[str, object]:
    given, by, leaving = gateway.members.of(name)
    return {
        **worker_status(gateway, gateway.fleet.states[name]),
        "declared_role": str(given.role),
        "labels": dict(given.labels),
        "by": by,
        "leaving": leaving,
    }


def _name(request: Request) -> str:
    path = request.path.partition(b"?")[0]
    return path.removeprefix(PATH.encode() + b"/")[:256].decode("utf-8", "replace")


def _unknown(gateway: Gateway, client: ClientConnection, name: str) -> None:
    gateway.refuse(client, 404, f"there is no worker {name!r}", code="unknown_worker")


def _write(
    gateway: Gateway,
    request: Request,
    client: ClientConnection,
    do: Callable[[Gateway, Request], tuple[int, dict[str, object]]],
) -> None:
    if len(request.body) > MAX_BODY_BYTES:
        text = f"the body exceeds {MAX_BODY_BYTES} bytes"
        gateway.refuse(client, 413, text, code="too_large")
        return
    try:
        gateway.signatures.check(request, time.time())
        status, answer = do(gateway, request)
    except AuthenticationError as exc:
        gateway.refuse(client, 403, str(exc), code="signature")
    except KeyError:
        _unknown(gateway, client, _name(request))
    except ConfigError as exc:
        gateway.refuse(client, 409 if _is_conflict(exc) else 400, str(exc), code="invalid_worker")
    except DisaggError as exc:
        gateway.refuse(client, 400, str(exc), code="malformed")
    else:
        client.answer(status, encode(answer))


class _ConflictError(ConfigError):
    """What is asked for is right and cannot be done now."""


def _is_conflict(exc: ConfigError) -> bool:
    return isinstance(exc, _ConflictError)


def _json(request: Request) -> dict[str, object]:
    try:
        data = msgspec.json.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"the body is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise ConfigError("the body is not a JSON object")
    return cast("dict[str, object]", data)


def _add(gateway: Gateway, request: Request) -> tuple[int, dict[str, object]]:
    given = check_worker(_json(request))
    try:
        gateway.members.add(given, by="operator")
    except ConfigError as exc:
        raise _ConflictError(exc.problem, key=exc.key) from exc
    return 201, _status(gateway, given.name)


def _remove(gateway: Gateway, request: Request) -> tuple[int, dict[str, object]]:
    name = _name(request)
    gateway.members.remove(name, time.monotonic())
    return 202, _status(gateway, name)


def _change(gateway: Gateway, request: Request) -> tuple[int, dict[str, object]]:
    name, asked = _name(request), _json(request)
    gateway.members.of(name)
    draining, role = asked.pop("drain", None), asked.pop("role", None)
    if asked or (draining is None) == (role is None):
        raise ConfigError("the body holds exactly one of drain (true or false) and role")
    if draining is not None and not isinstance(draining, bool):
        raise ConfigError("is not true or false", key="drain")
    if role is not None and role not in tuple(Role):
        raise ConfigError(f"is not one of {', '.join(Role)}", key="role")
    try:
        if isinstance(draining, bool):
            gateway.members.drain(name, draining)
        else:
            change = RoleChange(name, Role(str(role)), "asked for by an operator")
            gateway.rebalancer.change(change, time.monotonic())
    except ConfigError as exc:
        raise _ConflictError(exc.problem, key=exc.key) from exc
    return 202, _status(gateway, name)
