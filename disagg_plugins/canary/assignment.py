"""Which arm a request goes to, and which rule said so (pure).

In this order; the first that applies decides:

1. an override: a header that names the arm and proves that a holder of the fleet's secret made it
   (see ``override``); it is for testers;
2. the rules of the policy, in their order;
3. the weight: each key has a place from 0 to 100, and the candidate gets those below its weight.

What names an arm that does not serve is passed over, so nobody reaches a candidate that was rolled
back. Only what the weight decided is evidence (``Assignment.random``): who follows a rule was
chosen by somebody, and the two arms would be compared by their users.

A place is a hash of the key under a key that all gateways derive from the fleet's secret and the
salt of the rollout. So gateways agree without a word, no client can look for a session that gets
what it likes, and the next rollout tries its luck on other users. With two arms this is rendezvous
hashing: where the weight grows, keys move to the candidate and none away from it, no more of them
than the weight grew by.

Where a request lacks what is sticky, ``FALLBACK`` has the next best. A tenant never stands in for
anything: one may send most of the requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from disagg_plugins.canary.metrics import ARMS, Arm
from disagg_plugins.canary.override import OVERRIDE_HEADER, MintedBy, read_override
from disagg_plugins.errors import AuthenticationError
from disagg_plugins.handoff.keys import Purpose, derive_key, sign

Sticky = Literal["session", "user", "tenant", "prefix", "request"]
By = Literal["override", "rule", "only arm", "session", "user", "tenant", "prefix", "request"]

FALLBACK: Mapping[Sticky, tuple[Sticky, ...]] = {
    "session": ("session", "user", "request"),
    "user": ("user", "session", "request"),
    "tenant": ("tenant", "user", "session", "request"),
    "prefix": ("prefix", "session", "user", "request"),
    "request": ("request",),
}
"""What decides for each kind of stickiness; a request always has an id."""

PLACES = 1 << 64
"""Of a hash: 8 bytes, so no weight that anybody writes is rounded."""

PREFIX_CHARS = 1024
PREFIX_TOKENS = 256
"""Of a prompt, where prefixes are sticky: as long as most system prompts, and some blocks of KV.
Requests with one long system prompt are all of one prefix, and go to one arm."""

MOST_SALT = 256


@dataclass(frozen=True, slots=True)
class Match:
    """One rule: what a request must have, and where it goes; None: anything will do.

    Args:
        header: Name in lower case, and value.
    """

    arm: Arm
    model: str | None = None
    tenant: str | None = None
    header: tuple[str, str] | None = None

    def fits(self, subject: Subject) -> bool:
        """Return whether all that is named fits."""
        if self.model is not None and subject.model != self.model:
            return False
        if self.tenant is not None and subject.tenant != self.tenant:
            return False
        return self.header is None or subject.headers.get(self.header[0]) == self.header[1]


@dataclass(frozen=True, slots=True)
class Subject:
    """What of a request may decide.

    Args:
        request_id: Unique; one that comes again with the same id goes to the same arm.
        user: OpenAI's ``user``.
        prefix: See ``prefix_of``.
        headers: By names in lower case; those of ``Assigner.headers`` are enough.
    """

    request_id: str
    model: str | None = None
    tenant: str | None = None
    user: str | None = None
    session: str | None = None
    prefix: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a request goes, and why.

    Attributes:
        by: What decided. ``only arm``: the other does not serve.
        weight: Of the candidate, in percent.
        rule: Which of the policy's rules, from 0; None: another cause decided.
        place: From 0 to 100; below the weight lies the candidate. None: it was not asked.
        refused: Why an override was not honoured, or None.
    """

    arm: Arm
    by: By
    weight: float
    rule: int | None = None
    place: float | None = None
    refused: str | None = None

    @property
    def random(self) -> bool:
        """Whether chance decided, so that the request is evidence."""
        return self.place is not None

    def __str__(self) -> str:
        return self.words

    @property
    def words(self) -> str:
        """Return it in words, for records and explanations; no key of a request is told."""
        if self.rule is not None:
            why = f"canary.rules[{self.rule}]"
        elif self.place is not None:
            side = "below" if self.arm == "candidate" else "not below"
            why = f"by {self.by}, at {self.place:.4g} {side} {self.weight:g} %"
        else:
            why = {"override": "the client asked for it"}.get(self.by, "the other does not serve")
        passed = f"; override not honoured: {self.refused}" if self.refused else ""
        return f"{self.arm}: {why}{passed}"


