"""Why the last requests went where they went: for ``disagg explain`` and a header (sans-IO)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from disagg_plugins.scheduling.trace import MOST_WORKERS, Trace

if TYPE_CHECKING:
    from disagg_plugins.telemetry.records import RequestRecord
    from disagg_plugins.types import Decision, RequestProfile

KEPT = 1000
"""Requests remembered; at most 10 KiB each in a fleet of a few workers."""

MOST_HASHES = 64
"""Kept with a request, some 6 KiB: making its profile anew without them takes longer than all else
here."""

MAX_HEADER_BYTES = 4096
"""Clients and proxies take heads of 8 KiB and more; a longer explanation loses its steps."""

Plain = dict[str, object]


@dataclass(slots=True)
class Explanation:
    """What is known of one request's routes.

    Attributes:
        profile: The request as the scheduler saw it.
        trace: What plugins said; of all decisions, if it was decided more than once.
        refused: Why it was refused, or None.
        decision: The last decision, or None.
        record: How it went so far, or None.
        arm: Which arm of a canary it went to, and why; empty without a canary.
    """

    profile: RequestProfile
    trace: Trace = field(default_factory=Trace)
    refused: str | None = None
    decision: Decision | None = None
    record: RequestRecord | None = None
    arm: object = ""

    def settle(self, workers: int) -> None:
        """Forget what only deciding needs; the hashes of a long prompt alone take 300 KiB.

        Args:
            workers: Of the fleet.
        """
        profile = self.profile
        if len(profile.prefix_hashes) > MOST_HASHES or len(profile.cached_tokens) > MOST_WORKERS:
            self.profile = replace(profile, prefix_hashes=(), cached_tokens={})
        if workers > MOST_WORKERS:
            self.trace.shorten()

    def plain(self) -> Plain:
        """Return everything as plain values."""
        profile = self.profile
        found: Plain = {
            "request_id": profile.request_id,
            "profile": {
                "endpoint": profile.endpoint,
                "model": profile.model,
                "prompt_tokens": profile.prompt_tokens,
                "tokens_by": profile.tokens_by,
                "max_output_tokens": profile.max_output_tokens,
                "stream": profile.stream,
                "unsplittable": profile.unsplittable,
                "slo_class": profile.slo_class,
                "priority": profile.priority,
            },
            "route": self.route(),
            "steps": self.trace.plain(),
        }
        if self.arm:
            found["arm"] = str(self.arm)
        if self.record is not None:
            found["record"] = self.record.as_dict()
        return found

    def route(self) -> Plain:
        """Return where the request went and why."""
        if self.decision is None:
            return {"refused": self.refused or "not decided"}
        route = self.decision.route
        prefill = getattr(route, "prefill", None)
        where: Plain = {} if prefill is None else {"prefill": prefill.name}
        return {**where, "decode": route.decode.name, "why": self.decision.reason}

    def header(self) -> bytes:
        """Return the value of the response header: one line of JSON, ASCII."""
        arm: Plain = {"arm": str(self.arm)} if self.arm else {}
        whole = json.dumps({**arm, "route": self.route(), "steps": self.trace.plain()})
        if len(whole) > MAX_HEADER_BYTES:
            whole = json.dumps({"route": self.route(), "steps": "too many for a header"})
        if len(whole) > MAX_HEADER_BYTES:
            whole = json.dumps({"route": "too long for a header"})
        return whole.encode("ascii")


class Explanations:
    """The explanations of the last requests, by request id."""

    def __init__(self) -> None:
        self._kept: dict[str, Explanation] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, profile: RequestProfile) -> Explanation:
        """Return a new explanation; the oldest one is forgotten where there are too many."""
        explanation = Explanation(profile)
        self._kept.pop(profile.request_id, None)
        self._kept[profile.request_id] = explanation
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return explanation

    def of(self, request_id: str) -> Explanation | None:
        """Return the explanation of a request, or None when it is not known any more."""
        return self._kept.get(request_id)
