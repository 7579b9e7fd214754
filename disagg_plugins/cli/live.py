"""``disagg doctor --live URL``: finds "configured but not happening", and says why.

A split deployment that quietly serves everything from one side looks healthy from outside. The
gateway knows better: ``GET /internal/status`` tells what it decided, what workers reported, and
what decode really loaded. ``judge`` turns that into findings, worst first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import Any

from disagg_plugins.cli.checks import Finding, Level
from disagg_plugins.cli.common import ARMS, no_such_arm, of_arm, say
from disagg_plugins.cli.environment import get_json
from disagg_plugins.gateway.worker_state import NOT_PROBED
from disagg_plugins.telemetry.ledger import ENDED_EARLY
from disagg_plugins.telemetry.reports import HELLO_EVERY_S

BEFORE_LOADING = (*ENDED_EARLY, "hedged")
"""Splits of which nothing had to be loaded: their request ended, or another worker answered it."""

REASONS = {
    "no report": "no decode worker reported a load",
    "nothing loaded": "decode reported a load of nothing",
    "load failed": "decode could not load the KV and computed the prompt",
    "prefill no_handoff": "prefill answered without the parameters of a handoff, or with false "
    "ones, and decode computed the prompt",
}
"""What the gateway's words for a split that did not happen mean; others are shown as they are."""

CONNECTOR_FIX = (
    "start every worker with the connector (vLLM: --kv-transfer-config, SGLang: "
    "--disaggregation-transfer-backend disagg) and install disagg-plugins in its environment; "
    "`disagg doctor` run there, with the worker's own Python, says what is missing"
)


OWN_TRANSPORT_FIX = (
    "the engine's own transport carries these handoffs: look at `failures` in the per-request "
    "records, and at the servers' own logs and metrics"
)


SETTLED_S = HELLO_EVERY_S + 2.0
"""A gateway of this age has heard of every worker that can reach it, and has probed it."""

LOOK_S = 0.5


def examine_gateway(
    url: str, *, arm: str = ARMS[0], pause: Callable[[float], object] = time.sleep
) -> Sequence[Finding]:
    """Return what is wrong, odd or right with the gateway at ``url``.

    One that has just started is asked again until it has heard of its workers, or might have.

    Args:
        url: Where it listens.
        arm: Of a canary, whose fleet.
        pause: Waits for so many seconds.
    """
    found = _ask(url, arm)
    if not isinstance(found, Finding) and may_settle(found):
        say(f"the gateway runs for {found['up_s']:.0f} s only: waiting to hear of its workers")
        for _ in range(round(SETTLED_S / LOOK_S)):
            pause(LOOK_S)
            found = _ask(url, arm)
            if isinstance(found, Finding) or not may_settle(found):
                break
    if isinstance(found, Finding):
        return [found]
    order = [Level.PROBLEM, Level.WARNING, Level.OK]
    return sorted(judge(found), key=lambda finding: order.index(finding.level))


def may_settle(status: Mapping[str, Any]) -> bool:
    """Return whether a gateway is so young that what is missing may just not have come yet.

    Splits that had to happen and none of which did are told at once.
    """
    up_s, split = status.get("up_s"), status.get("split", {})
    if not isinstance(up_s, int | float) or up_s >= SETTLED_S:
        return False
    if _missed(split) and not split.get("happened"):
        return False
    unprobed = any(not w["healthy"] and w.get("reason") == NOT_PROBED for w in status["workers"])
    return unprobed or bool(_silent(status)) or bool(status.get("split_problems"))


def _silent(status: Mapping[str, Any]) -> list[str]:
    """Return the workers that should have introduced themselves and have not."""
    return [
        w["name"]
        for w in status["workers"]
        if w["healthy"]
        and w.get("handoffs", True)
        and not w.get("own_transport")
        and not w.get("hello")
    ]


