"""``disagg canary``: starts, watches, approves, holds and takes back a rollout.

Commands go to a running gateway. Where none answers, what makes things safer (``hold`` and
``rollback``) is written to the rollout's memory all the same: every gateway follows it at its next
look.
"""

from __future__ import annotations

import getpass
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_plugins.cli.common import add_policy, positive_float, read_policy, say
from disagg_plugins.errors import ConfigError, DisaggError, TransportError
from disagg_plugins.telemetry.split_words import beside_happened

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from disagg_plugins.canary.policy import CanaryPolicy
    from disagg_plugins.cli.fleet import Admin
    from disagg_plugins.policy_file import LoadedPolicy

PATH = "/internal/canary"
HOUR_S = 3600.0
DEFAULT_HOURS = 8.0
"""A working day."""

SAFE = ("hold", "rollback")
"""Commands that need no gateway."""

TOLD = {
    "start": "the rollout has begun",
    "approve": "the next step is approved; it comes with the next look that finds nothing wrong",
    "hold": "the traffic stays where it is until it is resumed; evidence can still roll back",
    "resume": "the rollout goes on",
    "rollback": "all traffic goes to the baseline",
}


class CanaryCommand:
    """Moves traffic between two deployments, and shows by which evidence."""

    name = "canary"
    help = "start, watch, approve, hold and roll back a canary"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the actions."""
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
        for do, text in (
            ("start", "give the candidate its first share of the traffic"),
            ("approve", "approve the next step, where the policy asks a person"),
            ("hold", "keep the traffic where it is"),
            ("resume", "go on after a hold"),
            ("rollback", "take all traffic back to the baseline"),
        ):
            each = self._action(actions, do, text, _act)
            each.add_argument("--why", default="", help="the reason, for the audit log")
            each.add_argument("--by", default="", metavar="NAME", help="default: your login name")
        status = self._action(
            actions, "status", "say how far it is, and what it waits for", _status
        )
        status.add_argument("--json", action="store_true", help="print all that is known")
        report = self._action(
            actions, "report", "write one HTML file to attach to a change request", _report
        )
        report.add_argument(
            "-o", "--output", type=Path, default=Path("canary.html"), help="default: canary.html"
        )
        page = self._action(actions, "page", "print a link that opens the page in a browser", _page)
        page.add_argument("--see", action="store_true", help="a link without buttons")
        override = self._action(
            actions,
            "override",
            "print the header that sends requests to one arm",
            _override,
        )
        override.add_argument("arm", choices=("baseline", "candidate"))
        for each in (page, override):
            each.add_argument(
                "--hours", type=positive_float, default=DEFAULT_HOURS, help="default: 8; up to 720"
            )

    def _action(
        self,
        actions: Any,
        name: str,
        text: str,
        do: Callable[[Site, argparse.Namespace], int],
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = actions.add_parser(name, help=text)
        add_policy(parser)
        parser.add_argument("--gateway", metavar="URL", help="default: where the policy says")
        parser.set_defaults(do=do)
        return parser

    def run(self, args: argparse.Namespace) -> int:
        """Do one action."""
        loaded = read_policy(args.policy)
        if loaded.policy.canary is None:
            raise ConfigError("the policy has no canary", file=str(args.policy), key="canary")
        code: int = args.do(Site(loaded, loaded.policy.canary, args.gateway), args)
        return code


class Site:
    """The gateway and the memory that a policy names."""

    def __init__(self, loaded: LoadedPolicy, canary: CanaryPolicy, url: str | None) -> None:
        from disagg_plugins.cli.fleet import Admin

        gateway = loaded.policy.gateway
        self.loaded, self.canary = loaded, canary
        self.url = url or f"http://{gateway.advertise_host or gateway.host}:{gateway.port}"
        self.secret = loaded.secret()
        self.admin: Admin = Admin(self.url, self.secret)

    def ask(self, method: str, body: object = None) -> dict[str, Any]:
        """Return the canary's document from the gateway.

        Raises:
            TransportError: No gateway answers.
            DisaggError: It refused; tells why.
        """
        status, answer = self.admin.ask_at(method, PATH, body)
        if status == 404:
            raise DisaggError(f"the gateway at {self.url} runs no canary: restart it on the policy")
        if status >= 400 or not isinstance(answer, dict):
            error = answer.get("error") if isinstance(answer, dict) else None
            why = error.get("message") if isinstance(error, dict) else answer
            raise DisaggError(f"the gateway answered {status}: {why}")
        return answer


def _act(site: Site, args: argparse.Namespace) -> int:
    do, by = args.action, args.by or getpass.getuser()
    try:
        found = site.ask("POST", {"do": do, "by": by, "why": args.why})
    except TransportError as exc:
        if do not in SAFE:
            raise
        say(f"{exc}; written to the rollout's memory instead")
        _write(site, do, by, args.why)
        say(f"{TOLD[do]}, at each gateway's next look")
        return 0
    say(TOLD[do])
    _print(found)
    return 0


def _write(site: Site, do: Any, by: str, why: str) -> None:
    from disagg_plugins.canary.candidate import plan_of
    from disagg_plugins.canary.keeper import command
    from disagg_plugins.canary.lookout import act, instant
    from disagg_plugins.canary.store_opening import open_store

    plan = plan_of(site.loaded, site.canary)
    store = open_store(site.canary.store, site.loaded.base_dir)
    try:
        command(store, plan, lambda rollout: act(rollout, do, instant(), by, why))
    finally:
        store.close()


def _status(site: Site, args: argparse.Namespace) -> int:
    try:
        found = site.ask("GET")
    except TransportError as exc:
        say(f"{exc}; this is what the rollout's memory says")
        found = _remembered(site)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def _remembered(site: Site) -> dict[str, Any]:
    """Return what can be told without a gateway."""
    from disagg_plugins.canary.candidate import plan_of
    from disagg_plugins.canary.store_opening import open_store

    plan = plan_of(site.loaded, site.canary)
    store = open_store(site.canary.store, site.loaded.base_dir)
    try:
        progress = store.load().progress
        decisions = [decision.as_dict() for decision in store.decisions(most=100)]
    finally:
        store.close()
    return {
        "now_s": time.time(),
        "canary": site.canary.store.name,
        "candidate": site.canary.candidate.name,
        "plan": {
            "steps": list(plan.steps),
            "bake_s": plan.bake_s,
            "approval": site.canary.approval,
            "level": site.canary.level,
            "frozen": plan.frozen(time.time()),
        },
        "progress": progress.as_dict(),
        "lacks": ["no gateway answers"],
        "trouble": None,
        "guardrails": [],
        "decisions": decisions,
    }


def _print(found: Mapping[str, Any]) -> None:
    for line in lines(found):
        print(line)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the state of a canary in words.

    Args:
        found: See ``disagg_plugins.canary.document``.
    """
    progress, plan = found["progress"], found["plan"]
    steps = plan["steps"]
    yield (
        f"{progress['phase']}: {found['candidate']} has {progress['weight']} % of the traffic "
        f"(step {progress['step'] + 1} of {len(steps)}: {', '.join(f'{s} %' for s in steps)})"
    )
    if progress["why"]:
        yield f"why: {progress['why']}"
    if found["trouble"]:
        yield f"TROUBLE: {found['trouble']}"
    for lack in found["lacks"]:
        yield f"waits: {lack}"
    for arm, told in found.get("arms", {}).items():
        healthy = sum(bool(w["healthy"]) for w in told["workers"])
        split = told["split"]
        yield (
            f"{arm}: {healthy} of {len(told['workers'])} workers healthy, {told['requests']:.0f} "
            f"requests, of the last ones {split['routed']} split and {split['happened']} really so"
            f"{beside_happened(split)}"
        )
    for guardrail in found["guardrails"]:
        yield f"{guardrail['answer']:>5}  {guardrail['reason']}"
    parity = found.get("parity")
    if parity is not None:
        pairs = ", ".join(f"{n} with the {arm}" for arm, n in parity["pairs"].items())
        yield f"{parity['answer']:>5}  parity: pairs: {pairs}"
    for decision in found["decisions"][:5]:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(decision["at_s"]))
        why = "; ".join(decision["why"])
        yield (
            f"{at} UTC  {decision['kind']} by {decision['by']}, "
            f"{decision['from_weight']} % to {decision['to_weight']} %: {why}"
        )


def _report(site: Site, args: argparse.Namespace) -> int:
    from disagg_plugins.canary.report import report_html

    args.output.write_text(report_html(site.ask("GET")), encoding="utf-8")
    say(f"written: {args.output}")
    return 0


def _page(site: Site, args: argparse.Namespace) -> int:
    from disagg_plugins.canary.page_token import Tokens

    tokens = Tokens(site.secret, site.canary.store.name)
    token = tokens.mint("see" if args.see else "act", time.time(), args.hours * HOUR_S)
    print(f"{site.url}/canary#token={token}")
    return 0


def _override(site: Site, args: argparse.Namespace) -> int:
    from disagg_plugins.canary.override import OVERRIDE_HEADER, MintedBy, mint_override

    minted = MintedBy(site.secret, site.canary.store.name)
    value = mint_override(minted, args.arm, now_s=time.time(), valid_s=args.hours * HOUR_S)
    print(f"{OVERRIDE_HEADER}: {value}")
    return 0
