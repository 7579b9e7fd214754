"""The candidate of a canary: its policy file, checked against the baseline's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.canary.efficiency import cost_of
from disagg_plugins.credentials import read_authorization
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy_file import read_policy

if TYPE_CHECKING:
    from disagg_plugins.canary.policy import CanaryPolicy
    from disagg_plugins.canary.rollout import Plan
    from disagg_plugins.policy_file import LoadedPolicy

KEY = "canary.candidate"

GOODPUTS = frozenset({"goodput", "goodput_per_worker", "goodput_per_cost"})


@dataclass(frozen=True, slots=True)
class Candidate:
    """What the gateway needs of a candidate.

    Attributes:
        loaded: Its policy.
        plan: Of the rollout.
        authorization: What copies carry as ``authorization``; None: nothing.
    """

    loaded: LoadedPolicy
    plan: Plan
    authorization: str | None


def read_candidate(baseline: LoadedPolicy) -> Candidate | None:
    """Return the candidate of a policy; None where it has no canary.

    Raises:
        ConfigError: The candidate's policy is missing or wrong, or does not go with the baseline's.
    """
    canary = baseline.policy.canary
    if canary is None:
        return None
    path = baseline.base_dir / canary.candidate.expanduser()
    if not path.is_file():
        raise ConfigError(f"there is no file {path}", file=str(baseline.path), key=KEY)
    loaded = read_policy(path)
    check_fit(baseline, loaded)
    if baseline.secret() != loaded.secret():
        raise ConfigError(
            "the arms have different secrets, and their workers report to one gateway",
            file=str(loaded.path),
            key="secret",
            fix="name the same secret in both policies",
        )
    authorization = None
    if canary.shadow is not None and canary.shadow.authorization is not None:
        authorization = read_authorization(
            canary.shadow.authorization, baseline.base_dir, "canary.shadow.authorization"
        )
    return Candidate(loaded, plan_of(baseline, canary), authorization)


def plan_of(baseline: LoadedPolicy, canary: CanaryPolicy) -> Plan:
    """Return the plan of a rollout.

    Raises:
        ConfigError: The candidate's policy cannot be read.
    """
    path = baseline.base_dir / canary.candidate.expanduser()
    try:
        return canary.plan(path.read_bytes())
    except OSError as exc:
        raise ConfigError(
            f"cannot read {path}: {exc.strerror}", file=str(baseline.path), key=KEY
        ) from exc


def check_fit(baseline: LoadedPolicy, candidate: LoadedPolicy) -> None:
    """Refuse a candidate that does not go with the baseline; their secrets are not read.

    Raises:
        ConfigError: It does not.
    """
    ours, theirs = baseline.policy, candidate.policy
    where = str(candidate.path)
    if theirs.canary is not None:
        raise ConfigError("a candidate has no canary of its own", file=where, key="canary")
    if not theirs.fleet.workers and theirs.fleet.watch is None:
        raise ConfigError(
            "the candidate has no worker: every request that it gets would fail",
            file=where,
            key="fleet.workers",
        )
    twice = sorted({w.name for w in ours.fleet.workers} & {w.name for w in theirs.fleet.workers})
    if twice:
        raise ConfigError(
            f"workers of both arms are named {', '.join(twice)}",
            file=where,
            key="fleet.workers",
            fix="workers report under their names to one gateway: give each a name of its own",
        )
    if ours.model is not None and theirs.model is not None and ours.model != theirs.model:
        raise ConfigError(
            f"the arms serve different models: {ours.model!r} and {theirs.model!r}",
            file=where,
            key="model",
            fix="a canary compares two deployments of one model",
        )
    unlike = sorted(set(ours.scheduler.slo_classes) ^ set(theirs.scheduler.slo_classes))
    if unlike:
        raise ConfigError(
            f"only one of the arms knows the SLO classes {', '.join(unlike)}",
            file=where,
            key="scheduler.slo_classes",
            fix="give both policies the same classes: the other arm would refuse their requests",
        )
    _check_goodput(baseline, candidate)
    same = ours.telemetry.records is not None and (
        baseline.base_dir / ours.telemetry.records.expanduser()
        == candidate.base_dir / (theirs.telemetry.records or ours.telemetry.records).expanduser()
    )
    if same and theirs.telemetry.records is not None:
        raise ConfigError(
            "both arms write their records to one file",
            file=where,
            key="telemetry.records",
            fix="name another one",
        )


def _check_goodput(baseline: LoadedPolicy, candidate: LoadedPolicy) -> None:
    """Refuse a guardrail on goodput for which no sample would ever come."""
    canary = baseline.policy.canary
    watched = {g.metric for g in canary.guardrails if g.metric in GOODPUTS} if canary else set()
    if watched and not baseline.policy.scheduler.slo_classes:
        raise ConfigError(
            f"there is a guardrail on {', '.join(sorted(watched))} and no SLO class",
            file=str(baseline.path),
            key="canary.guardrails",
            fix="declare scheduler.slo_classes, and name a default_slo_class or send the header",
        )
    if "goodput_per_cost" in watched:
        for loaded in (baseline, candidate):
            for worker in loaded.policy.fleet.workers:
                try:
                    cost_of(worker)
                except ConfigError as exc:
                    raise ConfigError(
                        exc.problem, file=str(loaded.path), key=exc.key, fix=exc.fix
                    ) from exc
