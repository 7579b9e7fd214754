"""``disagg policy check|schema|explain``: the policy file, before anything runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from disagg_plugins.canary.candidate import check_fit
from disagg_plugins.cli.common import add_policy, read_policy, say, unknown_names
from disagg_plugins.errors import ConfigError
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy_advice import engine_advice, explain
from disagg_plugins.policy_file import read_policy as read_quietly
from disagg_plugins.policy_pairs import UNLIKE_FIX, engine_pairs

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.policy import Policy
    from disagg_plugins.policy_file import LoadedPolicy


def _refuse_unlike(policy: Policy, dialects: Mapping[str, Dialect], file: str) -> None:
    """Refuse a fleet that is to split and in which no two workers can share a handoff.

    Raises:
        ConfigError: It is one; the text is the running gateway's.
    """
    pairs = engine_pairs(policy, dialects)
    if pairs.problems and not pairs.possible and policy.scheduler.split.rule != "never":
        raise ConfigError(
            "; ".join(pairs.problems),
            file=file,
            key="fleet.workers",
            fix=UNLIKE_FIX,
        )


def _odd(loaded: LoadedPolicy, file: str) -> list[str]:
    """Return what plugins and engines make of a policy that is likely not meant.

    Raises:
        ConfigError: No two workers can share a handoff.
    """
    with PluginHost.load(loaded.policy.plugins) as host:
        odd, dialects = unknown_names(loaded.policy, host), host.dialects()
    _refuse_unlike(loaded.policy, dialects, file)
    return [*odd, *engine_advice(loaded.policy, dialects)]


def _odd_candidate(baseline: LoadedPolicy) -> list[str]:
    """Return the same of the candidate of a canary; one that is not there was told already.

    Raises:
        ConfigError: Its policy is wrong or does not go with the baseline's, or no two of its
            workers can share a handoff.
    """
    canary = baseline.policy.canary
    path = baseline.base_dir / canary.candidate.expanduser() if canary is not None else None
    if path is None or not path.is_file():
        return []
    loaded = read_quietly(path)
    check_fit(baseline, loaded)
    odd = [*loaded.warnings, *_odd(loaded, str(path))]
    return [f"the candidate: {each}" for each in odd]


class PolicyCommand:
    """Checks a policy, explains it in words, or prints the JSON Schema."""

    name = "policy"
    help = "check a policy file, explain it, or print its JSON Schema"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add one subparser a verb."""
        verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
        check = verbs.add_parser("check", help="say whether the file is right, and what is odd")
        check.add_argument("--strict", action="store_true", help="exit with 1 on warnings too")
        add_policy(check)
        add_policy(verbs.add_parser("explain", help="say in words what the file means"))
        verbs.add_parser("schema", help="print the JSON Schema (for editors)")

    def run(self, args: argparse.Namespace) -> int:
        """Print the answer; a wrong file raises ConfigError."""
        if args.verb == "schema":
            from disagg_plugins.policy import policy_schema

            print(json.dumps(policy_schema(), indent=2))
            return 0
        loaded = read_policy(args.policy)
        if args.verb == "explain":
            with PluginHost.load(loaded.policy.plugins) as host:
                print(explain(loaded.policy, host.dialects()))
            return 0
        odd = [*_odd(loaded, str(args.policy)), *_odd_candidate(loaded)]
        for each in odd:
            say(f"warning: {each}")
        workers = loaded.policy.fleet.workers
        roles = ", ".join(f"{w.name} ({w.role.value})" for w in workers)
        print(f"{args.policy}: right; {len(workers)} workers: {roles}")
        return 1 if args.strict and (loaded.warnings or odd) else 0
