"""All that is known of a canary, as plain values: for the page, the report and other tools."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from disagg_plugins.canary.histogram import BINS_PER_DECADE, EDGES, LOWER, UPPER
from disagg_plugins.canary.lookout import title
from disagg_plugins.canary.metrics import METRICS
from disagg_plugins.canary.rollout import UNDECIDED
from disagg_plugins.telemetry.ledger import ENDED_BY_PREFILL, UNOBSERVED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from disagg_plugins.canary.front import Front
    from disagg_plugins.canary.guardrail import Figure, Verdict
    from disagg_plugins.canary.histogram import Histogram
    from disagg_plugins.canary.lookout import Point, Report
    from disagg_plugins.canary.parity import Finding, ParityJudgement
    from disagg_plugins.gateway.server import Gateway

Plain = dict[str, object]

SHOWN_POINTS = 250
"""Of the history: making more of them takes the loop's time, and no screen shows more."""

SHOWN_BINS_PER_DECADE = 12
"""Of the distributions: a fifth wide, which is what one sees in a picture."""


def document(front: Front, report: Report, *, may_act: bool) -> Plain:
    """Return the document; +inf, and what is not known, is null.

    Args:
        front: Whose canary it is.
        report: What the evidence says.
        may_act: Whether who asks may send commands.
    """
    view, canary, plan = front.lookout.view, front.canary, front.plan
    progress = view.progress
    now_s = time.time()
    return {
        "now_s": now_s,
        "canary": canary.store.name,
        "candidate": canary.candidate.name,
        "gateway": front.name,
        "may_act": may_act,
        "plan": {
            "steps": list(plan.steps),
            "bake_s": plan.bake_s,
            "approval": canary.approval,
            "level": canary.level,
            "frozen": plan.frozen(now_s),
        },
        "progress": {
            "rollout": progress.rollout,
            "phase": progress.phase,
            "step": progress.step,
            "weight": progress.weight,
            "baked_s": progress.baked_s,
            "why": progress.why,
        },
        "weight_here": view.weight,
        "leads": view.leads,
        "lacks": _lacks(view.lacks, report),
        "trouble": view.trouble,
        "arms": {arm: _arm(gateway) for arm, gateway in front.arms.items()},
        "counted": _counted(front),
        "guardrails": [_guardrail(v) for v in report.judgement.verdicts],
        "parity": None if report.parity is None else _parity(report.parity, report),
        "history": [_point(point) for point in _thin(list(front.lookout.history))],
        "distributions": {
            name: _distribution(name, *pair)
            for name, pair in report.case.guardrails.distributions().items()
        },
        "shadow": _shadow(front),
        "decisions": [decision.as_dict() for decision in report.decisions],
    }


