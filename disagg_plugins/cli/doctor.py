"""``disagg doctor``: is this environment ready, and does a running gateway really split?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from disagg_plugins.cli.checks import CheckContext, Finding, Level, render, worst
from disagg_plugins.cli.common import add_policy, read_policy, unknown_names
from disagg_plugins.plugins import PluginHost

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from disagg_plugins.cli.checks import Check


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
        engines = frozenset(host.dialects())
        if loaded is not None:
            host.start(loaded.policy)
        checks = host.checks()
        context = CheckContext(
            policy=loaded.policy if loaded else None,
            policy_path=loaded.path if loaded else None,
            engines=engines,
            plugin_failures=tuple(str(f) for f in host.failures),
            unknown_names=tuple(unknown_names(loaded.policy, host)) if loaded else (),
        )
        return {name: run_check(check, context) for name, check in checks.items()}


class DoctorCommand:
    """Prints what was found and the fix of what is wrong."""

    name = "doctor"
    help = "check this environment, or with --live a running gateway, and say how to fix it"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the policy and the gateway's address."""
        add_policy(parser, optional=True)
        parser.add_argument(
            "--live", metavar="URL", help="ask the gateway at URL whether splits really happen"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Exit with 1 if there is a problem, with 0 on warnings and less."""
        groups: dict[str, Sequence[Finding]] = {}
        if args.policy or not args.live:
            groups.update(examine(args.policy))
        if args.live:
            from disagg_plugins.cli.live import examine_gateway

            groups["gateway"] = examine_gateway(args.live)
        if args.json:
            plain = {name: [asdict(f) for f in found] for name, found in groups.items()}
            print(json.dumps(plain, indent=2))
        else:
            for name, found in groups.items():
                if found:
                    print(render(name, found))
        return 1 if worst(f for found in groups.values() for f in found) is Level.PROBLEM else 0
