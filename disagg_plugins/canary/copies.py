"""Sends copies of requests to an arm, and lays the answers beside each other.

A copy goes through its arm like any request: it is routed, split and recorded there. Nobody waits
for it; it begins after its original, and is given up when its time is over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from statistics import median
from typing import TYPE_CHECKING

from disagg_plugins.canary.answer import Answer, not_comparable
from disagg_plugins.canary.case import Compared
from disagg_plugins.canary.copy_client import CopyClient
from disagg_plugins.canary.shadow import Copy, Lost, Original, Pair, Shadow
from disagg_plugins.canary.shadow_headers import ShadowHeaders
from disagg_plugins.canary.tap import Tap
from disagg_plugins.gateway.client_connection import Request
from disagg_plugins.gateway.entrance import TENANT_HEADER
from disagg_plugins.gateway.refusals import RequestError

if TYPE_CHECKING:
    from disagg_plugins.canary.front import Front
    from disagg_plugins.canary.metrics import Arm
    from disagg_plugins.canary.progress import Epoch
    from disagg_plugins.gateway.body import Body
    from disagg_plugins.telemetry.records import RequestRecord

log = logging.getLogger(__name__)

MOST_TIMES = 1_000
"""Pairs whose times are remembered."""

MOST_TAKEN = 10_000
"""Pairs between two looks, at most."""

OF_NOBODY = (TENANT_HEADER, b"")
"""A copy has no tenant: it must take nothing of what its client may have."""

NO_ANSWER = Answer()
"""Of a request whose answers may differ in any case: it has a pair of times only."""


class _Sent:
    """A pair on its way.

    Attributes:
        epoch: Of its original's arrival.
        tap: Reads the original's answer; None: the two are not compared.
        client: Gets the copy's answer; None before it is sent.
    """

    __slots__ = ("client", "copied", "copy", "epoch", "ours", "tap")

    def __init__(self, copy: Copy, epoch: Epoch, tap: Tap | None) -> None:
        self.copy, self.epoch, self.tap = copy, epoch, tap
        self.client: CopyClient | None = None
        self.ours: RequestRecord | None = None
        self.copied: RequestRecord | None = None


class Copies:
    """The copies of one gateway; all on its loop.

    Args:
        front: Whose arms answer them.
        secret: The fleet's secret.
        authorization: What copies carry as ``authorization``; None: nothing.
    """

    def __init__(self, front: Front, secret: bytes, authorization: str | None) -> None:
        shadow = front.canary.shadow
        if shadow is None:
            raise ValueError("the policy has no canary.shadow")
        self._front, self._secret = front, secret
        self._budget = shadow.budget()
        self._headers = ShadowHeaders(shadow.headers, authorization)
        self._chars_per_token = front.policy.scheduler.chars_per_token
        self._sent: dict[str, _Sent] = {}  # by the copy's id
        self._by_original: dict[str, _Sent] = {}
        self._taken: deque[tuple[Epoch, Pair | Compared]] = deque(maxlen=MOST_TAKEN)
        self.copied: Counter[Arm] = Counter()
        self.pairs = 0
        self.times: deque[tuple[float | None, float | None]] = deque(maxlen=MOST_TIMES)
        self._closed = False
        self.begin_rollout("before")

    def begin_rollout(self, salt: str) -> None:
        """Throw the dice anew; pairs on their way are given up."""
        for sent in list(self._sent.values()):
            self._cancel(sent)
        self._shadow = Shadow(self._secret, salt, self._budget, self._headers)

    @property
    def shadow(self) -> Shadow:
        """What decides which requests are copied."""
        return self._shadow

    def prompt_tokens(self, body: Body, endpoint: str, size_bytes: int) -> int:
        """Return about how many tokens a prompt has."""
        if size_bytes > self._budget.max_body_bytes:
            return 0  # not copied, so not read
        return round(size_bytes / self._chars_per_token)

    def begin(self, original: Original, request: Request, body: Body) -> Tap | None:
        """Consider a copy; return what reads the original's answer, or None."""
        if self._closed:
            return None
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in request.headers}
        front = self._front
        copy = self._shadow.consider(original, headers, time.monotonic(), front.serving)
        if copy is None:
            return None
        tap = Tap() if _comparable(body) else None
        sent = _Sent(copy, front.traffic.epoch, tap)
        self._sent[copy.name] = self._by_original[original.request_id] = sent
        asyncio.get_running_loop().call_soon(self._send, sent, request)
        return tap

    def _send(self, sent: _Sent, request: Request) -> None:
        copy = sent.copy
        if copy.name not in self._sent:  # given up meanwhile
            return
        self.copied[copy.arm] += 1
        self._front.metrics.count("disagg_shadow_copies", (copy.arm,))
        sent.client = client = CopyClient()
        headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in copy.headers]
        headers.append(OF_NOBODY)
        again = Request(b"POST", request.path, headers, request.body, True, False, copy.name)
        again.arm = f"{copy.arm}: a copy of {copy.original.request_id}"
        arm = self._front.arms[copy.arm]
        arm.once.add(copy.name)
        try:
            arm.intake.infer(again, client)
        except Exception:
            log.exception("a copy could not be sent")
            self._end(sent, self._shadow.copy_ended(copy.name, None))

    def ended(self, arm: Arm, name: str, record: RequestRecord | None) -> None:
        """A request ended, perhaps a copy or one that has a copy; None: it was refused."""
        sent = self._sent.get(name)
        if sent is not None:
            sent.copied = record
            good = record is not None and record.outcome == "ok" and sent.client is not None
            answer = sent.client.tap.answer() if good and sent.client is not None else None
            if good and sent.tap is None:
                answer = NO_ANSWER
            self._end(sent, self._shadow.copy_ended(name, answer))
            return
        sent = self._by_original.get(name)
        if sent is not None and arm == "baseline":
            sent.ours = record
            good = record is not None and record.outcome == "ok"
            ours = NO_ANSWER if sent.tap is None else sent.tap.answer()
            self._end(sent, self._shadow.original_ended(name, ours if good else None))

    def _end(self, sent: _Sent, found: Pair | Lost | None) -> None:
        """Take a pair, or give a loss up."""
        if found is None:
            return
        self._forget(sent)
        if isinstance(found, Lost):
            if found.in_flight and sent.client is not None:
                sent.client.cancel()
            if found.blamed:
                tokens = sent.copy.original.prompt_tokens
                self._taken.append((sent.epoch, Compared(sent.copy.arm, tokens, None)))
            self._front.metrics.count("disagg_shadow_lost", (sent.copy.arm,))
            return
        self.pairs += 1
        if sent.tap is not None:
            self._taken.append((sent.epoch, found))
        if sent.copy.arm == "candidate" and sent.ours is not None and sent.copied is not None:
            self.times.append(
                (
                    _ratio(sent.copied.ttft_s, sent.ours.ttft_s),
                    _ratio(sent.copied.e2e_s, sent.ours.e2e_s),
                )
            )

    def taken(self) -> list[tuple[Epoch, Pair | Compared]]:
        """Return what came together since it was last asked."""
        found = list(self._taken)
        self._taken.clear()
        return found

    def sweep(self, now_s: float) -> None:
        """Give up the pairs whose time is over."""
        for lost in self._shadow.due(now_s):
            sent = self._sent.get(lost.copy.name)
            if sent is not None:
                self._end(sent, lost)

    def close(self) -> None:
        """Send no more copies, and give up those on their way."""
        self._closed = True
        for sent in list(self._sent.values()):
            self._cancel(sent)

    def _cancel(self, sent: _Sent) -> None:
        self._forget(sent)
        if sent.client is not None:
            sent.client.cancel()

    def _forget(self, sent: _Sent) -> None:
        self._front.arms[sent.copy.arm].once.discard(sent.copy.name)
        self._sent.pop(sent.copy.name, None)
        self._by_original.pop(sent.copy.original.request_id, None)

    def median_ratios(self) -> tuple[float | None, float | None]:
        """Return the medians of the candidate's TTFT and E2E over its original's, pair by pair."""
        ttft, e2e = zip(*self.times, strict=True) if self.times else ((), ())
        return _median(ttft), _median(e2e)


def _comparable(body: Body) -> bool:
    try:
        return not_comparable(body) is None
    except RequestError:  # its worker may read what cannot be read here
        return False


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs is not None and ours else None


def _median(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
