"""Which workers of a policy can share handoffs, by their engines, and who carries them (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disagg_plugins.gateway.fleet import are_pair, as_used, in_role
from disagg_plugins.gateway.pairs import own_means, own_transport
from disagg_plugins.types import Role

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.policy import Policy
    from disagg_plugins.types import Worker


UNLIKE_FIX = (
    "give prefill and decode workers one engine, or engines that hand over to others; or set "
    "scheduler.split.rule to never"
)


@dataclass(frozen=True, slots=True)
class EnginePairs:
    """What the engines of a fleet make of its pairs.

    Attributes:
        problems: Why some pairs cannot share a handoff, in the running gateway's words.
        possible: Whether some pair can, as far as the policy tells.
    """

    problems: tuple[str, ...]
    possible: bool


@dataclass(frozen=True, slots=True)
class Carriers:
    """Who carries the handoffs of a fleet.

    Attributes:
        ours: Whether transports of this project carry some.
        own: Engines that carry theirs themselves.
    """

    ours: bool
    own: tuple[str, ...]


def engine_pairs(policy: Policy, dialects: Mapping[str, Dialect]) -> EnginePairs:
    """Return which pairs of a policy can share handoffs.

    Args:
        policy: The policy; workers of a watched file are taken to fit.
        dialects: By engine; of an engine that is not known nothing is said.
    """
    problems: list[str] = []
    possible = policy.fleet.watch is not None
    for prefill, decode in _pairs(policy, dialects):
        problem = own_means(prefill, decode, dialects)
        if problem is None:
            possible = True
        else:
            problems.append(problem)
    return EnginePairs(tuple(dict.fromkeys(problems)), possible)


def carriers(policy: Policy, dialects: Mapping[str, Dialect]) -> Carriers:
    """Return who carries the handoffs of a policy; ``dialects`` by engine.

    Workers of a watched file are taken to hand over by transports of this project.
    """
    possible = {
        (prefill.engine, decode.engine)
        for prefill, decode in _pairs(policy, dialects)
        if own_means(prefill, decode, dialects) is None
    }
    # such an engine hands over to its like only, so one of the two tells of both
    own = {engine for engine, _ in possible if own_transport(dialects.get(engine))}
    ours = policy.fleet.watch is not None or any(engine not in own for engine, _ in possible)
    return Carriers(ours, tuple(sorted(own)))


def _pairs(policy: Policy, dialects: Mapping[str, Dialect]) -> Iterator[tuple[Worker, Worker]]:
    """Yield the pairs that the policy means, of workers that are alike two at most."""
    alike: dict[object, list[Worker]] = {}
    for each in policy.fleet.workers:
        for worker in _as_may_be_used(each.worker(), dialects.get(each.engine)):
            alike.setdefault((worker.engine, worker.role, worker.handoffs), []).append(worker)
    some = [worker for workers in alike.values() for worker in workers[:2]]
    return ((p, d) for p in some for d in some if are_pair(p, d))


def _as_may_be_used(worker: Worker, dialect: Dialect | None) -> list[Worker]:
    """Return a worker in each role that its engine can give it."""
    used = as_used(worker, dialect)
    if not used.role_switch:
        return [used]
    return [in_role(used, role, dialect) for role in (Role.PREFILL, Role.DECODE)]
