"""What the parts of a policy mean together: contradictions, advice, and the whole in words."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from disagg_plugins.canary.policy_words import canary_advice, canary_sentences
from disagg_plugins.credentials import read_secret
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy_pairs import carriers, engine_pairs
from disagg_plugins.scheduling.weights import weights_of
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.policy import Policy, WorkerPolicy
    from disagg_plugins.yaml_source import KeyPath


def contradictions(policy: Policy) -> Iterator[tuple[KeyPath, str]]:
    """Yield what cannot work: the key's path and the problem."""
    gateway = policy.gateway
    for index, worker in enumerate(policy.fleet.workers):
        url = urlsplit(worker.url)
        if url.port == gateway.port and is_loopback(url.hostname or ""):
            yield (
                ("fleet", "workers", index, "url"),
                f"port {gateway.port} is the gateway's own (gateway.port)",
            )
        if worker.launch is not None and not is_loopback(url.hostname or ""):
            yield (
                ("fleet", "workers", index, "launch"),
                f"a worker at {url.hostname} cannot be started from here; launch starts workers "
                "on this machine: use 127.0.0.1, or start it there and drop launch",
            )
    twice = sorted({t for t in policy.handoff.transports if policy.handoff.transports.count(t) > 1})
    if twice:
        yield ("handoff", "transports"), f"named twice: {', '.join(twice)}"
    rules = policy.scheduler
    if rules.default_slo_class is not None and rules.default_slo_class not in rules.slo_classes:
        known = ", ".join(rules.slo_classes) or "none"
        yield (
            ("scheduler", "default_slo_class"),
            f"{rules.default_slo_class} is none of scheduler.slo_classes ({known})",
        )
    if policy.handoff.connect_s > policy.handoff.load_s:
        yield (
            ("handoff", "load_s"),
            f"{policy.handoff.load_s:g} s for the whole load is less than connect_s "
            f"({policy.handoff.connect_s:g} s), which is a part of it",
        )


def advice(policy: Policy, base_dir: Path) -> Iterator[str]:
    """Yield what is allowed and yet likely not meant.

    Args:
        policy: The policy.
        base_dir: Its folder, where a relative secret file starts.
    """
    workers = policy.fleet.workers
    if can_split(policy):
        try:
            read_secret(policy.secret, base_dir)
        except ConfigError as exc:
            yield f"no handoff can be made without the secret: {exc}"
    elif policy.scheduler.split.rule == "never":
        pass  # it is meant
    elif not any(w.role.serves(Role.PREFILL) for w in workers):
        yield "no worker has the role prefill or both: no request will be split"
    else:
        yield "the only worker that could read prompts also writes the answers: nothing is split"
    queue = policy.scheduler.queue
    if queue.order != "fifo" and queue.ageing_s >= queue.max_wait_s:
        yield (
            f"scheduler.queue.ageing_s ({queue.ageing_s:g}) is not below max_wait_s "
            f"({queue.max_wait_s:g}): nobody waits long enough to go first"
        )
    rules = policy.scheduler
    if rules.split.rule == "slo" and not rules.slo_classes:
        yield (
            "scheduler.split.rule is slo, but there are no scheduler.slo_classes: the smaller "
            "predicted time decides"
        )
    if policy.handoff.ticket_s < policy.gateway.prefill_s:
        yield (
            f"handoff.ticket_s ({policy.handoff.ticket_s:g}) is shorter than gateway.prefill_s "
            f"({policy.gateway.prefill_s:g}): a long prefill would return with a void ticket"
        )
    for key, host in (
        ("gateway.host", policy.gateway.host),
        ("handoff.listen_host", policy.handoff.listen_host),
    ):
        if not is_loopback(host):
            yield (
                f"{key} is {host}: reachable from the network, and nothing is encrypted; keep it "
                "inside a trusted network"
            )
    models = sorted({w.launch.model for w in workers if w.launch is not None})
    if len(models) > 1:
        yield f"the fleet launches several models ({', '.join(models)}): these cannot share KV"
    if policy.canary is not None:
        yield from canary_advice(policy.canary, base_dir)
        goodput = any(guardrail.metric == "goodput" for guardrail in policy.canary.guardrails)
        if goodput and policy.scheduler.default_slo_class is None:
            yield (
                "the canary guards goodput, and only requests that name an SLO class have one: "
                "scheduler.default_slo_class gives it to all"
            )


