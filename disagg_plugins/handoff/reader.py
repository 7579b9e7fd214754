"""The decode side: load a token range of one handoff into an engine.

``HandoffReader.load`` claims the handoff at every prefill rank that holds some of this rank's KV
heads, reads, and reports success only after every publisher has confirmed that the handoff was
still alive when reading was done. Anything else raises, and the engine computes the prompt itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from disagg_plugins.errors import LocalProtocolError, TransportError
from disagg_plugins.handoff.cancellation import Cancellation
from disagg_plugins.handoff.endpoints import check_complete, local_host_id
from disagg_plugins.handoff.interfaces import (
    Endpoint,
    Identity,
    LoadReport,
    Outcome,
)
from disagg_plugins.handoff.load import Load, Part, passes_rows
from disagg_plugins.handoff.pool import ChannelPool
from disagg_plugins.handoff.shards import Source, sources_of
from disagg_plugins.types import HandoffEvent, HandoffId, HandoffPair

if TYPE_CHECKING:
    from disagg_plugins.handoff.interfaces import Channel, Sink, Transport
    from disagg_plugins.policy import HandoffPolicy

logger = logging.getLogger(__name__)

Choose = Callable[[HandoffPair, Sequence[str]], str]
"""Picks one of the transports that both sides can speak, given in the policy's order."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What is claimed, and how long that may take."""

    ticket: str
    deadline_s: float
    wait_s: float = 0.0
    cancellation: Cancellation = field(default_factory=Cancellation)