def _ask(url: str, arm: str) -> Mapping[str, Any] | Finding:
    """Return the status of a gateway, or why there is none."""
    try:
        status, answer = get_json(url, of_arm("/internal/status", arm))
    except (OSError, HTTPException, ValueError) as problem:
        return Finding(
            Level.PROBLEM,
            "gateway",
            f"{url} does not answer: {problem}",
            "start it (`disagg up` or `disagg serve`), or correct the address",
        )
    if status == 403:
        return Finding(
            Level.PROBLEM,
            "gateway",
            f"{url} tells its state to its own host only",
            "run this command on the gateway's host",
        )
    if status != 200 or not isinstance(answer, dict) or "workers" not in answer:
        return Finding(
            Level.PROBLEM,
            "gateway",
            f"{url}/internal/status answers {status}, not as this project's gateway does",
            "give the gateway's address, not a worker's",
        )
    if (absent := no_such_arm(answer, arm)) is not None:
        return Finding(Level.PROBLEM, "gateway", absent, "leave --arm out, or ask another one")
    return answer


def judge(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield findings for the answer of ``/internal/status``."""
    for worker in status["workers"]:
        yield _worker(worker)
    yield from _reports(status)
    for problem in status.get("split_problems") or ():
        yield Finding(Level.PROBLEM, "split", str(problem), "make both workers alike, then restart")
    yield from _split(status)
    for plugin, count in (status.get("plugin_failures") or {}).items():
        yield Finding(
            Level.WARNING,
            f"plugin {plugin}",
            f"failed {count:g} times and was skipped",
            "see the gateway's log; `disagg plugins` lists what is loaded",
        )


def _worker(worker: Mapping[str, Any]) -> Finding:
    subject = f"worker {worker['name']}"
    if not worker["healthy"]:
        reason = worker.get("reason") or worker.get("last_problem") or "no reason told"
        return Finding(
            Level.PROBLEM,
            subject,
            f"unhealthy: {reason}",
            _fix(str(reason), worker["url"]),
        )
    failed = sum((worker.get("failed") or {}).values())
    served = worker.get("served", 0)
    if failed:
        return Finding(
            Level.WARNING,
            subject,
            f"healthy now; {failed} of {served + failed} calls failed, "
            f"the last one: {worker.get('last_problem')}",
            f"look at the log of the worker at {worker['url']}",
        )
    return Finding(Level.OK, subject, f"{worker['role']}, healthy, {served} calls served")


def _fix(reason: str, url: str) -> str:
    """Return what to do about a worker that is unhealthy for ``reason``."""
    if "two models" in reason:
        return "start it with the fleet's --served-model-name, or correct `model` in the policy"
    if "nobody listens" in reason or "refused" in reason:
        return "start it, or correct its url in the policy"
    return f"look at the log of the worker at {url}"


def _reports(status: Mapping[str, Any]) -> Iterator[Finding]:
    rejected = status.get("reports_rejected") or {}
    if rejected.get("signature"):
        yield Finding(
            Level.PROBLEM,
            "secret",
            f"{rejected['signature']:g} reports of workers had a false signature",
            "give the gateway and every worker the same secret, and compare the hosts' clocks",
        )
    if silent := _silent(status):
        yield Finding(
            Level.PROBLEM,
            "connector",
            f"never heard of the connector in {', '.join(silent)}",
            CONNECTOR_FIX,
        )


def _split(status: Mapping[str, Any]) -> Iterator[Finding]:
    split = status.get("split") or {}
    recent = split.get("recent_requests", 0)
    routed = split.get("routed_disaggregated", 0)
    roles = {w["role"] for w in status["workers"]}
    if not recent:
        yield Finding(Level.OK, "split", "no request yet: ask again after some traffic")
    elif not routed:
        yield from _never_routed(status, split, roles)
    else:
        yield from _without_reports(split)
        yield from _observed(status, split)


def _missed(split: Mapping[str, Any]) -> dict[str, int]:
    """Return the splits that had to load KV and did not, by the gateway's word for why."""
    told = _words(split)
    return {word: told[word] for word in told if word not in BEFORE_LOADING}


def _early(split: Mapping[str, Any]) -> dict[str, int]:
    """Return the splits whose request ended before KV could be loaded, by how it ended."""
    told = _words(split)
    return {word: told[word] for word in told if word in BEFORE_LOADING}


def _words(split: Mapping[str, Any]) -> dict[str, int]:
    told = split.get("not_happening") or {}
    return {str(label).removeprefix("no: "): count for label, count in told.items()}


def _without_reports(split: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what nobody reports of, what needed no handoff, and what ended before its own."""
    recent = split.get("recent_requests", 0)
    if unobserved := split.get("unobserved", 0):
        yield Finding(
            Level.OK,
            "split",
            f"{unobserved} of the last {recent} requests were split by the engine's own transport, "
            "which nobody here observes: prefill answered with parameters and decode answered to "
            "them; whether KV crossed only the servers' own metrics tell",
        )
    if ended := split.get("ended_by_prefill", 0):
        yield Finding(
            Level.OK,
            "split",
            f"{ended} of the last {recent} requests were ended by prefill: nothing was left to "
            "hand over",
        )
    if early := _early(split):
        yield _ended_early(early, split.get("routed_disaggregated", 0))


def _ended_early(early: Mapping[str, int], routed: int) -> Finding:
    """Return what splits tell whose requests ended before KV could be loaded: nothing."""
    count = sum(early.values())
    listed = ", ".join(f"{how} {times}" for how, times in early.items())
    ended = f"{count} of {routed} requests ended before KV could be loaded ({listed})"
    if count < routed:
        return Finding(Level.OK, "split", f"{ended}: they tell nothing of handoffs")
    return Finding(
        Level.WARNING,
        "split",
        f"no split has completed yet: {ended}",
        "ask again after some traffic; if all requests end so, see the per-request records",
    )


def _observed(status: Mapping[str, Any], split: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield whether those splits happened of which somebody can tell."""
    recent, routed = split.get("recent_requests", 0), split.get("routed_disaggregated", 0)
    happened, unobserved = split.get("happened", 0), split.get("unobserved", 0)
    ended, early = split.get("ended_by_prefill", 0), sum(_early(split).values())
    expected = routed - early - unobserved - ended
    if not expected:
        return
    if happened == expected:
        tokens = status.get("tokens_from_handoff", 0)
        yield Finding(
            Level.OK,
            "split",
            f"{happened} of the last {recent} requests were split, all with KV loaded "
            f"({tokens:g} prompt tokens taken from handoffs in all)",
        )
        return
    own, good = _only_own_transport(status), happened + unobserved
    fix = OWN_TRANSPORT_FIX if own else CONNECTOR_FIX
    if not own and good:
        fix = "see the per-request records (handoff.problem)"
    for word, count in _missed(split).items():
        yield Finding(
            Level.PROBLEM if good == 0 or count * 10 > expected + unobserved else Level.WARNING,
            "split",
            f"{count} of {routed} split requests loaded no KV: {REASONS.get(word, word)}",
            fix,
        )


def _only_own_transport(status: Mapping[str, Any]) -> bool:
    """Return whether every pair that can share a handoff has an engine that carries it itself."""
    workers = [w for w in status["workers"] if w.get("handoffs", True)]
    ours = [w for w in workers if not w.get("own_transport")]
    prefill = {w["name"] for w in ours if w["role"] in ("prefill", "both")}
    decode = {w["name"] for w in ours if w["role"] in ("decode", "both")}
    some_pair_is_ours = bool(prefill and decode) and len(prefill | decode) > 1
    return len(ours) < len(workers) and not some_pair_is_ours


def _never_routed(
    status: Mapping[str, Any], split: Mapping[str, Any], roles: set[str]
) -> Iterator[Finding]:
    recent = split.get("recent_requests", 0)
    reasons = split.get("local_reasons") or {}
    listed = "; ".join(f"{count} times: {why}" for why, count in reasons.items())
    if roles.isdisjoint({"prefill", "both"}):
        yield Finding(Level.OK, "split", "the policy has no prefill worker: nothing to split")
        return
    yield Finding(
        Level.WARNING,
        "split",
        f"none of the last {recent} requests was split ({listed or 'no reason kept'})",
        "if prompts are shorter than scheduler.split.min_prompt_tokens "
        f"({status.get('min_prompt_tokens')}), lower it or leave things as they are",
    )