def engine_advice(policy: Policy, dialects: Mapping[str, Dialect]) -> Iterator[str]:
    """Yield what the engines of the fleet make of it that is likely not meant.

    Args:
        policy: The policy.
        dialects: By engine, of the plugins that are installed; what is not known is passed over.
    """
    if policy.scheduler.split.rule != "never":
        yield from engine_pairs(policy, dialects).problems
    known = [(w, dialects[w.engine]) for w in policy.fleet.workers if w.engine in dialects]
    for worker, dialect in known:
        if worker.role_switch and dialect.decode_is_whole:
            yield (
                f"role_switch of worker {worker.name} has no effect: a server of {worker.engine} "
                "does both phases at any time; leave it out, the role both is enough"
            )
        elif worker.role_switch and dialect.role_switch(Role.DECODE) is None:
            yield (
                f"role_switch of worker {worker.name} cannot work: no server of {worker.engine} "
                "can be told its role; leave it out"
            )
    if policy.fleet.watch is not None or len(known) < len(policy.fleet.workers):
        return
    if not any(_serves_whole(worker, dialect) for worker, dialect in known):
        engines = " and ".join(sorted({w.engine for w, _ in known if w.role.serves(Role.DECODE)}))
        yield (
            f"no worker can serve a whole request: decode workers of {engines} only take split "
            "ones, and what cannot be split is refused; add a worker of role both without "
            "role_switch"
        )


def _serves_whole(worker: WorkerPolicy, dialect: Dialect) -> bool:
    """Return whether a worker can read a prompt and write its answer alone (``fleet.as_used``)."""
    if dialect.decode_is_whole:
        return worker.role.serves(Role.DECODE)
    return worker.role is Role.BOTH and not worker.role_switch


def can_split(policy: Policy) -> bool:
    """Return whether two different workers could do the two phases of a request.

    Those of a watched file are taken to be able to.
    """
    if policy.fleet.watch is not None:
        return True
    prefill = {w.name for w in policy.fleet.workers if w.role.serves(Role.PREFILL)}
    decode = {w.name for w in policy.fleet.workers if w.role.serves(Role.DECODE)}
    return bool(prefill) and len(prefill | decode) > 1


def explain(policy: Policy, dialects: Mapping[str, Dialect] | None = None) -> str:
    """Return the policy in words, one fact a line.

    Args:
        policy: The policy.
        dialects: By engine, of the plugins that are installed.
    """
    return "\n".join(_sentences(policy, dialects or {}))


def _sentences(policy: Policy, dialects: Mapping[str, Dialect]) -> Iterator[str]:
    gateway, plugins = policy.gateway, policy.plugins
    model = policy.model or "the model that the workers name"
    yield f"The gateway listens on {gateway.host}:{gateway.port} and serves {model}."
    for worker in policy.fleet.workers:
        yield _worker_sentence(worker)
    least = policy.scheduler.split.min_prompt_tokens
    if can_split(policy):
        yield _RULES[policy.scheduler.split.rule].format(least=least)
    else:
        yield "No request is split: there are no two workers for the two phases."
    yield from _slo_sentences(policy)
    yield from _queue_sentences(policy)
    yield from _prompt_sentences(policy)
    weights = weights_of(policy.scheduler)
    counted = [f"{name} {weight:g}" for name, weight in weights.items() if weight]
    yield (
        "The worker with the best mean of its scores is chosen; equals take turns. Scores weigh: "
        f"{', '.join([*counted, 'of any other package 1'])}."
    )
    yield from _handoff_sentences(policy, dialects)
    source = policy.secret
    where = f"environment variable {source.env}" if source.env else f"file {source.file}"
    yield f"The shared secret is in the {where}."
    yield (
        f"A failed call is tried once more, for at most {gateway.retry_share:.0%} of the requests "
        f"and {gateway.retries_per_s:g} a second."
    )
    yield (
        f"A worker rests after {gateway.unhealthy_after} failures in a row; at most "
        f"{gateway.max_requests} requests are in flight, more get 503."
    )
    yield from _fleet_sentences(policy)
    yield _resume_sentence(policy)
    yield (
        f"A third-party plugin has {plugins.deadline_s * 1000:g} ms a call and is switched off "
        f"after {plugins.strikes} overruns."
    )
    if plugins.disabled:
        yield f"Not loaded: {', '.join(plugins.disabled)}."
    if policy.telemetry.records is not None:
        yield f"A record of each request is written to {policy.telemetry.records}."
    if policy.canary is not None:
        yield from canary_sentences(policy.canary)


