"""Starting and ending a gateway."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.client_connection import ClientConnection
from disagg_plugins.gateway.dialect import HandoffRef
from disagg_plugins.gateway.parts import Parts
from disagg_plugins.gateway.server import Gateway
from disagg_plugins.gateway.token_counter import load_token_counter
from disagg_plugins.handoff.tickets import mint
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.telemetry.records import RecordFile
from disagg_plugins.types import HandoffId, Worker

if TYPE_CHECKING:
    from disagg_plugins.canary.front import Front
    from disagg_plugins.canary.trial import Trial
    from disagg_plugins.plugins import PluginHost
    from disagg_plugins.policy import Policy

log = logging.getLogger(__name__)

LEAST_TICKET_S = 1.0
"""A ticket lives at least this long, however near the request's deadline is."""

GC_YOUNG_OBJECTS = 20_000
"""Allocations between two looks of the garbage collector: about 100 requests, or 4 MiB."""

ENDING_S = 1.0
"""After draining, tasks that did not heed their cancellation are named and cancelled again."""

BACKLOG = 2048
"""Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn."""


async def serve(
    policy: Policy,
    host: PluginHost,
    *,
    secret: bytes,
    records_path: Path | None = None,
    base_dir: Path | None = None,
    tokenizer: Path | None = None,
    trial: Trial | None = None,
    ready: Callable[[Gateway], object] | None = None,
    stop: asyncio.Event,
) -> None:
    """Run a gateway until ``stop`` is set, then drain it.

    Args:
        policy: The policy.
        host: The loaded plugins.
        secret: The fleet's secret.
        records_path: Where to write records; None: nowhere.
        base_dir: Folder where relative paths of the policy start; None: the current one.
        tokenizer: The model's folder or ``tokenizer.json``; None: as the policy says.
        trial: What the policy's canary tries.
        ready: Called once the port accepts connections; of a canary with the baseline's gateway.
        stop: Set it to end; open requests get ``gateway.drain_s``.

    Raises:
        ConfigError: The policy declares a canary and no trial of it is given, the port is in use,
            the records cannot be written, or an engine of the fleet has no dialect.
    """
    _check_canary(policy, trial)
    _check_engines(policy, host)
    if trial is not None:
        _check_engines(trial.policy, trial.host)
    records = RecordFile(records_path) if records_path is not None else None
    try:
        sock = _listen(policy)
        try:
            path = tokenizer or policy.scheduler.tokenizer
            parts = parts_of(policy, host, secret, records, path, base_dir)

            def alone(tasks: asyncio.TaskGroup) -> Gateway:
                return Gateway(policy, parts, tasks)

            if trial is None or policy.canary is None:
                await _run(policy, alone, sock, ready, stop)
            else:
                with trial.opened(policy.canary, policy, secret) as join:
                    await _run(policy, lambda tasks: join(alone(tasks), tasks), sock, ready, stop)
        finally:
            sock.close()
    finally:
        if records is not None:
            records.close()


def run(
    policy: Policy,
    host: PluginHost,
    *,
    secret: bytes,
    records_path: Path | None = None,
    ready: Callable[[Gateway], object] | None = None,
) -> None:
    """Run a gateway on a fast event loop until SIGTERM or SIGINT.

    Raises:
        ConfigError: See ``serve``.
    """
    import uvloop

    async def main() -> None:
        # What is loaded by now stays: the collector need not look at it again and again. A request
        # leaves no cycles behind, so young objects may be looked at less often too.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_YOUNG_OBJECTS, 20, 20)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(policy, host, secret=secret, records_path=records_path, ready=ready, stop=stop)

    uvloop.run(main())


async def _run(
    policy: Policy,
    make: Callable[[asyncio.TaskGroup], Gateway | Front],
    sock: socket.socket,
    ready: Callable[[Gateway], object] | None,
    stop: asyncio.Event,
) -> None:
    ending = _Insisting()
    try:
        async with asyncio.TaskGroup() as tasks:
            gateway = make(tasks)
            server = await asyncio.get_running_loop().create_server(
                lambda: ClientConnection(gateway), sock=sock, backlog=BACKLOG
            )
            gateway.start()
            log.info("listening on http://%s:%d", policy.gateway.host, policy.gateway.port)
            try:
                if ready is not None:
                    ready(gateway if isinstance(gateway, Gateway) else gateway.baseline)
                await stop.wait()
            finally:
                server.close()
                try:
                    await gateway.drain()
                finally:
                    gateway.stop()
                    ending.start(gateway.running)
    finally:
        ending.stop()


