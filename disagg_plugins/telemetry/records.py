"""The per-request record, and its file of JSON lines.

One line a request tells where it went and why, how fast it was, and whether the KV really
travelled. Lines are encoded and written off the event loop, a few times a second.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import mul
from pathlib import Path

import msgspec

from disagg_plugins.errors import ConfigError

log = logging.getLogger(__name__)

MAX_PENDING = 65_536
"""Records held until the next flush; more are dropped and counted."""

CLOSE_S = 5.0
"""How long closing waits for the disk."""

_NO_GAPS = b',"gaps_s":null}'
"""How the JSON of a record ends: ``gaps_s`` is its last field."""


@dataclass(slots=True)
class ItlSummary:
    """The gaps between streamed chunks of one answer, in seconds."""

    count: int
    p50_s: float
    p99_s: float
    max_s: float
    std_s: float


def summarise(ordered: Sequence[float]) -> ItlSummary | None:
    """Return the summary of sorted gaps, or None when there are none."""
    if not ordered:
        return None
    n = len(ordered)
    # not the statistics module: its exact fractions cost more than all else in a request
    mean_s = math.fsum(ordered) / n
    variance = max(0.0, math.fsum(map(mul, ordered, ordered)) / n - mean_s * mean_s)
    return ItlSummary(
        count=n,
        p50_s=ordered[n // 2],
        p99_s=ordered[min(n - 1, int(n * 0.99))],
        max_s=ordered[-1],
        std_s=math.sqrt(variance),
    )


@dataclass(slots=True)
class HandoffRecord:
    """What became of one handoff, as far as the workers reported.

    Attributes:
        id: The handoff.
        outcome: ``consumed``, ``expired`` or ``failed`` from the publisher; ``cancelled``,
            ``not_published``, ``abandoned`` or ``not_needed`` (prefill ended the answer) from the
            gateway; ``unobserved`` (the engine's own transport carried it: prefill answered with
            parameters, decode answered to them, and more is not known here); ``unknown`` when
            nobody told.
        report: ``complete``, ``missing`` (no decode worker told of a load in time) or ``none``
            (nobody reports: the handoff was the engine's own transport's).
    """

    id: str
    outcome: str | None = None
    report: str = "missing"
    published_tokens: int | None = None
    publish_s: float | None = None
    bytes: int = 0
    tokens_loaded: int = 0
    tokens_local: int = 0
    tokens_recomputed: int | None = None
    transport: str | None = None
    form: str | None = None
    load_s: float | None = None
    problem: str | None = None


@dataclass(slots=True)
class FailureRecord:
    """One failed call to a worker."""

    worker: str
    side: str
    kind: str
    detail: str


@dataclass(slots=True)
class RequestRecord:
    """Everything told of one request; times in seconds.

    The load is what the gateway knew when it sent the call, without this request: what a scheduler
    could have known. It changes while a request runs, so it is a sign and no mean.

    Attributes:
        arm: Of a canary; None without one.
        tpot_by: ``tokens``, or ``pieces`` where nobody told how many tokens the answer has: a piece
            of a stream then counts as one.
        split: ``yes``: decode took KV over. ``unobserved``: see ``HandoffRecord``. ``no``, or
            ``no: `` and why, for any other.
        ended_by_prefill: Whether the prefill worker's own answer was all of it: nothing was to be
            handed over.
        hedge: How a second call for the answer ended: ``won`` (it answered), ``lost``, ``failed``;
            None: there was none.
        sent_s: From arrival to the first call.
        prefill_queued_tokens: Prompt tokens to be read before, on the worker that reads the prompt.
        prefill_requests: Requests in flight on the prefill worker of a split request.
        prefill_cached_tokens: Prompt tokens that the reading worker was believed to hold.
        decode_requests: Requests in flight on the decode worker.
        decode_kv_tokens: KV tokens that they hold or will.
        decode_read_tokens: Prompt tokens of other requests whose reading ended on the decode worker
            while this answer was written: each of them held it up.
    """

    request_id: str
    at_s: float
    endpoint: str
    model: str | None
    route: str
    why: str
    prefill: str | None
    decode: str
    stream: bool
    prompt_tokens_estimate: int
    prompt_tokens_by: str = "estimate"
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    status: int = 0
    outcome: str = ""
    finish: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    tpot_by: str = "tokens"
    e2e_s: float | None = None
    prefill_s: float | None = None
    itl: ItlSummary | None = None
    handoff: HandoffRecord | None = None
    split: str = "no"
    ended_by_prefill: bool = False
    retries: int = 0
    resumes: int = 0
    not_resumed: str | None = None
    hedge: str | None = None
    failures: list[FailureRecord] = field(default_factory=list)
    client_gone: bool = False
    queue_s: float = 0.0
    sent_s: float | None = None
    prefill_queued_tokens: int = 0
    prefill_requests: int = 0
    prefill_cached_tokens: int = 0
    decode_requests: int = 0
    decode_kv_tokens: int = 0
    decode_read_tokens: int = 0
    arm: str | None = None
    gaps_s: list[float] | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the record as plain values; gaps become their summary."""
        self.summarise_gaps()
        plain: dict[str, object] = msgspec.to_builtins(self)
        del plain["gaps_s"]
        return plain

    def line(self) -> bytes:
        """Return ``as_dict`` as JSON, without making the dictionary."""
        self.summarise_gaps()
        return msgspec.json.encode(self).removesuffix(_NO_GAPS) + b"}"

    def summarise_gaps(self) -> None:
        """Turn the gaps into their summary, once."""
        gaps_s = self.gaps_s
        if gaps_s is not None:  # two threads may be here at once: then both find the same
            self.itl = summarise(gaps_s)
            self.gaps_s = None


