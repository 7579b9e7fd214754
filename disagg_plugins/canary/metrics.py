"""What one request says of the arm that served it, and the metrics that guardrails name (pure).

What is bad counts as bad: a request that failed, broke off or is overdue has +inf as its latency,
so no arm looks fast because it loses its slow requests. A first token that did come counts at its
time even so: it was seen.

**A client that goes away by itself is censored**: nobody knows how its request would have ended,
and it may have left because of the waiting or in spite of the speed.

- Waiting times (``ttft``, ``e2e``) count until it left. What is compared is then how long clients
  waited, the lesser of latency and patience. Requests reach the arms at random, so patience is the
  same in both, and a slower arm never looks faster. It may look less slow than it is; dropping
  these requests would hide more, and +inf would make a p99 infinite in both arms wherever
  clients often type on and cancel.
- ``abandonment``, the share of clients who left before a first token, shows the rest: guard it
  next to ``ttft``.
- ``tpot`` counts if the record has one: its tokens came at that pace. One that was counted in
  pieces does not: two arms may make pieces of different sizes.
- It is no error, and no failure of an SLO unless that was already missed.

A request that the client got wrong (``rejected``) counts in ``rejection_rate`` alone; an arm that
refuses what the other takes shows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from disagg_plugins.errors import ConfigError
from disagg_plugins.telemetry.ledger import UNOBSERVED

if TYPE_CHECKING:
    from disagg_plugins.telemetry.records import RequestRecord

Arm = Literal["baseline", "candidate"]
Ended = Literal["ok", "error", "broken", "overdue", "rejected", "client_gone"]

ARMS: tuple[Arm, Arm] = ("baseline", "candidate")

FAILED: frozenset[Ended] = frozenset({"error", "broken", "overdue"})

OF_THE_SERVICE = frozenset({404, 408, 429})
"""Answers of 4xx that speak of the worker (it lacks the model, took too long, is full). The gateway
hands them on as they are, and its record calls them rejected; so does it a 503."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended; times in seconds from its arrival.

    Attributes:
        arrival_s: When it arrived; any clock, the same for all.
        ended: ``overdue``: still open at the horizon (see ``cohort``).
        ttft_s: None: no first token, or the answer was not streamed.
        tpot_s: None: no token came after the first piece, or it was not streamed.
        e2e_s: Until its end, whichever that was.
        stream: Answers in one piece have no first token of their own.
        within_slo: Whether it kept all bounds of its SLO class; None: it has none, or nobody knows.
        to_split: Whether its route had a prefill worker.
        split: Whether its KV really travelled; where the engine's own transport carries it, whether
            decode answered to the handoff without falling back.
        kv_failed: Whether its handoff was lost; None: there was none, or the client left.
        lease_ended: Whether its KV was never fetched and freed by the lease; None as above, or
            nobody observes it.
        recomputed_share: Share of the prompt that the decode worker computed again; None as above.
        per_worker: What ``efficiency`` says of its arm's workers; None: unknown.
        per_cost: The same of their cost.
    """

    arm: Arm
    arrival_s: float
    ended: Ended
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    output_tokens: int | None = None
    stream: bool = True
    within_slo: bool | None = None
    to_split: bool = False
    split: bool = False
    kv_failed: bool | None = None
    lease_ended: bool | None = None
    recomputed_share: float | None = None
    per_worker: float | None = None
    per_cost: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the service failed it."""
        return self.ended in FAILED


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that a request has, or has not.

    Attributes:
        kind: ``share``: 0 to 1, of which the mean is taken; ``amount``: 0 to +inf, of which
            quantiles are: the mean of what has no bound cannot be bounded.
        better: Which way is good; None: that is the operator's matter.
        of: Returns the number; None: this request is no sample.
    """

    name: str
    kind: Literal["share", "amount"]
    unit: str
    better: Literal["lower", "higher"] | None
    meaning: str
    of: Callable[[Outcome], float | None]


def _error_rate(outcome: Outcome) -> float | None:
    if outcome.ended in ("rejected", "client_gone"):
        return None
    return float(outcome.failed)


def _ttft(outcome: Outcome) -> float | None:
    if not outcome.stream or outcome.ended == "rejected":
        return None
    if outcome.ttft_s is not None:
        return outcome.ttft_s
    # one that went on without a token and ended well had none to send
    return {"client_gone": outcome.e2e_s, "ok": outcome.e2e_s}.get(outcome.ended, math.inf)


def _tpot(outcome: Outcome) -> float | None:
    if not outcome.stream:
        return None
    return math.inf if outcome.failed else outcome.tpot_s


def _e2e(outcome: Outcome) -> float | None:
    if outcome.ended == "rejected":
        return None
    return math.inf if outcome.failed else outcome.e2e_s


def _goodput(outcome: Outcome) -> float | None:
    if outcome.ended == "rejected" or outcome.within_slo is None:
        return None
    return float(outcome.within_slo and not outcome.failed)


def _scaled(outcome: Outcome, factor: float | None) -> float | None:
    good = _goodput(outcome)
    return None if good is None or factor is None else good * factor


def _abandonment(outcome: Outcome) -> float | None:
    if outcome.ended == "rejected":
        return None
    return float(outcome.ended == "client_gone" and outcome.ttft_s is None)


def _split_share(outcome: Outcome) -> float | None:
    return None if outcome.ended in ("rejected", "client_gone") else float(outcome.split)


def _optional(value: bool | None) -> float | None:
    return None if value is None else float(value)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "error_rate", "share", "", "lower",
            "requests that failed, broke off or were overdue; not those that clients got wrong "
            "or left", _error_rate,
        ),
        Metric(
            "ttft", "amount", "s", "lower",
            "time to the first token of streamed answers; +inf: it never came", _ttft,
        ),
        Metric(
            "tpot", "amount", "s", "lower",
            "time per output token after the first, of streamed answers; +inf: broken off", _tpot,
        ),
        Metric("e2e", "amount", "s", "lower", "time to the end of the answer", _e2e),
        Metric(
            "goodput", "share", "", "higher",
            "requests that kept all bounds of their SLO class", _goodput,
        ),
        Metric(
            "goodput_per_worker", "share", "", "higher",
            "goodput, times the smaller fleet's workers over the arm's own",
            lambda o: _scaled(o, o.per_worker),
        ),
        Metric(
            "goodput_per_cost", "share", "", "higher",
            "goodput, times the cheaper fleet's cost over the arm's own",
            lambda o: _scaled(o, o.per_cost),
        ),
        Metric(
            "abandonment", "share", "", "lower",
            "requests whose client left before the first token", _abandonment,
        ),
        Metric(
            "rejection_rate", "share", "", "lower",
            "requests refused as the client's mistake", lambda o: float(o.ended == "rejected"),
        ),
        Metric(
            "kv_failures", "share", "", "lower",
            "split requests whose KV was lost or never came, as far as that can be seen",
            lambda o: _optional(o.kv_failed),
        ),
        Metric(
            "lease_ends", "share", "", "lower",
            "handoffs whose KV nobody fetched", lambda o: _optional(o.lease_ended),
        ),
        Metric(
            "recompute_share", "share", "", "lower",
            "share of a split request's prompt that was computed again",
            lambda o: o.recomputed_share,
        ),
        Metric(
            "split_share", "share", "", None,
            "requests whose KV really travelled, or was carried unobserved, of all", _split_share,
        ),
    )
}  # fmt: skip
"""Every metric, by its name. Those of handoffs have samples only where requests are split: set a
limit for the candidate instead of comparing it with a baseline that splits nothing."""


def metric_named(name: str, key: str | None = None) -> Metric:
    """Return a metric.

    Raises:
        ConfigError: There is none of that name; the text lists those there are.
    """
    metric = METRICS.get(name)
    if metric is None:
        raise ConfigError(
            f"no metric is named {name!r}", key=key, fix=f"known: {', '.join(sorted(METRICS))}"
        )
    return metric


def outcome_of(
    record: RequestRecord,
    arm: Arm,
    *,
    arrival_s: float | None = None,
    ttft_slo_s: float | None = None,
    tpot_slo_s: float | None = None,
    per_worker: float | None = None,
    per_cost: float | None = None,
) -> Outcome:
    """Return what a settled record says (telemetry/ledger: the reports of its handoff are in).

    Args:
        record: With its times filled.
        arm: Which served it.
        arrival_s: When it arrived, on the caller's clock; None: as the record has it.
        ttft_slo_s: The bound of its SLO class, or None.
        tpot_slo_s: The bound of its SLO class, or None.
        per_worker: See ``Outcome``.
        per_cost: See ``Outcome``.
    """
    ended = _ended(record)
    handoff = record.handoff
    to_split = record.route == "disaggregated"
    told = to_split and ended not in ("client_gone", "rejected") and not record.ended_by_prefill
    split = record.split in ("yes", UNOBSERVED)
    reported = handoff is not None and handoff.report != "none"
    recomputed = None
    if told and handoff is not None and handoff.tokens_recomputed is not None:
        prompt = max(1, record.prompt_tokens or record.prompt_tokens_estimate)
        recomputed = min(1.0, handoff.tokens_recomputed / prompt)
    slo = ttft_slo_s is not None or tpot_slo_s is not None
    return Outcome(
        arm=arm,
        arrival_s=record.at_s if arrival_s is None else arrival_s,
        ended=ended,
        ttft_s=record.ttft_s if record.stream else None,
        tpot_s=record.tpot_s if record.tpot_by == "tokens" else None,
        e2e_s=record.e2e_s,
        output_tokens=record.output_tokens,
        stream=record.stream,
        within_slo=_within(record, ended, ttft_slo_s, tpot_slo_s) if slo else None,
        to_split=to_split,
        split=split,
        kv_failed=not split if told else None,
        lease_ended=handoff.outcome == "expired" if told and handoff and reported else None,
        recomputed_share=recomputed,
        per_worker=per_worker,
        per_cost=per_cost,
    )


def _ended(record: RequestRecord) -> Ended:
    if record.outcome == "rejected":
        service = record.status >= 500 or record.status in OF_THE_SERVICE
        return "error" if service else "rejected"
    if record.outcome == "ok":
        return "ok"
    if record.outcome == "client_gone":
        return "client_gone"
    return "broken" if record.outcome == "broken" else "error"


def _within(
    record: RequestRecord, ended: Ended, ttft_slo_s: float | None, tpot_slo_s: float | None
) -> bool | None:
    """Return whether the bounds were kept; of a client that left, None unless one was missed."""
    if ended in FAILED:
        return False
    waited_s = record.ttft_s if record.ttft_s is not None else record.e2e_s
    late = ttft_slo_s is not None and waited_s is not None and waited_s > ttft_slo_s
    slow = tpot_slo_s is not None and record.tpot_s is not None and record.tpot_s > tpot_slo_s
    if late or slow:
        return False
    return None if ended in ("client_gone", "rejected") else True