class HandoffReader:
    """Loads handoffs for one decode rank. Thread-safe: loads may run side by side.

    Args:
        identity: What this rank says of itself.
        transports: Name -> transport.
        policy: Preference, time-outs and bounds.
        secret: The fleet's shared secret.
        choose: Picks the transport of a pair; None takes the first.
        on_event: Told ``loaded`` and ``failed``; what it raises is logged and dropped.
        host_id: Of this host; for tests.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        transports: Mapping[str, Transport],
        policy: HandoffPolicy,
        secret: bytes,
        choose: Choose | None = None,
        on_event: Callable[[HandoffEvent], None] | None = None,
        host_id: str | None = None,
    ) -> None:
        self._identity = identity
        self._transports = dict(transports)
        self._policy = policy
        self._secret = secret
        self._choose = choose
        self._on_event = on_event
        self._host_id = host_id or local_host_id()
        self._pool = ChannelPool(idle_s=policy.lease_s)
        self._lock = threading.Lock()
        self._fallbacks: Counter[str] = Counter()

    @property
    def fallbacks(self) -> Mapping[str, int]:
        """Transport name -> how often it could not connect and another one was tried."""
        with self._lock:
            return dict(self._fallbacks)

    def load(
        self,
        handoff_id: str,
        ticket: str,
        endpoints: Sequence[Endpoint],
        *,
        first_token: int,
        end_token: int,
        sink: Sink,
        prompt: str = "",
        started_s: float | None = None,
        wait_s: float = 0.0,
        cancellation: Cancellation | None = None,
    ) -> LoadReport:
        """Load tokens ``[first_token, end_token)`` into ``sink``; blocks the calling thread.

        Rows move as they are when both layouts are equal and ``first_token`` lies on a block
        boundary, else tokens move in canonical form. Nothing below ``first_token`` is written.

        Args:
            handoff_id: For reports and errors; the ticket decides.
            ticket: The signed text.
            endpoints: One for each rank of the prefill worker, in order.
            first_token: First token to load.
            end_token: End of the half-open range.
            sink: Where the bytes go.
            prompt: Digest of the whole prompt (``prompts.py``). Where it is given, the handoff
                must hold exactly this prompt, and ``end_token`` is its end.
            started_s: Monotonic time from which ``handoff.load_s`` counts, where the load has
                waited before; now if None.
            wait_s: How long the handoff may still be unopened, where both workers are called at
                once; added to ``handoff.load_s``.
            cancellation: Ends the load from another thread.

        Raises:
            HandoffAborted: It was cancelled, or the publisher has ended or never opened it.
            DisaggError: Whatever went wrong; nothing that was written may be used.
        """
        started_s = time.monotonic() if started_s is None else started_s
        if not 0 <= first_token < end_token:
            raise LocalProtocolError(f"tokens [{first_token}, {end_token}) cannot be loaded")
        check_complete(endpoints)
        layout, load_s = self._identity.layout, self._policy.load_s + wait_s
        load = Load(
            handoff_id, ticket, layout, first_token, end_token, sink, load_s, started_s, prompt
        )
        if cancellation is not None:
            load.cancellation = cancellation
        try:
            self._load(load, endpoints, wait_s)
            load.cancellation.ended()
        except BaseException as exc:
            load.cancellation.ended()
            load.give_up(exc)
            self._tell(handoff_id, "failed", problem=str(exc)[:1024])
            raise
        for part in load.parts:
            self._pool.give(part.key, part.channel)
        return self._report(load)

    def release(
        self, handoff_id: str, ticket: str, endpoints: Sequence[Endpoint], *, failed: str = ""
    ) -> None:
        """End a handoff that will not be read, so that its publisher need not wait for the lease.

        Args:
            handoff_id: For reports and errors; the ticket decides.
            ticket: The signed text.
            endpoints: One for each rank of the prefill worker, in order.
            failed: Why it ends as failed; empty when its content is simply not needed.

        Raises:
            DisaggError: A publisher could not be told; its lease ends the handoff.
        """
        check_complete(endpoints)
        deadline_s = time.monotonic() + self._policy.load_s
        outcome = Outcome.FAILED if failed else Outcome.CONSUMED
        for source in self._sources(endpoints):
            claim = _Claim(ticket, deadline_s)
            part = self._claim(source, endpoints[source.tp_rank], claim, 1)
            try:
                part.channel.end(outcome, failed)
            except BaseException:
                part.channel.close()
                raise
            self._pool.give(part.key, part.channel)
        logger.debug("handoff %s was released unread (%s)", handoff_id, outcome.value)

    def close(self) -> None:
        """Close the idle channels; loads that still run close theirs when they end."""
        self._pool.close()

    def _load(self, load: Load, endpoints: Sequence[Endpoint], wait_s: float) -> None:
        """Claim at every rank that holds some of the heads, then read everything."""
        claim = _Claim(load.ticket, load.deadline_s, wait_s, load.cancellation)
        try:
            for source in self._sources(endpoints):
                load.check_time()
                endpoint = endpoints[source.tp_rank]
                load.add(self._claim(source, endpoint, claim, load.end_token - load.first_token))
            load.read_all()
        except TransportError:
            load.cancellation.check(load.handoff_id)  # channels that it shut only look lost
            raise

    def _report(self, load: Load) -> LoadReport:
        report = LoadReport(
            HandoffId(load.handoff_id),
            "+".join(sorted({part.key[0] for part in load.parts})),
            load.form,
            load.end_token - load.first_token,
            load.payload_bytes,
            time.monotonic() - load.started_s,
            load.result,
            load.parts[0].offer.prompt if load.parts else "",
        )
        self._tell(
            load.handoff_id,
            "loaded",
            tokens=report.num_tokens,
            bytes=report.payload_bytes,
            seconds=report.seconds,
            transport=report.transport,
            form=report.form,
        )
        return report

    def _sources(self, endpoints: Sequence[Endpoint]) -> tuple[Source, ...]:
        return sources_of(
            self._identity.tp_rank,
            decode_size=self._identity.tp_size,
            prefill_size=len(endpoints),
            num_kv_heads=self._identity.layout.num_kv_heads,
        )

    def _claim(self, source: Source, endpoint: Endpoint, claim: _Claim, num_tokens: int) -> Part:
        """Claim at one rank; a kept channel that turns out dead is replaced once."""
        names = self._ordered(endpoint, num_tokens)
        last: TransportError | None = None
        for name in names:
            key = (name, endpoint.addresses[name])
            kept = self._pool.take(key)
            if kept is not None:
                try:
                    return self._claim_on(kept, key, source, claim)
                except TransportError as exc:
                    if claim.cancellation.cancelled:
                        raise
                    logger.info("a kept channel was dead, connecting anew: %s", str(exc))
            try:
                channel = self._connect(*key)
            except TransportError as exc:
                last = exc
                with self._lock:
                    self._fallbacks[name] += 1
                logger.warning("transport %s cannot connect: %s", name, str(exc))
                continue
            return self._claim_on(channel, key, source, claim)
        raise last or TransportError("+".join(names), "no transport could connect")

    def _connect(self, name: str, address: str) -> Channel:
        """Connect; where rows are read in the publisher's memory, as one who takes its layout.

        What form a publisher offers follows from the layout that a claim names, and rows of any
        plain layout are converted here (``Load``) for a third of what sending them costs.
        """
        transport = self._transports[name]
        channel = transport.connect(
            address, self._identity, secret=self._secret, policy=self._policy
        )
        peer = getattr(channel, "peer", None)
        if not isinstance(peer, Identity) or peer.layout == self._identity.layout:
            return channel
        if not passes_rows(channel, peer.layout):
            return channel
        channel.close()
        identity = replace(self._identity, layout=peer.layout)
        return transport.connect(address, identity, secret=self._secret, policy=self._policy)

    def _claim_on(
        self, channel: Channel, key: tuple[str, str], source: Source, claim: _Claim
    ) -> Part:
        try:
            claim.cancellation.watch(channel)
            within_s = claim.deadline_s - time.monotonic()
            offer = channel.claim(claim.ticket, within_s=within_s, wait_s=claim.wait_s)
        except BaseException:
            claim.cancellation.forget(channel)
            channel.close()
            raise
        return Part(source, channel, key, offer)

    def _ordered(self, endpoint: Endpoint, num_tokens: int) -> list[str]:
        """Return the usable transports, the chosen one first."""
        same_host = endpoint.host_id == self._host_id
        usable = [
            name
            for name in self._policy.transports
            if name in self._transports
            and name in endpoint.addresses
            and self._reaches(name, same_host=same_host)
        ]
        if not usable:
            raise TransportError(
                "none",
                f"prefill rank {endpoint.tp_rank} offers {', '.join(endpoint.addresses)}; this "
                f"side has {', '.join(self._transports) or 'none'} in handoff.transports "
                f"({'same' if same_host else 'another'} host)",
            )
        if self._choose is None or len(usable) == 1:
            return usable
        layout = self._identity.layout
        heads = layout.num_kv_heads_local
        digest = self._identity.fingerprint.digest()
        pair = HandoffPair(
            same_host=same_host,
            # Only equal fingerprints pass the handshake, so this is the one it must have.
            prefill_fingerprint=digest,
            decode_fingerprint=digest,
            payload_bytes=layout.num_layers * layout.canonical_bytes(num_tokens, heads),
        )
        chosen = self._choose(pair, usable)
        return sorted(usable, key=lambda name: name != chosen)

    def _reaches(self, name: str, *, same_host: bool) -> bool:
        capabilities = self._transports[name].capabilities
        return capabilities.same_host if same_host else capabilities.cross_host

    def _tell(self, handoff_id: str, step: str, **detail: str | int | float) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(HandoffEvent(HandoffId(handoff_id), step, time.time(), detail))
        except Exception:
            logger.exception("on_event failed at step %s of handoff %s", step, handoff_id)
