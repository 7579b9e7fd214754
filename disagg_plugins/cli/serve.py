"""``disagg serve POLICY``: the gateway alone, before workers that already run."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

from disagg_plugins.canary.candidate import read_candidate
from disagg_plugins.cli.common import add_policy, read_policy, say, unknown_names
from disagg_plugins.cli.logs import show_progress
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy_advice import engine_advice

if TYPE_CHECKING:
    import argparse

    from disagg_plugins.canary.trial import Trial
    from disagg_plugins.policy_file import LoadedPolicy


def run_gateway(loaded: LoadedPolicy, secret: bytes) -> None:
    """Serve until SIGINT or SIGTERM, then drain.

    Raises:
        ConfigError: The port is in use, records cannot be written, or a worker's engine is unknown.
    """
    import uvloop

    from disagg_plugins.gateway.app import serve

    gateway = loaded.policy.gateway
    records = loaded.policy.telemetry.records
    tokenizer = loaded.policy.scheduler.tokenizer

    async def main(host: PluginHost, trial: Trial | None) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def end() -> None:
            # The handlers go away here: the next signal ends the process at once.
            say(f"draining for at most {gateway.drain_s:g} s; a second signal ends at once")
            stop.set()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        await serve(
            loaded.policy,
            host,
            secret=secret,
            records_path=loaded.base_dir / records.expanduser() if records else None,
            base_dir=loaded.base_dir,
            tokenizer=loaded.base_dir / tokenizer.expanduser() if tokenizer else None,
            trial=trial,
            ready=lambda _: say(f"gateway listens: http://{gateway.host}:{gateway.port}"),
            stop=stop,
        )

    with contextlib.ExitStack() as stack:
        host = _host(stack, loaded)
        trial = None
        candidate = read_candidate(loaded)
        if candidate is not None:
            from disagg_plugins.canary.trial import Trial

            for warning in candidate.loaded.warnings:
                say(f"warning: the candidate: {warning}")
            trial = Trial(candidate, _host(stack, candidate.loaded), loaded.base_dir)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(host, trial))


def _host(stack: contextlib.ExitStack, loaded: LoadedPolicy) -> PluginHost:
    """Return the plugins of a policy, which end with ``stack``."""
    host = stack.enter_context(PluginHost.load(loaded.policy.plugins))
    host.start(loaded.policy)
    for each in (
        *unknown_names(loaded.policy, host),
        *engine_advice(loaded.policy, host.dialects()),
    ):
        say(f"warning: {each}")
    return host


class ServeCommand:
    """Runs the gateway in the foreground."""

    name = "serve"
    help = "run the gateway before workers that already run"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the policy."""
        add_policy(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Serve until told to stop."""
        show_progress()
        loaded = read_policy(args.policy)
        run_gateway(loaded, loaded.secret())
        return 0
