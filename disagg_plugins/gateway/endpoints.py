"""Everything the gateway answers itself: health, models, metrics, status, workers' reports.

Anyone who reaches the port may read health, models and metrics. ``/internal/status`` and
``/internal/explain`` name workers' addresses, processes and problems: they are for clients on this
host, and for holders of the fleet's secret, who sign the request like a report.
``/internal/reports`` always wants that signature. ``/internal/workers`` is in ``admin.py``.
"""

from __future__ import annotations

import time
from collections import Counter
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import msgspec

from disagg_plugins import __version__
from disagg_plugins.errors import AuthenticationError, RemoteProtocolError
from disagg_plugins.gateway.pairs import own_transport
from disagg_plugins.gateway.wire import header_value
from disagg_plugins.telemetry.ledger import ENDED_BY_PREFILL, UNOBSERVED
from disagg_plugins.telemetry.reports import MAX_BODY_BYTES, read_reports, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from disagg_plugins.gateway.client_connection import ClientConnection, Request
    from disagg_plugins.gateway.server import Gateway
    from disagg_plugins.gateway.worker_state import WorkerState

MAX_HELLO_KEYS = 16
TEXT = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"

PROXIED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
"""A request with one of these came through a proxy: its peer is not who asks."""

encode = msgspec.json.encode


