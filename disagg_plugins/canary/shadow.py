"""Copies of requests whose answers nobody gets: which, how many, and in pairs (sans-IO).

A copy goes to the candidate, or once more to the baseline: chance decides, and what the second kind
shows is what the first is measured by (``parity``). No client waits for a copy or pays for it with
more than the load, so that is bounded: a share of the requests, so many at once, so many a second.
What does not fit is not copied, and counted by its reason; nothing ever waits for its turn. A copy
is sent once, at the same time as its original: no retry, no hedge, no second worker.

The gateway's part, for each request that goes to the baseline::

    made = shadow.consider(original, headers, now_s)     # None: no copy
    if made is not None: carrier.start(made, body)
    ...
    ended = shadow.original_ended(request_id, answer)    # None: its client left, or it failed
    ended = shadow.copy_ended(made.name, answer)         # None: it failed
    for ended in shadow.due(now_s): ...                  # by a timer: at next_due_s()

and with each ``ended``: a ``Pair`` to compare, or ``Lost``; its copy is cancelled if ``in_flight``.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from disagg_plugins.canary.assignment import PLACES, hash_place
from disagg_plugins.canary.metrics import ARMS, Arm
from disagg_plugins.handoff.keys import Purpose, derive_key, sign

if TYPE_CHECKING:
    from disagg_plugins.canary.answer import Answer
    from disagg_plugins.canary.shadow_headers import ShadowHeaders

Why = Literal[
    "not of the baseline",
    "a copy itself",
    "sent by a rule or a tester",
    "side effects",
    "too large",
    "not chosen",
    "the candidate does not serve",
    "its id is in use",
    "too many in flight",
    "too many wait for their originals",
    "too many a second",
]

HELD_PER_COPY = 4
"""Answers of copies may wait for their originals; so many for each that may be in flight."""

SHADOW_HEADER = "x-disagg-shadow"
"""Marks a copy, so that no gateway behind this one copies it again."""

ENDPOINTS = frozenset({"/v1/completions", "/v1/chat/completions"})

EFFECTS = ("store", "background", "web_search_options")
"""Fields that leave something behind, or ask somebody else."""

HANDOFFS = (
    "kv_transfer_params",
    "bootstrap_room",
    "bootstrap_host",
    "disaggregated_params",
    "session_params",
)
"""Fields of what exists once: KV that is handed off, a session that a server keeps."""


def side_effects(endpoint: str, body: Mapping[str, object]) -> str | None:
    """Return what a second such request would do besides answering, or None.

    Completions only read. What a client does with a tool call is not done for a copy: nobody gets
    its answer.
    """
    if endpoint not in ENDPOINTS:
        return endpoint
    for key in EFFECTS + HANDOFFS:
        value = body.get(key)
        if value is not None and value is not False:  # 0 is a room like any other
            return key
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much may be copied.

    Args:
        share: Of the requests that may be copied, above 0 to 1.
        control: Of the copies, from 0 to 1, that go to the baseline again.
        max_in_flight: Copies at once.
        max_per_s: Copies a second; as many may come at once after a pause, but one at least.
        timeout_s: Longest time of a pair from its beginning; then it is given up.
        max_body_bytes: Of a request that is copied.

    Raises:
        ValueError: One of them cannot be.
    """

    share: float
    control: float
    max_in_flight: int
    max_per_s: float
    timeout_s: float
    max_body_bytes: int

    def __post_init__(self) -> None:
        shares = 0.0 < self.share <= 1.0 and 0.0 <= self.control <= 1.0
        rates = all(0.0 < x < math.inf for x in (self.max_per_s, self.timeout_s))
        if not shares or not rates or self.max_in_flight < 1 or self.max_body_bytes < 1:
            raise ValueError(f"a budget that cannot be: {self}")


@dataclass(frozen=True, slots=True)
class Original:
    """What of a request decides whether it is copied.

    Args:
        arm: Where it goes.
        prompt_tokens: Of its prompt, as far as known; handed on to the pair.
        random: Whether chance chose its arm; testers and rules choose for reasons.
        effects: See ``side_effects``.
        is_copy: Whether it came with ``SHADOW_HEADER``.
    """

    request_id: str
    arm: Arm
    body_bytes: int
    prompt_tokens: int
    random: bool = True
    effects: str | None = None
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy to be sent, once.

    Attributes:
        name: The id of its request.
        arm: Where it goes.
        headers: All that are sent besides those of framing. One may hold a secret.
        ends_s: When its time is over, on the clock of ``consider``.
    """

    name: str
    original: Original
    arm: Arm
    headers: Sequence[tuple[str, str]]
    ends_s: float

    def __repr__(self) -> str:
        return f"Copy({self.name!r} to the {self.arm})"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to compare."""

    copy: Copy
    original: Answer
    answer: Answer


@dataclass(frozen=True, slots=True)
class Lost:
    """A pair that will never be.

    Attributes:
        copy: Cancel it where it is ``in_flight``.
        blamed: Whether its arm did not answer; if not, the original is missing, or is late.
    """

    copy: Copy
    blamed: bool
    in_flight: bool


class Carrier(Protocol):
    """What sends copies: the gateway's, for it does all I/O."""

    def start(self, copy: Copy, body: bytes) -> None:
        """Begin to send a copy to a worker of its arm, and return at once.

        ``Shadow.copy_ended`` is to be told of its end exactly once, unless it is cancelled.
        """

    def cancel(self, copy: Copy) -> None:
        """Give a copy up, and free all that it holds; one that has ended is none of it."""


