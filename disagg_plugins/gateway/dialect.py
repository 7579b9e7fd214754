"""What the gateway asks of an engine's adapter: how a handoff is spelled in its HTTP bodies.

A dialect is pure: bodies in, bodies out. The gateway never looks into engine-specific fields.
Bodies are JSON objects; a dialect returns new ones and leaves its arguments as they are. Of a
client's body ``get`` and ``[]`` give plain values; ``items`` and copies give what the client sent,
undecoded, so that a copy passes it on byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.types import Family, HandoffId, Role, Worker

Body = dict[str, object]
"""A JSON object."""


@dataclass(frozen=True, slots=True)
class HandoffRef:
    """One handoff as the HTTP requests of both sides name it.

    Attributes:
        handoff_id: Minted by the gateway before anything is sent.
        ticket: The signed record that lets the decode side claim the handoff.
        prefill: The worker that reads the prompt.
        decode: The worker that writes the answer.
        endpoints: Where the ranks of the prefill worker serve KV, as it said itself; empty where
            it has not said so.
    """

    handoff_id: HandoffId
    ticket: str
    prefill: Worker
    decode: Worker
    endpoints: tuple[Mapping[str, object], ...] = ()

    @property
    def room(self) -> int:
        """The id as a positive 63-bit integer, for engines whose handoff ids are numbers."""
        return int(self.handoff_id[:16], 16) & ((1 << 63) - 1)

    @property
    def address(self) -> str:
        """``host:port`` of the prefill worker."""
        return self.prefill.url.removeprefix("http://")


@dataclass(frozen=True, slots=True)
class Opening:
    """What prefill wrote of an answer, for decode to go on from.

    Attributes:
        prompt: The ids of the prompt.
        token: The id of the answer's first token.
        text: What that token says.
    """

    prompt: list[int]
    token: int
    text: str


@dataclass(frozen=True, slots=True)
class Published:
    """What a prefill worker's answer says of the handoff, whatever its engine (relay).

    Attributes:
        num_tokens: Prompt tokens published.
        endpoints: Where its ranks serve KV, as ``handoff.endpoints`` writes them.
        prompt: Digest of the prompt (``handoff.prompts``); empty where the answer does not tell.
        first_token: The token that prefill sampled; -1 where the answer does not tell. A decode
            worker that samples it itself needs none.
        opaque: Fields that only the same engine understands.
        answer: The client's whole answer, where prefill has ended it: nobody has to decode.
        opening: The beginning of it, where decode is to go on from there.
    """

    num_tokens: int
    endpoints: tuple[Mapping[str, object], ...]
    prompt: str = ""
    first_token: int = -1
    opaque: Mapping[str, object] = field(default_factory=dict)
    answer: Body | None = None
    opening: Opening | None = None


class Dialect(Protocol):
    """How one engine spells the two requests of a handoff."""

    engine: str
    family: Family
    """Between two workers of this engine. Workers of two engines relay."""
    decode_is_whole: bool
    """Whether a decode worker of this engine can also serve a request without a handoff."""
    answers_endpoints: bool
    """Whether a prefill worker's answer says where it serves KV; its hello does where not."""

    def unsplittable(self, body: Body) -> str | None:
        """Return why the request of ``body`` cannot be split, or None when it can."""
        ...

    def unsplittable_across(self, body: Body) -> str | None:
        """Return why this engine cannot go on with what another engine's prefill began, or None."""
        ...

    def local_body(self, body: Body) -> Body:
        """Return the body for a worker that does the whole request.

        Whatever a client put there to reach the KV path is gone. Returns ``body`` itself when
        nothing has to change.
        """
        ...

    def prefill_body(self, body: Body, ref: HandoffRef) -> Body:
        """Return the body for the prefill worker; its answer is never streamed."""
        ...

    def published(self, answer: Body, ref: HandoffRef) -> Published:
        """Return what the prefill worker's answer says of the handoff (relay only).

        Raises:
            RemoteProtocolError: The answer carries no parameters of a handoff, or false ones: the
                split is configured but does not happen.
        """
        ...

    def decode_body(self, body: Body, ref: HandoffRef, published: Published | None) -> Body:
        """Return the body for the decode worker.

        Args:
            body: The client's body.
            ref: The handoff.
            published: What the prefill side's ``published`` returned; None in the rendezvous
                family.
        """
        ...

    def role_switch(self, role: Role) -> tuple[str, Body] | None:
        """Return path and body of the request by which a running server takes ``role``.

        None: the engine's servers do both phases all the time, or cannot be told.
        """
        ...


