"""What several subcommands share: argument types and reading the policy."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from disagg_plugins.plugins import PluginHost
    from disagg_plugins.policy import Policy
    from disagg_plugins.policy_file import LoadedPolicy


def positive_int(text: str) -> int:
    """Return a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive_float(text: str) -> float:
    """Return a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def add_policy(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the policy file as a positional argument."""
    parser.add_argument(
        "policy",
        type=Path,
        nargs="?" if optional else None,
        metavar="POLICY",
        help="the policy file (disagg.yaml)",
    )


DEFAULT_GATEWAY = "http://127.0.0.1:8000"
"""Where the gateway of a policy without ``gateway`` listens."""

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that mean every address of this machine, and the one to ask there."""


POLICY_ENV = "DISAGG_POLICY"
"""Names the policy; servers of engines without room for an option of ours know it too."""

POLICY_HERE = Path("disagg.yaml")


def found_policy() -> Path | None:
    """Return the policy that is meant where none is named: the environment's, else the one here."""
    named = os.environ.get(POLICY_ENV)
    if named:
        return Path(named)
    return POLICY_HERE if POLICY_HERE.is_file() else None


def add_gateway(parser: argparse.ArgumentParser) -> None:
    """Add the address of a running gateway, told by itself or by its policy, as options."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--gateway",
        metavar="URL",
        help=f"default: where the policy that {POLICY_ENV} names, or {POLICY_HERE} here, has it, "
        f"else {DEFAULT_GATEWAY}",
    )
    where.add_argument(
        "--policy", type=Path, metavar="POLICY", help="ask the gateway that this policy file is for"
    )


ARMS = ("baseline", "candidate")


def add_arm(parser: argparse.ArgumentParser, *, default: str | None = ARMS[0]) -> None:
    """Add which arm of a canary is meant; ``default`` where none is named."""
    parser.add_argument(
        "--arm",
        choices=ARMS,
        default=default,
        help="of a gateway with a canary: whose fleet (default: the baseline's)",
    )


def of_arm(path: str, arm: str) -> str:
    """Return the path by which a gateway is asked about one arm."""
    return path if arm == ARMS[0] else f"{path}?arm={arm}"


def no_such_arm(status: Mapping[str, Any], arm: str) -> str | None:
    """Return why a gateway's status is not that of the arm that was meant, or None."""
    if arm == ARMS[0] or status.get("arm") == arm:
        return None
    return f"this gateway has no {arm}: its policy has no section canary"


def gateway_url(args: argparse.Namespace) -> str:
    """Return where the gateway meant by the options of ``add_gateway`` listens.

    Raises:
        ConfigError: The policy cannot be read or is wrong.
    """
    if args.gateway is not None:
        return str(args.gateway)
    path: Path | None = args.policy or found_policy()
    if path is None:
        return DEFAULT_GATEWAY
    from disagg_plugins.policy_file import read_policy as read_quietly

    return listening_at(read_quietly(path.expanduser()).policy)


def listening_at(policy: Policy) -> str:
    """Return the address at which this machine reaches the policy's gateway."""
    gateway = policy.gateway
    host = WILDCARDS.get(gateway.host, gateway.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{gateway.port}"


def read_policy(path: Path) -> LoadedPolicy:
    """Return the policy, after printing what in it is likely not meant to standard error.

    Raises:
        ConfigError: The file cannot be read or is wrong.
    """
    from disagg_plugins.policy_file import read_policy as read

    loaded = read(path.expanduser())
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    return loaded


SCORING_HOOKS = frozenset({"disagg_score_workers", "disagg_score_queue"})
"""Whoever implements one of them is weighed by ``scheduler.weights``."""


def unknown_names(policy: Policy, host: PluginHost) -> list[str]:
    """Return what the policy names and no plugin installed here offers, one sentence each."""
    plugins = host.describe()
    known_plugins = {info.name for info in plugins}
    scorers = {info.name for info in plugins if not SCORING_HOOKS.isdisjoint(info.hooks)}
    engines = {w.engine for w in policy.fleet.workers}
    named = (
        ("handoff.transports", "transport", policy.handoff.transports, host.transports()),
        ("fleet.workers", "engine", sorted(engines), host.dialects()),
        ("scheduler.weights", "scorer", sorted(policy.scheduler.weights), scorers),
        ("plugins.settings", "plugin", sorted(policy.plugins.settings), known_plugins),
        ("plugins.disabled", "plugin", policy.plugins.disabled, known_plugins),
    )
    return [
        f"{key} names the {kind} {name!r}, which no plugin installed here offers "
        f"({_likely(name, known)})"
        for key, kind, names, known in named
        for name in names
        if name not in known
    ]


def _likely(name: str, known: Collection[str]) -> str:
    """Return which name was meant, or which there are."""
    close = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + (
        f"known: {', '.join(sorted(known)) or 'none'}"
    )


def say(line: str) -> None:
    """Print one line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)
