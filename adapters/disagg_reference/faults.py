"""What an engine gets wrong on purpose, so that tests can see who notices.

Nothing of it happens unless it is asked for by name, and then the log says so, loudly.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    from disagg_reference.hosting import Batch, ConnectorHost
    from disagg_reference.pool import KVPool
    from disagg_reference.request import Request

log = logging.getLogger(__name__)

FORMS = "slow-steps:SECONDS, crash-at-step:N, drop-transfers, corrupt-blocks:LAYER,HEAD"


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong.

    Attributes:
        slow_s: Added to each iteration.
        crash_at: Iteration at which the process kills itself; 0: never.
        drop_transfers: Nothing is published and nothing loaded, in silence.
        corrupt: Layer and KV head of which what was loaded is changed; None: none.
    """

    slow_s: float = 0.0
    crash_at: int = 0
    drop_transfers: bool = False
    corrupt: tuple[int, int] | None = None

    def check(self, *, num_layers: int, num_kv_heads: int) -> None:
        """Refuse what a model of that shape has not.

        Raises:
            ConfigError: The layer or the head to be damaged is none of its own.
        """
        if self.corrupt is None:
            return
        layer, head = self.corrupt
        if layer >= num_layers or head >= num_kv_heads:
            raise ConfigError(
                f"corrupt-blocks:{layer},{head}: the model has {num_layers} layers and "
                f"{num_kv_heads} KV heads",
                key="--fault",
                fix=f"name a layer of 0 to {num_layers - 1} and a head of 0 to {num_kv_heads - 1}",
            )

    def before_step(self, number: int) -> None:
        """Do what is due before an iteration."""
        if self.slow_s:
            time.sleep(self.slow_s)
        if number == self.crash_at:
            log.error("disagg: FAULT: the engine kills itself at iteration %d", number)
            os.kill(os.getpid(), signal.SIGKILL)


def read_faults(asked: Sequence[str]) -> Faults | None:
    """Return the faults that were asked for by ``--fault``; None: none.

    Raises:
        ConfigError: One is not known.
    """
    found: dict[str, object] = {}
    for each in asked:
        name, _, value = each.partition(":")
        try:
            if name == "slow-steps" and float(value) > 0.0:
                found["slow_s"] = float(value)
            elif name == "crash-at-step" and int(value) > 0:
                found["crash_at"] = int(value)
            elif name == "drop-transfers" and not value:
                found["drop_transfers"] = True
            elif name == "corrupt-blocks":
                layer, head = (int(number) for number in value.split(","))
                if layer < 0 or head < 0:
                    raise ValueError(each)
                found["corrupt"] = (layer, head)
            else:
                raise ValueError(each)
        except ValueError as exc:
            raise ConfigError(f"{each!r} is no fault", key="--fault", fix=FORMS) from exc
    if not found:
        return None
    log.warning("disagg: FAULTS are planted in this engine: %s", ", ".join(asked))
    return Faults(**found)  # type: ignore[arg-type]


class FaultyHost:
    """A host whose transfers fail or are damaged; everything else is the host's.

    Args:
        host: The one that works.
        pools: KV of each rank.
        faults: What goes wrong.
    """

    def __init__(self, host: ConnectorHost, pools: Sequence[KVPool], faults: Faults) -> None:
        self._host, self._pools, self._faults = host, tuple(pools), faults
        self._brought: dict[int, Request] = {}

    def match(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """See ``ConnectorHost``."""
        if self._faults.drop_transfers:
            return 0, False
        matched, parks = self._host.match(request, computed_tokens)
        if matched:
            self._brought[request.request_id] = request
        return matched, parks

    def allocated(self, request: Request, block_ids: Sequence[int]) -> None:
        """See ``ConnectorHost``."""
        if not self._faults.drop_transfers:
            self._host.allocated(request, block_ids)

    def begin(self, batch: Batch) -> None:
        """See ``ConnectorHost``; what was brought is damaged before it is first read."""
        self._host.begin(batch)
        for each in batch.scheduled:
            if self._brought.pop(each.request.request_id, None) is not None:
                self._damage(each.request)

    def _damage(self, request: Request) -> None:
        if self._faults.corrupt is None or not request.matched_tokens:
            return
        layer, head = self._faults.corrupt
        for pool in self._pools:
            pool.spoil(layer, head, request.blocks)
        log.warning("disagg: FAULT: the KV of request %d is damaged", request.request_id)

    def before_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""
        self._host.before_layer(layer)

    def after_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""
        self._host.after_layer(layer)

    def end(self) -> None:
        """See ``ConnectorHost``."""
        if not self._faults.drop_transfers:
            self._host.end()

    def cancel(self, request: Request) -> None:
        """See ``ConnectorHost``."""
        self._host.cancel(request)

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        """See ``ConnectorHost``."""
        self._brought.pop(request.request_id, None)
        return self._host.finished(request, block_ids)

    def poll(self) -> tuple[Sequence[int], Sequence[int]]:
        """See ``ConnectorHost``."""
        return self._host.poll()

    def close(self) -> None:
        """See ``ConnectorHost``."""
        self._host.close()