def health(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer that the process lives."""
    client.answer(200, b'{"status":"ok"}')


def ready(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer 200 when some decode worker can take requests; name what is not ready."""
    roles = gateway.fleet.ready()
    states = gateway.fleet.states.values()
    reasons = {s.worker.name: s.reason for s in states if not s.healthy}
    can = roles["decode"] and not gateway.draining
    body: dict[str, object] = {
        "ready": can,
        "roles": roles,
        "not_ready": reasons,
        "split_problems": gateway.fleet.problems(),
    }
    if not can:
        body["reason"] = "shutting down" if gateway.draining else "no healthy decode worker"
    client.answer(200 if can else 503, encode(body))


def models(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer the models of all healthy workers, as the probes last saw them."""
    cards = gateway.prober.cards
    served = [cards.get(m, {"id": m, "object": "model"}) for m in gateway.fleet.served_models()]
    client.answer(200, encode({"object": "list", "data": served}))


def metrics(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer all numbers in Prometheus' text format."""
    for plugin, failures in gateway.plugin_failures().items():
        gateway.metrics.put("disagg_plugin_failures", (plugin,), failures)
    client.answer(200, gateway.metrics.text(), TEXT)


def status(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer everything that ``disagg doctor --live`` reads, on this host or with a signature."""
    if may_see(gateway, request, client):
        client.answer(200, encode(status_of(gateway)))


def explain(gateway: Gateway, request: Request, client: ClientConnection) -> None:
    """Answer why a recent request went where it went; to the same clients as the status."""
    if not may_see(gateway, request, client):
        return
    name = explained(request)
    explanation = gateway.explanations.of(name)
    if explanation is None:
        message = (
            f"the request {name[:128]!r} is not among the last {len(gateway.explanations)} "
            "completions and chats of this gateway; ask with /internal/explain?id=REQUEST_ID"
        )
        gateway.refuse(client, 404, message, code="unknown_request")
        return
    client.answer(200, encode(explanation.plain()))


def explained(request: Request) -> str:
    """Return the id of the request that is asked about."""
    return query_value(request.path, "id")


def query_value(path: bytes, key: str) -> str:
    """Return one value of a target's query, or an empty string."""
    try:
        found = parse_qs(path.partition(b"?")[2].decode("latin-1"), max_num_fields=4)
    except ValueError:  # more fields than anybody here asks for
        return ""
    return found.get(key, [""])[0]


def may_see(gateway: Gateway, request: Request, client: ClientConnection) -> bool:
    """Return whether the client may see the gateway's state; if not, it has been told so."""
    proof = header_value(request.headers, b"x-disagg-signature")
    proxied = any(name in PROXIED for name, _ in request.headers)
    if proof is not None:
        try:
            verify(gateway.report_key, proof.decode("latin-1"), request.body, time.time())
        except AuthenticationError as exc:
            gateway.refuse(client, 403, str(exc), code="signature")
            return False
    elif proxied or not same_host(*client.addresses()):
        message = (
            "the status is answered on the gateway's own host only (run `disagg doctor --live` "
            "there), or to requests signed with the fleet's secret"
        )
        gateway.refuse(client, 403, message, code="not_local")
        return False
    return True


def same_host(peer: str | None, here: str | None) -> bool:
    """Return whether a connection's two addresses say that the client runs on this host."""
    if peer is None:
        return False
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or peer == here


def status_of(gateway: Gateway) -> dict[str, object]:
    """Return the state of the gateway; holds no secret and no content of requests."""
    return {
        "version": __version__,
        "arm": gateway.arm,
        "model": gateway.fleet.model(),
        "draining": gateway.draining,
        "up_s": time.monotonic() - gateway.began_s,
        "in_flight": len(gateway.active),
        "waiting": len(gateway.entrance),
        "counting": len(gateway.counting),
        "tokens_by": "estimate" if gateway.prompts.counter is None else "tokenizer",
        "client_connections": len(gateway.connections),
        "handoffs_open": len(gateway.ledger),
        "tasks": len(gateway.running()),
        "roles": gateway.fleet.ready(),
        "workers": [worker_status(gateway, s) for s in gateway.fleet.states.values()],
        "fleet_file": gateway.members.file_problem,
        "role_change": gateway.rebalancer.moving(),
        "role_changes": gateway.rebalancer.changes,
        "split_problems": gateway.fleet.problems(),
        "split": _split_share(gateway),
        "min_prompt_tokens": gateway.policy.scheduler.split.min_prompt_tokens,
        "requests": gateway.metrics.counts("disagg_requests"),
        "handoffs": gateway.metrics.counts("disagg_handoffs"),
        "tokens_from_handoff": gateway.metrics.value("disagg_tokens_from_handoff"),
        "tokens_recomputed": gateway.metrics.value("disagg_tokens_recomputed"),
        "reports_rejected": gateway.metrics.counts("disagg_reports_rejected"),
        "reports_received": gateway.metrics.counts("disagg_reports_received"),
        "plugin_failures": gateway.plugin_failures(),
    }


def worker_status(gateway: Gateway, state: WorkerState) -> dict[str, object]:
    """Return what is known of one worker."""
    return {
        "name": state.worker.name,
        "url": state.worker.url,
        "engine": state.worker.engine,
        "role": str(state.worker.role),
        "handoffs": state.worker.handoffs,
        "own_transport": own_transport(gateway.fleet.dialects.get(state.worker.engine)),
        "whole": state.worker.whole,
        "movable": state.worker.movable,
        "healthy": state.healthy,
        "kept": state.kept,
        "trial": state.trial,
        "draining": state.draining,
        "slow": state.slow,
        "relapses": state.relapses,
        "reason": state.reason,
        "models": list(state.models),
        "requests": state.requests,
        "prompt_tokens": state.prompt_tokens,
        "capacity": state.worker.capacity,
        "prefills": state.prefills,
        "kv_tokens": state.kv_tokens,
        "kv_room_tokens": state.worker.kv_tokens,
        "kv_usage": state.kv_usage,
        "tokens_read": gateway.read_tokens[state.worker.name],
        "tokens_written": state.tokens_written,
        "served": state.served,
        "failed": dict(state.failed),
        "last_problem": state.last_problem,
        "hello": dict(state.hello) if state.hello is not None else None,
        "connections": gateway.pools[state.worker.name].counts(),
        "kv_events": gateway.prompts.events.told(state.worker.name),
    }


def _split_share(gateway: Gateway) -> dict[str, object]:
    recent = list(gateway.recent)
    told = Counter(split for route, split, _ in recent if route == "disaggregated")
    return {
        "recent_requests": len(recent),
        "routed_disaggregated": told.total(),
        "happened": told.pop("yes", 0),
        "unobserved": told.pop(UNOBSERVED, 0),
        "ended_by_prefill": told.pop(ENDED_BY_PREFILL, 0),
        "not_happening": dict(told),
        "local_reasons": dict(
            Counter(why for route, _, why in recent if route == "local").most_common(10)
        ),
    }


def reports(
    gateway: Gateway,
    request: Request,
    client: ClientConnection,
    pick: Callable[[Mapping[str, object]], Gateway] | None = None,
) -> None:
    """Take signed reports of workers.

    Args:
        gateway: Who takes them.
        request: The request.
        client: Who sent it.
        pick: Returns who takes a report, where several do.
    """
    if len(request.body) > MAX_BODY_BYTES:
        _refuse(gateway, client, 413, "too_large", f"reports exceed {MAX_BODY_BYTES} bytes")
        return
    signature = header_value(request.headers, b"x-disagg-signature") or b""
    try:
        verify(gateway.report_key, signature.decode("latin-1"), request.body, time.time())
        found = read_reports(request.body)
    except AuthenticationError as exc:
        _refuse(gateway, client, 403, "signature", str(exc))
        return
    except RemoteProtocolError as exc:
        _refuse(gateway, client, 400, "malformed", str(exc))
        return
    for report in found:
        _take(gateway if pick is None else pick(report), report)
    client.answer(204, b"", b"")


def _take(gateway: Gateway, report: dict[str, object]) -> None:
    kind, worker = str(report["kind"]), str(report["worker"])
    gateway.metrics.count("disagg_reports_received", (kind,))
    if kind == "hello":
        short = {k: v for k, v in list(report.items())[:MAX_HELLO_KEYS] if len(str(v)) <= 2048}
        if not gateway.fleet.greet(worker, short):
            gateway.metrics.count("disagg_reports_rejected", ("unknown_worker",))
    elif not gateway.ledger.report(report):
        gateway.metrics.count("disagg_reports_rejected", ("unknown_handoff",))


def _refuse(
    gateway: Gateway, client: ClientConnection, status: int, reason: str, message: str
) -> None:
    gateway.metrics.count("disagg_reports_rejected", (reason,))
    gateway.refuse(client, status, message, code=reason)