class _Insisting:
    """Cancels what is left of the gateway again and again, so that its end is bounded.

    A cancellation can be lost: a task that is just being told of a time-out may take one for the
    other.
    """

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def start(self, running: Callable[[], list[asyncio.Task[None]]]) -> None:
        """Look again in ``ENDING_S`` at what is running then."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(ENDING_S, self._again, running)

    def stop(self) -> None:
        """Everything has ended."""
        if self._timer is not None:
            self._timer.cancel()

    def _again(self, running: Callable[[], list[asyncio.Task[None]]]) -> None:
        for task in running():
            log.warning("still running at the end, cancelled again: %r", task)
            task.cancel()
        self.start(running)


def _check_canary(policy: Policy, trial: Trial | None) -> None:
    """Refuse what would be configured and not happen."""
    if policy.canary is not None and trial is None:
        raise ConfigError(
            "the candidate was not given: it would get no traffic",
            key="canary",
            fix="start with `disagg serve`, which reads its policy, or give it to `serve`",
        )


def _check_engines(policy: Policy, host: PluginHost) -> None:
    dialects = host.dialects()
    for worker in policy.fleet.workers:
        if worker.engine not in dialects:
            raise ConfigError(
                f"worker {worker.name!r} has engine {worker.engine!r}, for which no plugin offers "
                f"a dialect; there are {', '.join(sorted(dialects)) or 'none'}",
                key="fleet.workers.engine",
                fix="correct the name, or install the adapter",
            )


def parts_of(
    policy: Policy,
    host: PluginHost,
    secret: bytes,
    records: RecordFile | None,
    tokenizer: Path | None,
    base_dir: Path | None,
) -> Parts:
    """Return what a gateway is built from; ``tokenizer`` and ``base_dir`` as in ``serve``."""
    ticket_s = policy.handoff.ticket_s
    watch = policy.fleet.watch

    def new_handoff(
        prefill: Worker,
        decode: Worker,
        deadline_s: float | None,
        endpoints: tuple[Mapping[str, object], ...],
    ) -> HandoffRef:
        left_s = ticket_s if deadline_s is None else deadline_s - time.monotonic()
        handoff_id = HandoffId(os.urandom(16).hex())
        ticket = mint(
            secret,
            handoff_id=handoff_id,
            prefill=prefill.name,
            decode=decode.name,
            now_s=time.time(),
            valid_s=min(ticket_s, max(LEAST_TICKET_S, left_s)),
        )
        return HandoffRef(handoff_id, ticket, prefill, decode, endpoints)

    def plugin_failures() -> dict[str, int]:
        failures: Counter[str] = Counter()
        for (plugin, _, _), count in host.counts.items():
            failures[plugin] += count
        for error in host.failures:
            failures[error.plugin] += 1
        return dict(failures)

    return Parts(
        scheduler=Scheduler(host, policy),
        dialects=host.dialects(),
        secret=secret,
        mint=new_handoff,
        records=records,
        plugin_failures=plugin_failures,
        rebalance=host.placement.select_rebalance,
        watch=None if watch is None else (base_dir or Path()) / watch.expanduser(),
        counter=None if tokenizer is None else load_token_counter(tokenizer),
    )


def _listen(policy: Policy) -> socket.socket:
    where = (policy.gateway.host, policy.gateway.port)
    family = socket.AF_INET6 if ":" in policy.gateway.host else socket.AF_INET
    try:
        sock = socket.create_server(where, family=family, backlog=BACKLOG)
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {where[0]}:{where[1]}: {exc.strerror}",
            key="gateway.port",
            fix="another process uses the port, or the address is not this machine's",
        ) from exc
    sock.setblocking(False)
    return sock