@runtime_checkable
class ResumingDialect(Protocol):
    """What a dialect adds whose engine can go on with an answer that another worker began.

    The gateway asks a dialect without these methods for nothing: its streams break off.
    """

    def unresumable(self, body: Body, *, chat: bool) -> str | None:
        """Return why an answer to ``body`` could not go on as if nothing had been, or None."""
        ...

    def output_bound(self, body: Body, *, chat: bool) -> int | None:
        """Return how many tokens the answer to ``body`` has at most, or None: no fixed number."""
        ...

    def resumable_body(self, body: Body) -> Body:
        """Return a body, for either kind of decode call, that also asks for token ids."""
        ...

    def resume_body(self, body: Body, prompt: list[int], ids: list[int], *, chat: bool) -> Body:
        """Return the body that asks a whole worker for what follows ``ids``.

        Args:
            body: The client's body.
            prompt: The ids of the prompt.
            ids: The ids of the answer so far.
            chat: Whether the request is one for a chat completion.

        Raises:
            LocalProtocolError: The answer has reached its bound.
        """
        ...


@runtime_checkable
class AnnouncingDialect(Protocol):
    """What a dialect adds whose engine hides a request's fields from the adapter.

    Before each of the two calls of a handoff the gateway tells the worker's adapter what it has to
    know (``gateway/announcing.py``), at the address that the adapter named in its hello.
    """

    def announcement(
        self, step: Literal["prefill", "decode"], ref: HandoffRef, published: Published | None
    ) -> Body:
        """Return what the adapter of the worker for ``step`` is told, ticket included."""
        ...


@runtime_checkable
class OpeningDialect(Protocol):
    """What an announcing dialect adds whose decode goes on from the token that prefill wrote.

    Where the gateway means to do so, it says so in the prefill's announcement (``opening``), and
    asks the prefill worker's adapter for the token ids once its engine has answered. Without them
    the decode worker gets the prompt alone.
    """

    def opens(self, body: Body, *, chat: bool) -> bool:
        """Return whether an answer to ``body`` can be put together from two."""
        ...

    def question(self, ref: HandoffRef) -> Body:
        """Return what the adapter of the prefill worker is asked."""
        ...

    def opening(self, told: Body, answer: Body) -> Opening:
        """Return the beginning of the answer.

        Args:
            told: What the adapter said.
            answer: What the engine had answered.

        Raises:
            RemoteProtocolError: Together they do not tell it.
        """
        ...

    def continued_body(self, body: Body, ref: HandoffRef, opening: Opening) -> Body:
        """Return the body that asks the decode worker for what follows."""
        ...


def crosses(dialect: Dialect) -> bool:
    """Return whether an engine hands over to others; one that does not says ``crosses = False``."""
    return bool(getattr(dialect, "crosses", True))


def pair_family(prefill: Dialect, decode: Dialect) -> Family:
    """Return how two workers meet: their engine's own way, or by relay between two engines."""
    return decode.family if prefill.engine == decode.engine else "relay"


def tells_endpoints(prefill: Dialect, decode: Dialect) -> bool:
    """Return whether the prefill worker's answer will say where it serves KV."""
    return pair_family(prefill, decode) == "relay" and prefill.answers_endpoints


_announcing: dict[type, bool] = {}


def announcing(dialect: Dialect | None) -> AnnouncingDialect | None:
    """Return the dialect if its workers are told of handoffs before they are called, else None."""
    kind = type(dialect)
    if kind not in _announcing:
        _announcing[kind] = isinstance(dialect, AnnouncingDialect)
    return cast("AnnouncingDialect", dialect) if _announcing[kind] else None


_opening: dict[type, bool] = {}


def opening(dialect: Dialect | None) -> OpeningDialect | None:
    """Return the dialect if its decode can go on from what prefill wrote, else None."""
    kind = type(dialect)
    if kind not in _opening:
        _opening[kind] = isinstance(dialect, OpeningDialect)
    return cast("OpeningDialect", dialect) if _opening[kind] else None


_resuming: dict[type, bool] = {}


def resuming(dialect: Dialect | None) -> ResumingDialect | None:
    """Return the dialect if its engine can go on with an answer, else None.

    What a class can do is looked at once: to look at a protocol takes as long as a hash of a page.
    """
    kind = type(dialect)
    if kind not in _resuming:
        _resuming[kind] = isinstance(dialect, ResumingDialect)
    return cast("ResumingDialect", dialect) if _resuming[kind] else None