class Assigner:
    """Assigns the requests of one rollout; gateways with the same arguments agree.

    Args:
        secret: The fleet's secret.
        salt: Of the rollout: what all gateways know of it and no other rollout has.
        canary: Its name in the policy; overrides are for one canary.
        sticky: What stays at one arm.
        rules: The first that fits rules.

    Raises:
        ValueError: The salt is empty or longer than 256 characters.
        ConfigError: The secret is too short.
    """

    def __init__(
        self,
        secret: bytes,
        salt: str,
        *,
        canary: str = "default",
        sticky: Sticky = "session",
        rules: Sequence[Match] = (),
    ) -> None:
        if not 0 < len(salt) <= MOST_SALT:
            raise ValueError(f"a salt has 1 to {MOST_SALT} characters, not {len(salt)}")
        self._minted = MintedBy(secret, canary)
        self._key = sign(derive_key(secret, Purpose.CANARY), b"place", salt.encode())
        self._order = FALLBACK[sticky]
        self._rules = tuple(rules)
        named = {rule.header[0] for rule in rules if rule.header is not None}
        self.headers = frozenset({OVERRIDE_HEADER, *named})
        """The headers that may decide."""

    def assign(
        self,
        subject: Subject,
        weight: float,
        now_s: float,
        serving: Sequence[Arm] = ARMS,
    ) -> Assignment:
        """Return the arm of a request.

        Args:
            subject: The request.
            weight: The candidate's, from 0 to 100 percent.
            now_s: Wall-clock time, which overrides end at.
            serving: The arms that take requests; at least one.

        Raises:
            ValueError: The weight is none, or no arm serves.
        """
        if not 0.0 <= weight <= 100.0:
            raise ValueError(f"a weight lies between 0 and 100 percent, not at {weight!r}")
        if not serving:
            raise ValueError("no arm serves")
        refused = None
        if asked := subject.headers.get(OVERRIDE_HEADER):
            try:
                arm = read_override(self._minted, asked, now_s)
                if arm in serving:
                    return Assignment(arm, "override", weight)
                refused = f"the {arm} does not serve"
            except AuthenticationError as exc:
                refused = str(exc)
        for number, rule in enumerate(self._rules):
            if rule.arm in serving and rule.fits(subject):
                return Assignment(rule.arm, "rule", weight, rule=number, refused=refused)
        if len(serving) == 1:
            return Assignment(serving[0], "only arm", weight, refused=refused)
        by, place = self._place(subject)
        arm = "candidate" if place < int(weight / 100.0 * PLACES) else "baseline"
        return Assignment(arm, by, weight, place=100.0 * place / PLACES, refused=refused)

    def _place(self, subject: Subject) -> tuple[Sticky, int]:
        for kind in self._order:
            name = subject.request_id if kind == "request" else getattr(subject, kind)
            if name:
                return kind, hash_place(self._key, kind, name)
        raise ValueError("a request has no id")


def hash_place(key: bytes, kind: str, name: str) -> int:
    """Return a place in [0, ``PLACES``), as good as random to who lacks the key."""
    text = f"{kind}\0{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=key).digest(), "big")


def prefix_of(prompt: str | Sequence[int]) -> str | None:
    """Return what stands for the beginning of a prompt, or None where the prompt is too short.

    A text and the tokens of the same text have unlike ones.
    """
    if isinstance(prompt, str):
        if len(prompt) < PREFIX_CHARS:
            return None
        data = b"text" + prompt[:PREFIX_CHARS].encode("utf-8", "surrogatepass")
    elif len(prompt) < PREFIX_TOKENS:
        return None
    else:
        data = b"ids" + b",".join(b"%d" % token for token in prompt[:PREFIX_TOKENS])
    return hashlib.blake2b(data, digest_size=16).hexdigest()
