"""The canary of a policy in words, and what of it is likely not meant."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from disagg_plugins.credentials import read_dsn
from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from disagg_plugins.canary.policy import CanaryPolicy, RulePolicy, ShadowPolicy


def canary_advice(canary: CanaryPolicy, base_dir: Path) -> Iterator[str]:
    """Yield what is allowed and yet likely not meant.

    Args:
        canary: The section.
        base_dir: The folder of the policy, where relative paths start.
    """
    candidate = base_dir / canary.candidate.expanduser()
    if not candidate.is_file():
        yield f"canary.candidate: there is no file {candidate}"
    if all(guardrail.limit is None for guardrail in canary.guardrails):
        yield (
            "no guardrail of the canary has a limit: at 100 % the baseline serves nothing, and "
            "without a limit nothing rolls back there"
        )
    if canary.steps[0] > 50:
        yield (
            f"the canary begins at {canary.steps[0]} % of the traffic: a bad candidate meets most "
            "requests before anything is known of it"
        )
    if canary.bake_s < canary.look_s:
        yield "canary.bake_s is shorter than look_s: a step may end at the first look"
    if canary.store.postgres is not None:
        if find_spec("psycopg") is None:
            yield ("canary.store.postgres needs psycopg: pip install 'disagg-plugins[postgres]'")
        try:
            read_dsn(canary.store.postgres, base_dir, "canary.store.postgres")
        except ConfigError as exc:
            yield f"the canary cannot be remembered without its DSN: {exc}"


def canary_sentences(canary: CanaryPolicy) -> Iterator[str]:
    """Yield the section in words, one fact each."""
    steps = ", ".join(f"{step} %" for step in canary.steps)
    who = "a person approves" if canary.approval == "manual" else "the evidence alone decides"
    yield (
        f"A canary moves traffic to the deployment of {canary.candidate}: {steps}, at least "
        f"{canary.bake_s:g} s each; {who} on each next step."
    )
    yield (
        f"A good candidate is rolled back with a chance of at most {canary.level:.3g}, a bad one "
        f"passes a step with a chance of at most {canary.level / len(canary.steps):.3g}; each step "
        "gathers its own evidence."
    )
    for item in canary.guardrails:
        guardrail = item.guardrail()
        proof = "a step waits for the proof" if item.required else "it only rolls back"
        yield f"The candidate's {guardrail.name} may be {guardrail.allowed}; {proof}."
    yield f"A request without an end after {canary.horizon_s:g} s counts as failed."
    for freeze in canary.freeze:
        yield f"Nothing is promoted on {freeze.freeze().words()}; rollback still works."
    store = canary.store
    if store.postgres is None:
        where = f"in {store.path or 'canary.sqlite'}"
    elif store.postgres.env is not None:
        where = f"in the PostgreSQL that the environment variable {store.postgres.env} names"
    else:
        where = f"in the PostgreSQL that the file {store.postgres.file} names"
    yield (
        f"The rollout is remembered {where}; one gateway decides, and another takes over after "
        f"{store.lease_s:g} s. If nobody looked for {canary.max_gap_s:g} s, it is held."
    )
    yield _sticky(canary)
    for rule in canary.rules:
        yield f"Requests {_who(rule)} go to the {rule.arm} while it serves."
    if canary.shadow is not None:
        shadow = canary.shadow
        yield (
            f"Copies of {shadow.share:.3g} of the baseline's requests go to the candidate, "
            f"{shadow.max_per_s:g} a second and {shadow.max_in_flight} at once at most; nobody "
            "gets their answers."
        )
        yield _parity(shadow)


def _parity(shadow: ShadowPolicy) -> str:
    if not shadow.control:
        return "No copy goes to the baseline, so nobody knows whether both say the same."
    parity = shadow.parity
    return (
        f"Of the copies {shadow.control:.3g} go to the baseline again; greedy answers of the "
        f"candidate may be different in {100 * parity.margin:.3g} % more of the cases than those."
    )


def _sticky(canary: CanaryPolicy) -> str:
    if canary.sticky == "request":
        return "Each request is given its arm by itself."
    what = {
        "session": "a session",
        "user": "a user",
        "tenant": "a tenant",
        "prefix": "one prefix of prompts",
    }[canary.sticky]
    return f"All requests of {what} go to one arm, as long as the steps allow."


def _who(rule: RulePolicy) -> str:
    found = []
    if rule.model is not None:
        found.append(f"for model {rule.model}")
    if rule.tenant is not None:
        found.append(f"of tenant {rule.tenant}")
    if rule.header is not None:
        found.append(f"with the header {rule.header.name}: {rule.header.value}")
    return " ".join(found)