def _handoff_sentences(policy: Policy, dialects: Mapping[str, Dialect]) -> Iterator[str]:
    """Yield how KV travels, and what ends a handoff."""
    handoff, found = policy.handoff, carriers(policy, dialects)
    if found.own:
        yield (
            f"Between workers of {' and '.join(found.own)} KV travels by the engine's own "
            "transport, which nobody here observes and the section handoff does not govern. "
            f"Prefill may take {policy.gateway.prefill_s:g} s; if it fails, the decode worker "
            "computes the prompt itself."
        )
    if not found.ours:
        return
    yield (
        f"{'Between other workers ' if found.own else ''}KV travels by "
        f"{', else '.join(handoff.transports)}; a worker stages at most "
        f"{handoff.staging_bytes / (1 << 20):g} MiB a rank and waits {handoff.staging_wait_s:g} s "
        "for room."
    )
    yield (
        f"A handoff nobody claims is freed after {handoff.lease_s:g} s. A load may take "
        f"{handoff.load_s:g} s; if it fails, the decode worker computes the prompt itself."
    )


_ORDERS = {
    "fifo": "in order of arrival",
    "shortest": "the shortest prompt first",
    "deadline": "the earliest TTFT bound first",
}


def _queue_sentences(policy: Policy) -> Iterator[str]:
    rules, queue = policy.scheduler, policy.scheduler.queue
    if can_split(policy):
        most = queue.prefills_per_worker
        bound = "as many prompts at once as its capacity" if most is None else f"{most} at once"
        yield f"A prefill worker reads {bound}."
        if queue.max_waiting:
            yield (
                f"When all are taken, up to {queue.max_waiting} requests wait at most "
                f"{queue.max_wait_s:g} s, {_ORDERS[queue.order]}; who has waited "
                f"{queue.ageing_s:g} s goes before. Then a decode worker does all of it."
            )
        else:
            yield "When all are taken, a decode worker does all of it: nobody waits."
    for name, tenant in rules.tenants.items():
        limits = []
        if tenant.max_requests is not None:
            limits.append(f"{tenant.max_requests} requests at once")
        if tenant.prompt_tokens_per_s is not None:
            limits.append(f"{tenant.prompt_tokens_per_s:g} prompt tokens a second")
        who = "Each other tenant" if name == "*" else f"Tenant {name}"
        may = f"may have {' and '.join(limits)}" if limits else "has no limit"
        yield f"{who} {may}, weight {tenant.weight:g}, priority {tenant.priority:+d}."
    if rules.admission.refuse_over is not None:
        yield (
            f"A request is refused when every predicted TTFT is over "
            f"{rules.admission.refuse_over:g} times its SLO class's."
        )


def _fleet_sentences(policy: Policy) -> Iterator[str]:
    """Yield how workers fall ill, recover, join and change their role."""
    gateway, rules = policy.gateway, policy.scheduler.rebalance
    if gateway.probe_generate_s is not None:
        yield (
            f"A worker silent for {gateway.probe_generate_s:g} s, or that failed, is asked for one "
            f"token and has {gateway.probe_generate_timeout_s:g} s for it."
        )
    yield (
        "A worker that comes back gets one request at a time until one succeeds; with each relapse "
        f"it rests longer, from {gateway.rest_s:g} to {gateway.rest_max_s:g} s. The last worker of "
        "a role is used though it fails, as long as it answers health probes."
    )
    if gateway.slow_factor is not None:
        yield (
            f"A worker over {gateway.slow_factor:g} times slower than its load explains, beside at "
            "least two others of its role, engine and label hardware, rests as well: at most a "
            "third of a role at once, and half of it stays in use."
        )
    if policy.fleet.watch is not None:
        yield (
            f"More workers stand in {policy.fleet.watch}, which is looked at every "
            f"{policy.fleet.watch_s:g} s; one that is gone from it drains for at most "
            f"{gateway.drain_s:g} s."
        )
    if rules.enabled:
        yield (
            f"A worker of role both moves to a role that is used to {rules.high:.0%} from one that "
            f"is used to {rules.low:.0%} or less, at most one in {rules.hold_s:g} s."
        )


