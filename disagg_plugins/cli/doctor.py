"""``disagg doctor``: is this environment ready, and does a running gateway really split?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from disagg_plugins.cli.checks import CheckContext, Finding, Level, render, worst
from disagg_plugins.cli.common import (
    ARMS,
    add_arm,
    add_policy,
    listening_at,
    read_policy,
    unknown_names,
)
from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.pairs import own_transport
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy_file import read_policy as read_quietly
from disagg_plugins.policy_pairs import engine_pairs

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from disagg_plugins.cli.checks import Check
    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.policy import Policy
    from disagg_plugins.policy_pairs import EnginePairs


def run_check(check: Check, context: CheckContext) -> Sequence[Finding]:
    """Return a check's findings; one that raises is itself a problem that was found."""
    try:
        return list(check.run(context))
    except Exception as problem:  # a check may come from anybody
        return [
            Finding(
                Level.PROBLEM,
                f"check {check.name}",
                f"raised {type(problem).__name__}: {problem}",
                "report this to whoever wrote the check",
            )
        ]


def examine(policy_path: Path | None) -> dict[str, Sequence[Finding]]:
    """Return the findings of every check by its name."""
    loaded = read_policy(policy_path) if policy_path else None
    with PluginHost.load(loaded.policy.plugins if loaded else None) as host:
        dialects = host.dialects()
        if loaded is not None:
            host.start(loaded.policy)
        checks = host.checks()
        context = CheckContext(
            policy=loaded.policy if loaded else None,
            policy_path=loaded.path if loaded else None,
            engines=frozenset(dialects),
            own_transport=frozenset(name for name, d in dialects.items() if own_transport(d)),
            plugin_failures=tuple(str(f) for f in host.failures),
            unknown_names=tuple(unknown_names(loaded.policy, host)) if loaded else (),
            pairs=_pairs(loaded.policy, dialects) if loaded else None,
        )
        return {name: run_check(check, context) for name, check in checks.items()}


def _pairs(policy: Policy, dialects: Mapping[str, Dialect]) -> EnginePairs | None:
    meant = policy.scheduler.split.rule != "never"
    return engine_pairs(policy, dialects) if meant else None


def _live_url(args: argparse.Namespace) -> str:
    """Return the gateway to ask.

    Raises:
        ConfigError: Neither a URL nor a policy tells it.
    """
    url: str = args.live
    if not url and args.policy is not None:
        return listening_at(read_quietly(args.policy.expanduser()).policy)
    if not url.startswith("http://"):
        raise ConfigError(
            f"--live {url}: not of the form http://host:port"
            if url
            else "--live of which gateway?",
            fix="give its address, `--live http://127.0.0.1:8000`, or its policy, "
            "`disagg doctor disagg.yaml --live`",
        )
    return url


class DoctorCommand:
    """Prints what was found and the fix of what is wrong."""

    name = "doctor"
    help = "check this environment, or with --live a running gateway, and say how to fix it"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the policy and the gateway's address."""
        add_policy(parser, optional=True)
        parser.add_argument(
            "--live",
            metavar="URL",
            nargs="?",
            const="",
            help="ask the gateway whether splits really happen (default: where POLICY has it)",
        )
        add_arm(parser, default=None)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Exit with 1 if there is a problem, with 0 on warnings and less.

        Raises:
            ConfigError: An arm is named and no gateway is to be asked, or which one is not told.
        """
        if args.arm is not None and args.live is None:
            raise ConfigError(
                "without --live no gateway is asked, and only a gateway has arms",
                key="--arm",
                fix="add --live, or name the policy of that arm instead",
            )
        groups: dict[str, Sequence[Finding]] = {}
        live = None if args.live is None else _live_url(args)
        if args.policy or not live:
            groups.update(examine(args.policy))
        if live:
            from disagg_plugins.cli.live import examine_gateway

            groups["gateway"] = examine_gateway(live, arm=args.arm or ARMS[0])
        if args.json:
            plain = {name: [asdict(f) for f in found] for name, found in groups.items()}
            print(json.dumps(plain, indent=2))
        else:
            for name, found in groups.items():
                if found:
                    print(render(name, found))
        return 1 if worst(f for found in groups.values() for f in found) is Level.PROBLEM else 0
