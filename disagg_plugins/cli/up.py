"""``disagg up POLICY``: start the policy's workers, and the gateway before them."""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.cli.common import add_policy, read_policy, say
from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    import argparse
    from types import FrameType

    from disagg_plugins.policy_file import LoadedPolicy

MADE_SECRET_BYTES = 32


def provide_secret(loaded: LoadedPolicy) -> bytes:
    """Return the fleet's secret; make one for this run where none is set and none is needed.

    Where the policy names an environment variable that is not set, and this command starts every
    worker itself, nobody else has to know the secret: a random one is put into the environment,
    which the workers inherit.

    Raises:
        ConfigError: The secret is wrong, or missing though workers run elsewhere.
    """
    name = loaded.policy.secret.env
    if name is None or name in os.environ:
        return loaded.secret()
    if any(w.launch is None for w in loaded.policy.fleet.workers):
        return loaded.secret()
    os.environ[name] = secrets.token_hex(MADE_SECRET_BYTES)
    say(f"{name} is not set: made a secret for this run")
    return loaded.secret()


def _end(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")


class UpCommand:
    """Runs a whole deployment on this machine, in the foreground."""

    name = "up"
    help = "start the policy's workers and the gateway in front of them"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the policy and where logs go."""
        add_policy(parser)
        parser.add_argument(
            "--run-dir", type=Path, default=Path(".run"), help="logs of the workers (.run)"
        )
        parser.add_argument(
            "--workers-only", action="store_true", help="start the workers, but no gateway"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Start, serve until told to stop, and leave no process behind."""
        from disagg_plugins.cli.logs import show_progress
        from disagg_plugins.cli.serve import run_gateway
        from disagg_plugins.launch.local import LocalFleet
        from disagg_plugins.plugins import PluginHost
        from disagg_plugins.policy_file import read_policy as read_quietly

        show_progress()
        secret = provide_secret(read_quietly(args.policy.expanduser()))
        # Read again: a secret that is there now is no warning any more.
        loaded = read_policy(args.policy)
        if not any(w.launch for w in loaded.policy.fleet.workers):
            raise ConfigError(
                "no worker has a launch section",
                file=str(args.policy),
                key="fleet.workers",
                fix="say how to start them, or run `disagg serve` before workers that run",
            )
        with PluginHost.load(loaded.policy.plugins) as host:
            launchers = host.launchers()
        # SIGINT too: a shell starts background jobs with SIGINT ignored, and Python leaves it so.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)
        fleet = LocalFleet(
            loaded.policy, loaded.path, launchers, run_dir=args.run_dir.absolute(), say=say
        )
        with fleet:
            fleet.start()
            fleet.watch()
            if args.workers_only:
                say("workers are ready; Ctrl-C stops them")
                while True:
                    signal.pause()
            run_gateway(loaded, secret)
        return 0