RECORD_KEYS = tuple(f.name for f in fields(RequestRecord) if f.name != "gaps_s")
_RECORD_KEYS = frozenset(RECORD_KEYS)


class RecordView(Mapping[str, object]):
    """A record as plain values, made when they are asked for; nothing can be changed through it.

    ``as_dict`` costs as much as all plugins that want two numbers of it.
    """

    __slots__ = ("_record",)

    def __init__(self, record: RequestRecord) -> None:
        self._record = record

    def __getitem__(self, key: str) -> object:
        if key not in _RECORD_KEYS:
            raise KeyError(key)
        if key == "itl":
            self._record.summarise_gaps()
        value: object = getattr(self._record, key)
        if value is None or isinstance(value, (str, int, float)):
            return value
        return msgspec.to_builtins(value)

    def get(self, key: str, default: object = None) -> object:
        """Return a value without an exception for what is absent."""
        return self[key] if key in _RECORD_KEYS else default

    def __contains__(self, key: object) -> bool:
        return key in _RECORD_KEYS

    def __iter__(self) -> Iterator[str]:
        return iter(RECORD_KEYS)

    def __len__(self) -> int:
        return len(RECORD_KEYS)

    def __repr__(self) -> str:
        return f"RecordView({dict(self)!r})"


class RecordFile:
    """A file of JSON lines, appended to, readable by its owner only.

    ``add`` and ``flush_soon`` are called on the event loop and never wait for the disk; ``flush``
    and ``close`` on any other thread. A disk may stall without an end, so writing in the background
    has a daemon thread of its own, one at a time: nothing that must end ever waits for it.

    Raises:
        ConfigError: The file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(
                f"cannot write records to {path}: {exc.strerror}",
                key="telemetry.records",
                fix="name a file in a directory that this user may write to",
            ) from exc
        self._pending: deque[RequestRecord] = deque()
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None
        self._starting = threading.Lock()  # the loop starts writers, another thread closes
        self._closed = False
        self.dropped = 0
        self.written = 0

    def add(self, record: RequestRecord) -> bool:
        """Take a record; False when too many wait for the disk."""
        if self._closed or len(self._pending) >= MAX_PENDING:
            self.dropped += 1
            return False
        self._pending.append(record)
        return True

    def flush(self) -> None:
        """Write what is pending; a disk that is full loses records, never requests."""
        with self._lock:
            lines = []
            while self._pending:
                record = self._pending.popleft()
                try:
                    lines.append(record.line())
                except Exception:  # one record that cannot be written must not cost the others
                    log.exception("the record of request %s is lost", record.request_id)
                    self.dropped += 1
            if not lines or self._fd < 0:
                return
            data = memoryview(b"\n".join(lines) + b"\n")
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
                self.written += len(lines)
            except OSError:
                self.dropped += len(lines)

    def flush_soon(self) -> bool:
        """Write what is pending in the background; False while an earlier flush still writes."""
        if self._closed or not self._pending:
            return True
        return self._in_background(self.flush)

    def _in_background(self, work: Callable[[], object]) -> bool:
        with self._starting:
            if self._writer is not None and self._writer.is_alive():
                return False
            writer = threading.Thread(target=work, name="records", daemon=True)
            writer.start()
            self._writer = writer
            return True

    def _join(self, wait_s: float) -> None:
        with self._starting:
            writer = self._writer
        if writer is not None:
            writer.join(max(0.0, wait_s))

    def close(self, wait_s: float = CLOSE_S) -> bool:
        """Write the rest and close, within ``wait_s``; idempotent.

        Returns:
            False when the disk did not take the rest in time; it is then given up.
        """
        end_s = time.monotonic() + wait_s
        first, self._closed = not self._closed, True
        if not first and self._fd >= 0:
            return False
        self._join(wait_s)
        while not self._in_background(self._finish) and time.monotonic() < end_s:
            self._join(end_s - time.monotonic())  # a flush was being started meanwhile
        self._join(end_s - time.monotonic())
        return self._fd < 0

    def _finish(self) -> None:
        self.flush()
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
