"""``disagg plugins``: which plugins are there, what they implement, and why one is not on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from disagg_plugins.cli.common import add_policy, read_policy
from disagg_plugins.plugins import PluginHost

if TYPE_CHECKING:
    import argparse


class PluginsCommand:
    """Lists plugins in the order in which they are asked."""

    name = "plugins"
    help = "list the plugins, their hooks, and why one is not on"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the optional policy, whose ``plugins`` section is honoured."""
        add_policy(parser, optional=True)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Print the list; exit with 1 if some plugin could not be loaded."""
        policy = read_policy(args.policy).policy if args.policy else None
        with PluginHost.load(policy.plugins if policy else None) as host:
            if policy is not None:
                host.start(policy)
            # Asking for every offer brings names that are taken twice to light.
            for offers in (host.transports, host.dialects, host.launchers, host.checks):
                offers()
            host.commands()
            infos = host.describe()
            failures = [str(f) for f in host.failures]
        if args.json:
            found = {"plugins": [asdict(i) for i in infos], "failures": failures}
            print(json.dumps(found, indent=2))
            return 1 if failures else 0
        for info in infos:
            state = "" if info.state == "on" else f"  [{info.state}: {info.problem}]"
            print(f"{info.name} {info.version} ({info.distribution}){state}")
            if info.hooks:
                print(f"    {', '.join(info.hooks)}")
        for failure in failures:
            print(f"failed: {failure}")
        return 1 if failures else 0
