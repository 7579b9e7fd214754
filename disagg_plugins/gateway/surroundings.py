"""The record of one request as it begins, and what else its workers had to do while it ran.

A time says little without the load it was measured under.
"""

from __future__ import annotations

from time import monotonic, time
from typing import TYPE_CHECKING

from disagg_plugins.telemetry.records import RequestRecord
from disagg_plugins.types import Disaggregated

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.timeline import Timeline
    from disagg_plugins.types import Decision, WorkerLoad


def record_of(parsed: ParsedRequest, decision: Decision, request_id: str) -> RequestRecord:
    """Return the record of a request that is about to begin."""
    route = decision.route
    return RequestRecord(
        request_id=request_id,
        at_s=time(),
        endpoint=parsed.endpoint,
        model=parsed.model,
        route="disaggregated" if isinstance(route, Disaggregated) else "local",
        why=decision.reason,
        prefill=route.prefill.name if isinstance(route, Disaggregated) else None,
        decode=route.decode.name,
        stream=parsed.stream,
        prompt_tokens_estimate=parsed.prompt_tokens,
        prompt_tokens_by=parsed.tokens_by,
    )


class Surroundings:
    """The load around one request.

    Args:
        read_tokens: Prompt tokens read so far by each worker; shared by all requests.
        cached_tokens: Prompt tokens that workers are believed to hold, by name.
    """

    __slots__ = ("_answering", "_before", "_cached", "_decode", "_read_tokens", "_seen")

    def __init__(self, read_tokens: Counter[str], cached_tokens: Mapping[str, int]) -> None:
        self._read_tokens = read_tokens
        self._cached = cached_tokens
        self._decode = ""
        self._answering = False
        self._before = 0
        self._seen = 0  # read beside the answer at workers that wrote its beginning

    def sent(
        self, record: RequestRecord, times: Timeline, side: str, worker: str, load: WorkerLoad
    ) -> None:
        """A call is about to be sent to a worker, whose ``load`` does not hold it yet."""
        if record.sent_s is None:
            record.sent_s = monotonic() - times.arrival_s
        if side == "prefill" or record.route == "local":
            record.prefill_queued_tokens = load.prompt_tokens
            cached = self._cached.get(worker, 0)
            record.prefill_cached_tokens = min(cached, record.prompt_tokens_estimate)
        if side == "prefill":
            record.prefill_requests = load.requests
        else:
            record.decode_requests = load.requests
            record.decode_kv_tokens = load.kv_tokens
            if self._answering:  # it goes on elsewhere
                self._seen += self._read_tokens[self._decode] - self._before
                self._before = self._read_tokens[worker]
            self._decode = worker

    def read(self, record: RequestRecord, worker: str | None) -> None:
        """``worker`` has read the prompt."""
        if worker is not None:
            fresh = record.prompt_tokens_estimate - record.prefill_cached_tokens
            self._read_tokens[worker] += fresh

    def answering(self, record: RequestRecord) -> None:
        """The first token came: what is read there from now on holds this answer up."""
        if record.route == "local":
            self.read(record, self._decode)
        self._answering = True
        self._before = self._read_tokens[self._decode]

    def ended(self, record: RequestRecord) -> None:
        """The request is over."""
        if self._answering:
            beside = self._read_tokens[self._decode] - self._before
            record.decode_read_tokens = self._seen + beside
