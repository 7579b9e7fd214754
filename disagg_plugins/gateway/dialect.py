"""What the gateway asks of an engine's adapter: how a handoff is spelled in its HTTP bodies.

A dialect is pure: bodies in, bodies out. The gateway never looks into engine-specific fields.
Bodies are JSON objects; a dialect returns new ones and leaves its arguments as they are. Of a
client's body ``get`` and ``[]`` give plain values; ``items`` and copies give what the client sent,
undecoded, so that a copy passes it on byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from disagg_plugins.types import Family, HandoffId, Worker

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
    """

    handoff_id: HandoffId
    ticket: str
    prefill: Worker
    decode: Worker

    @property
    def room(self) -> int:
        """The id as a positive 63-bit integer, for engines whose handoff ids are numbers."""
        return int(self.handoff_id[:16], 16) & ((1 << 63) - 1)

    @property
    def address(self) -> str:
        """``host:port`` of the prefill worker."""
        return self.prefill.url.removeprefix("http://")


class Dialect(Protocol):
    """How one engine spells the two requests of a handoff."""

    engine: str
    family: Family

    def unsplittable(self, body: Body) -> str | None:
        """Return why the request of ``body`` cannot be split, or None when it can."""
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

    def handoff_params(self, answer: Body) -> Body:
        """Return what the prefill worker's answer says of the handoff (relay only).

        Raises:
            RemoteProtocolError: The answer carries no parameters of a handoff, or false ones: the
                split is configured but does not happen.
        """
        ...

    def decode_body(self, body: Body, ref: HandoffRef, params: Body | None) -> Body:
        """Return the body for the decode worker.

        Args:
            body: The client's body.
            ref: The handoff.
            params: What ``handoff_params`` returned; None in the rendezvous family.
        """
        ...


def pair_problem(prefill: Dialect | None, decode: Dialect | None) -> str | None:
    """Return why two workers with these dialects cannot share a handoff, or None."""
    if prefill is None or decode is None:
        return "no dialect is installed for the engine of one of the two workers"
    if prefill.engine != decode.engine or prefill.family != decode.family:
        return (
            f"handoffs from {prefill.engine} ({prefill.family}) to {decode.engine} "
            f"({decode.family}) are not supported in this release"
        )
    return None