def _thin(points: list[Point]) -> list[Point]:
    """Return so many points as one sees, the newest among them."""
    every = -(-len(points) // SHOWN_POINTS)
    return points[::-1][:: max(1, every)][::-1]


def _lacks(lacks: Sequence[str], report: Report) -> list[str]:
    """Return what the next step waits for, with the guardrails that are not decided."""
    reasons = report.judgement.reasons if report.judgement.action == "wait" else ()
    found = [lack for lack in lacks if lack != UNDECIDED or not reasons]
    return found + (list(reasons) if len(found) < len(lacks) else [])


def _counted(front: Front) -> Plain:
    traffic = front.traffic
    found: Plain = {arm: traffic.counted[arm] for arm in front.arms}
    return {**found, "skipped": traffic.skipped}


def _arm(gateway: Gateway) -> Plain:
    return {
        "model": gateway.fleet.model(),
        "requests": sum(gateway.metrics.counts("disagg_requests").values()),
        "in_flight": len(gateway.active),
        "workers": [
            {
                "name": state.worker.name,
                "role": str(state.worker.role),
                "healthy": state.healthy,
                "reason": state.reason,
            }
            for state in gateway.fleet.states.values()
        ],
        "split": _split(list(gateway.recent)),
    }


def _split(recent: Iterable[tuple[str, str, str]]) -> Plain:
    """Return what became of the requests that were to be split.

    Args:
        recent: Of each request its route, what is known of its split, and why it was routed so.
    """
    routed = [split for route, split, _ in recent if route == "disaggregated"]
    return {
        "routed": len(routed),
        "happened": routed.count("yes"),
        "unobserved": routed.count(UNOBSERVED),
        "ended_by_prefill": routed.count(ENDED_BY_PREFILL),
    }


def finite(value: float | None) -> float | None:
    """Return a number that JSON has; None for +inf."""
    return value if value is not None and math.isfinite(value) else None


def _figure(figure: Figure | None) -> Plain | None:
    if figure is None:
        return None
    return {
        "estimate": finite(figure.estimate),
        "low": finite(figure.low),
        "high": finite(figure.high),
        "count": figure.count,
        "worth": figure.worth,
    }


def _guardrail(verdict: Verdict) -> Plain:
    guardrail = verdict.guardrail
    return {
        "name": title(guardrail),
        "metric": guardrail.metric,
        "quantile": guardrail.quantile,
        "unit": guardrail.declared.unit,
        "answer": verdict.answer,
        "required": guardrail.required,
        "baseline": _figure(verdict.baseline),
        "candidate": _figure(verdict.candidate),
        "allowed": finite(verdict.allowed),
        "reason": verdict.reason,
    }


def _parity(parity: ParityJudgement, report: Report) -> Plain:
    counted = report.case.parity
    pairs = {arm: counted.pairs(arm) if counted is not None else 0 for arm in parity.lost}
    return {
        "answer": parity.answer,
        "pairs": pairs,
        "lost": dict(parity.lost),
        "findings": [_finding(finding) for finding in parity.findings],
    }


def _finding(finding: Finding) -> Plain:
    return {
        "aspect": finding.aspect,
        "bucket": finding.bucket,
        "answer": finding.answer,
        "required": finding.required,
        "baseline": _figure(finding.baseline),
        "candidate": _figure(finding.candidate),
        "allowed": finding.allowed,
        "reason": finding.reason,
    }


def _point(point: Point) -> Plain:
    figures: Plain = {}
    for name, (ours, theirs, allowed) in point.figures.items():
        figures[name] = {
            "baseline": None if ours is None else [finite(v) for v in ours],
            "candidate": [finite(v) for v in theirs],
            "allowed": finite(allowed),
        }
    return {
        "at_s": point.at_s,
        "rollout": point.rollout,
        "weight": point.weight,
        "figures": figures,
    }


def _distribution(name: str, baseline: Histogram, candidate: Histogram) -> Plain:
    """Return the counts of both arms in wide bins, from the first that is filled to the last."""
    width = round(BINS_PER_DECADE / SHOWN_BINS_PER_DECADE)
    filled = np.flatnonzero(baseline.counts + candidate.counts)
    if not len(filled):
        return {"unit": METRICS[name].unit, "edges": [], "baseline": [], "candidate": []}
    begin = int(filled[0]) // width * width
    starts = list(range(begin, int(filled[-1]) + 1, width))
    ends = [min(start + width, len(UPPER)) for start in starts]
    edges = [LOWER[start] for start in starts] + [min(UPPER[ends[-1] - 1], EDGES[-1])]
    return {
        "unit": METRICS[name].unit,
        "edges": edges,
        **{
            arm: [
                int(counts.counts[start:end].sum()) for start, end in zip(starts, ends, strict=True)
            ]
            for arm, counts in (("baseline", baseline), ("candidate", candidate))
        },
    }


def _shadow(front: Front) -> Plain | None:
    copies = front.copies
    if copies is None:
        return None
    ttft, e2e = copies.median_ratios()
    return {
        "in_flight": copies.shadow.in_flight,
        "copied": {arm: copies.copied[arm] for arm in front.arms},
        "skipped": dict(copies.shadow.skipped),
        "pairs": copies.pairs,
        "ttft_ratio_p50": ttft,
        "e2e_ratio_p50": e2e,
    }