@dataclass(slots=True, eq=False)
class _Held:
    copy: Copy
    in_flight: bool = True
    original: Answer | None = None
    answer: Answer | None = None


class Shadow:
    """The copies of one gateway.

    Args:
        secret: The fleet's secret, from which the dice are derived.
        salt: Of the rollout.
        budget: For this gateway.
        headers: Which of a request's headers are passed on.
    """

    def __init__(self, secret: bytes, salt: str, budget: Budget, headers: ShadowHeaders) -> None:
        self.budget = budget
        self._headers = headers
        self._key = sign(derive_key(secret, Purpose.CANARY), b"shadow", salt.encode())
        self._held: dict[str, _Held] = {}  # by the original's id, in the order of their ends
        self._names: dict[str, str] = {}  # of the copies -> the original's id
        self._burst = max(1.0, budget.max_per_s)
        self._tokens, self._filled_s = self._burst, -math.inf
        self.in_flight = 0
        self.skipped: Counter[Why] = Counter()

    def __len__(self) -> int:
        return len(self._held)

    def consider(
        self,
        original: Original,
        headers: Mapping[str, str],
        now_s: float,
        serving: Sequence[Arm] = ARMS,
    ) -> Copy | None:
        """Return the copy to be sent of a request, or None; ``skipped`` counts why.

        Args:
            original: The request.
            headers: Of the request, by names in lower case.
            now_s: Monotonic time.
            serving: The arms that take requests.
        """
        why = self._why_not(original, now_s, serving)
        if why is not None:
            self.skipped[why] += 1
            return None
        self._tokens -= 1.0
        name = self._name(original)
        passed = (*self._headers.of(headers), ("x-request-id", name), (SHADOW_HEADER, "1"))
        copy = Copy(name, original, self._arm(original), passed, now_s + self.budget.timeout_s)
        self._held[original.request_id] = _Held(copy)
        self._names[name] = original.request_id
        self.in_flight += 1
        return copy

    def _why_not(self, original: Original, now_s: float, serving: Sequence[Arm]) -> Why | None:
        budget = self.budget
        if original.is_copy:
            return "a copy itself"
        if original.arm != "baseline":
            return "not of the baseline"
        if not original.random:
            return "sent by a rule or a tester"
        if original.effects is not None:
            return "side effects"
        if original.body_bytes > budget.max_body_bytes:
            return "too large"
        if self._place(original, "share") >= budget.share:
            return "not chosen"
        # both kinds are left out then: pairs of the baseline alone would only cost
        if "candidate" not in serving or "baseline" not in serving:
            return "the candidate does not serve"
        if original.request_id in self._held:
            return "its id is in use"
        if self.in_flight >= budget.max_in_flight:
            return "too many in flight"
        if len(self._held) >= HELD_PER_COPY * budget.max_in_flight:
            return "too many wait for their originals"
        if now_s > self._filled_s:
            gained = (now_s - self._filled_s) * budget.max_per_s
            self._tokens, self._filled_s = min(self._burst, self._tokens + gained), now_s
        return "too many a second" if self._tokens < 1.0 else None

    def _arm(self, original: Original) -> Arm:
        again = self._place(original, "control") < self.budget.control
        return "baseline" if again else "candidate"

    def _place(self, original: Original, purpose: str) -> float:
        return hash_place(self._key, purpose, original.request_id) / PLACES

    def _name(self, original: Original) -> str:
        # not the original's id with an end of its own: ids have a longest length
        text = original.request_id.encode("utf-8", "surrogatepass")
        return f"shadow-{hashlib.blake2b(text, digest_size=16, key=self._key).hexdigest()}"

    def original_ended(self, request_id: str, answer: Answer | None) -> Pair | Lost | None:
        """Note the answer to a request; None: there is none, for its client left or it failed.

        Returns:
            A pair, a loss, or None: it has no copy, or that is not answered yet.
        """
        held = self._held.get(request_id)
        if held is None:
            return None
        if answer is None:
            return self._lose(held, blamed=False)
        held.original = answer
        return self._pair(held)

    def copy_ended(self, name: str, answer: Answer | None) -> Pair | Lost | None:
        """Note the answer to a copy; None: it failed. Returns as ``original_ended``."""
        request_id = self._names.get(name)
        if request_id is None:
            return None
        held = self._held[request_id]
        if not held.in_flight:
            return None
        held.in_flight = False
        self.in_flight -= 1
        if answer is None:
            return self._lose(held, blamed=True)
        held.answer = answer
        return self._pair(held)

    def due(self, now_s: float) -> list[Lost]:
        """Give up the pairs whose time is over."""
        found = []
        while self._held:
            held = next(iter(self._held.values()))
            if held.copy.ends_s > now_s:
                break
            found.append(self._lose(held, blamed=held.in_flight))
        return found

    def next_due_s(self) -> float | None:
        """Return when ``due`` has something to give up, or None."""
        return next((held.copy.ends_s for held in self._held.values()), None)

    def _pair(self, held: _Held) -> Pair | None:
        if held.original is None or held.answer is None:
            return None
        self._forget(held)
        return Pair(held.copy, held.original, held.answer)

    def _lose(self, held: _Held, *, blamed: bool) -> Lost:
        in_flight = held.in_flight
        if in_flight:
            self.in_flight -= 1
        self._forget(held)
        return Lost(held.copy, blamed, in_flight)

    def _forget(self, held: _Held) -> None:
        del self._held[held.copy.original.request_id]
        del self._names[held.copy.name]
