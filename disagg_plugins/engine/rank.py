"""One rank's part in handoffs: what it publishes, where it serves that, and how it loads.

An adapter makes one ``Rank`` for each rank of its engine, publishes through ``store`` and loads
through ``reader``. The rank introduces its worker to the gateway and reports what happens.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError
from disagg_plugins.handoff.choice import choose_transport
from disagg_plugins.handoff.endpoints import local_host_id, to_json
from disagg_plugins.handoff.fingerprint import (
    chat_template_identity,
    model_folder,
    tokenizer_identity,
)
from disagg_plugins.handoff.interfaces import Endpoint, Identity, Listener, Transport, Unpack
from disagg_plugins.handoff.publications import PublicationStore
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.plugins import PluginHost

if TYPE_CHECKING:
    from disagg_plugins.engine.settings import WorkerSettings
    from disagg_plugins.types import HandoffEvent, HandoffPair

logger = logging.getLogger(__name__)

ENDS = ("consumed", "expired", "failed")
"""Steps that end a publication."""


@dataclass(frozen=True, slots=True)
class TextIdentity:
    """How a worker turns requests into token ids.

    Attributes:
        tokenizer: See ``fingerprint.tokenizer_identity``.
        chat_template: See ``fingerprint.chat_template_identity``.
    """

    tokenizer: str
    chat_template: str

    @classmethod
    def of(cls, tokenizer: str, revision: str | None, override: str | None) -> TextIdentity:
        """Return the identity of a tokenizer's folder or hub name, and a template given instead."""
        folder = model_folder(tokenizer, revision)
        return cls(tokenizer_identity(folder), chat_template_identity(folder, override))


class Rank:
    """Serves and loads for one rank; close it.

    Args:
        engine: ``vllm``, ``sglang``, ...
        identity: Which rank, with which model and layout.
        text: Digests of tokenizer and chat template, which two workers of a handoff must share.
        settings: What the engine was told.
        kv_tokens: Tokens that the engine's KV cache holds.
        unpack: Turns packed rows into plain ones; see ``PublicationStore``.
        on_event: Told each step of a publication, beside the plugins and the gateway.

    Attributes:
        store: Publications of this rank.
        listeners: What serves the store.
        endpoint: Where peers find the listeners.
        reader: Loads from peers.
        reporter: The channel to the gateway.

    Raises:
        ConfigError: No transport of the policy is installed.
    """

    def __init__(
        self,
        engine: str,
        identity: Identity,
        text: TextIdentity,
        settings: WorkerSettings,
        *,
        kv_tokens: int,
        unpack: Unpack | None = None,
        on_event: Callable[[HandoffEvent], None] | None = None,
    ) -> None:
        self.engine = engine
        self.identity = identity
        self._text = text
        self._kv_tokens = kv_tokens
        self._worker = settings.worker
        self._on_event = on_event
        policy = settings.policy.handoff
        self._preference = policy.transports
        self._host = PluginHost.load(settings.policy.plugins)
        self._host.start(settings.policy)
        self._transports = self._installed(policy.transports)
        self.reporter = settings.make_reporter()
        self.listeners: list[Listener] = []
        self.store = PublicationStore(
            identity=identity,
            arena=StagingArena(policy.staging_bytes),
            policy=policy,
            secret=settings.secret,
            unpack=unpack,
            on_event=self._event,
        )
        try:
            for transport in self._transports.values():
                self.listeners.append(
                    transport.listen(self.store, identity, secret=settings.secret, policy=policy)
                )
        except BaseException:
            self._close_listeners()
            self.store.close()
            self.reporter.close()
            raise
        addresses = {
            name: listener.address
            for name, listener in zip(self._transports, self.listeners, strict=True)
        }
        self.endpoint = Endpoint(identity.tp_rank, identity.tp_size, local_host_id(), addresses)
        self.reader = HandoffReader(
            identity=identity,
            transports=self._transports,
            policy=policy,
            secret=settings.secret,
            choose=self._choose,
        )
        self.reporter.send(self._hello())
        logger.info(
            "disagg: %s serves KV at %s, layout %s, fingerprint %s",
            identity.name,
            addresses,
            identity.layout,
            identity.fingerprint.digest(),
        )

    def close(self) -> None:
        """Stop serving and loading; bounded by the policy's time-outs."""
        self._close_listeners()
        self.reader.close()
        self.store.close()
        self.reporter.close()

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    def _installed(self, names: Sequence[str]) -> dict[str, Transport]:
        there = self._host.transports()
        for name in names:
            if name not in there:
                logger.warning("disagg: handoff.transports names %r, which is not installed", name)
        found = {name: transport for name, transport in there.items() if name in names}
        if not found:
            raise ConfigError(
                f"none of {list(names)} is installed",
                key="handoff.transports",
                fix="disagg plugins lists what is",
            )
        return found

    def _choose(self, pair: HandoffPair, offered: Sequence[str]) -> str:
        known = self._transports
        kinds = [(name, known[name].capabilities) for name in offered if name in known]
        return choose_transport(self._host, pair, kinds, self._preference)

    # Reports -------------------------------------------------------------------------------

    def _event(self, event: HandoffEvent) -> None:
        self._host.connector.on_handoff(event)
        if self._on_event is not None:
            self._on_event(event)
        if self.identity.tp_rank == 0 and event.step in ("published", *ENDS):
            self.reporter.send(self._publisher_report(event))

    def _publisher_report(self, event: HandoffEvent) -> dict[str, object]:
        if event.step == "published":
            num_tokens = int(event.detail.get("tokens", 0))
            staged_bytes = self.identity.layout.staged_bytes(num_tokens)
            return {
                "kind": "published",
                "handoff_id": event.handoff_id,
                "num_tokens": num_tokens,
                "bytes": staged_bytes * self.identity.tp_size,
                "seconds": event.detail.get("seconds", 0.0),
            }
        report: dict[str, object] = {
            "kind": "ended",
            "handoff_id": event.handoff_id,
            "outcome": event.step,
        }
        if "problem" in event.detail:
            report["problem"] = event.detail["problem"]
        return report

    def _hello(self) -> dict[str, object]:
        identity, layout = self.identity, self.identity.layout
        return {
            "kind": "hello",
            "worker": self._worker,
            "engine": self.engine,
            "tp_rank": identity.tp_rank,
            "tp_size": identity.tp_size,
            "fingerprint": identity.fingerprint.digest(),
            "model": asdict(identity.fingerprint),
            "layout": (
                f"{layout.order} {layout.packing} block {layout.block_size_tokens} {layout.dtype}"
            ),
            "tokenizer": self._text.tokenizer,
            "chat_template": self._text.chat_template,
            "endpoint": to_json([self.endpoint])[0],
            "kv_tokens": self._kv_tokens,
            "pid": os.getpid(),
        }