_RULES = {
    "threshold": (
        "A request is split when its prompt has at least {least} tokens and a prefill worker "
        "is healthy and has room; else one worker does all of it."
    ),
    "always": "Every request that can be split is split.",
    "never": "No request is split: scheduler.split.rule is never.",
    "load": (
        "A request is split when a prefill worker would be done before a decode worker could read "
        "the prompt without slowing its answers; a handoff counts as {least} tokens of reading."
    ),
    "slo": (
        "A request is split when the predicted TTFT and TPOT keep its SLO better that way; until "
        "the workers are measured, from {least} prompt tokens on."
    ),
}


def _resume_sentence(policy: Policy) -> str:
    gateway = policy.gateway
    if not gateway.resume or not gateway.resumes:
        return "A stream whose decode worker dies breaks off with an error event that says so."
    times = "once" if gateway.resumes == 1 else f"at most {gateway.resumes} times"
    return (
        "A stream whose decode worker dies, or says nothing for "
        f"{gateway.idle_s:g} s, goes on with another worker of the same engine from the tokens "
        f"already sent, {times}; where that cannot be done it breaks off with an error event that "
        "says why."
    )


def _slo_sentences(policy: Policy) -> Iterator[str]:
    rules = policy.scheduler
    for name, slo in rules.slo_classes.items():
        ttft = "any TTFT" if slo.ttft_s is None else f"TTFT {slo.ttft_s:g} s"
        tpot = "any TPOT" if slo.tpot_s is None else f"TPOT {slo.tpot_s * 1000:g} ms"
        yield f"SLO class {name}: {ttft}, {tpot}, priority {slo.priority}."
    if rules.default_slo_class is not None:
        yield f"A request that names no class is of class {rules.default_slo_class}."
    if rules.profile is not None:
        yield f"Predictions start from the profile {rules.profile}."


def _prompt_sentences(policy: Policy) -> Iterator[str]:
    rules = policy.scheduler
    if rules.tokenizer is None:
        yield f"Text is estimated to have {rules.chars_per_token:g} characters a token."
    else:
        yield (
            f"Prompts are counted with the tokenizer of {rules.tokenizer}, within "
            f"{rules.tokenizer_s:g} s each, and estimated where that fails."
        )
    told = [worker.name for worker in policy.fleet.workers if worker.kv_events is not None]
    rest = "The other workers are" if told else "A worker is"
    if told:
        yield f"What {', '.join(told)} cache is known from the engines' own KV events."
    if len(told) < len(policy.fleet.workers):
        yield (
            f"{rest} believed to cache the prompts routed there for {rules.prefix.ttl_s:g} s, "
            f"{rules.prefix.tokens} tokens at most."
        )
    for tenant, labels in sorted(rules.labels.items()):
        who = "all other tenants" if tenant == "*" else f"tenant {tenant}"
        wanted = ", ".join(f"{key}={value}" for key, value in sorted(labels.items()))
        yield f"Requests of {who} go to workers labelled {wanted or 'in any way'}."


def _worker_sentence(worker: WorkerPolicy) -> str:
    does = {
        Role.PREFILL: "reads prompts",
        Role.DECODE: "writes answers",
        Role.BOTH: "reads prompts and writes answers",
    }[worker.role]
    start = ""
    if worker.launch is not None:
        start = f" `disagg up` starts it with {worker.launch.model}"
        start += f" on CPUs {_listed(worker.launch.cpus)}." if worker.launch.cpus else "."
    return (
        f"Worker {worker.name} ({worker.engine} at {worker.url}) {does}, "
        f"{worker.capacity} requests at once.{start}"
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
