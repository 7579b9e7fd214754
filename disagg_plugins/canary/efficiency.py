"""What an arm's fleet holds ready for its goodput: workers, and what they cost (pure).

Goodput per worker is the rate of requests within their SLOs over the workers that are paid for. Two
arms that share the traffic by a weight have unlike rates whatever they are worth, so the rate is
taken at *all* of the traffic: it is the same for both then, and what is left to compare is each
arm's share of good requests over its workers. That share is what was seen at the arm's own weight:
what an arm does under all of the load only the last steps show.

The numbers are scaled by the smaller fleet, so that they lie between 0 and 1 and the tests for
shares hold. With equal fleets they are the goodput itself; a candidate with three workers against
two needs a margin that says so (``ratio: 0.67``), or it is worse by a third.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    from disagg_plugins.canary.metrics import Arm

COST_LABEL = "cost"
"""The label by which a worker says what it costs an hour, in any one unit."""


class Labelled(Protocol):
    """A worker, or its description in a policy."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def labels(self) -> Mapping[str, str]:
        """Its labels."""
        ...


class Scale(NamedTuple):
    """By what the goodput of an arm is multiplied, from 0 to 1; None: unknown.

    Attributes:
        per_worker: The smaller fleet's workers over this one's.
        per_cost: The cheaper fleet's cost over this one's.
    """

    per_worker: float | None = None
    per_cost: float | None = None


def scales(fleets: Mapping[Arm, Iterable[Labelled]]) -> dict[Arm, Scale]:
    """Return the scale of each arm, of all the workers that it has, ill ones included."""
    workers = {arm: tuple(fleet) for arm, fleet in fleets.items()}
    per_worker = _shares({arm: float(len(fleet)) for arm, fleet in workers.items()})
    per_cost = _shares({arm: _cost(fleet) for arm, fleet in workers.items()})
    return {arm: Scale(per_worker[arm], per_cost[arm]) for arm in workers}


def _shares(sizes: Mapping[Arm, float | None]) -> dict[Arm, float | None]:
    known = {arm: size for arm, size in sizes.items() if size}
    if len(known) < len(sizes):
        return dict.fromkeys(sizes)
    least = min(known.values())
    return {arm: least / size for arm, size in known.items()}


def _cost(workers: Iterable[Labelled]) -> float | None:
    total = 0.0
    for worker in workers:
        try:
            total += cost_of(worker)
        except ConfigError:  # it joined later, and what the fleet costs is unknown from then on
            return None
    return total


def cost_of(worker: Labelled) -> float:
    """Return what a worker costs an hour.

    Raises:
        ConfigError: Its label is missing, or no positive number.
    """
    said = worker.labels.get(COST_LABEL)
    try:
        cost = float(said) if said is not None else math.nan
    except ValueError:
        cost = math.nan
    if not 0.0 < cost < math.inf:
        raise ConfigError(
            f"worker {worker.name!r} has the label cost {said!r}",
            key="fleet.workers",
            fix="goodput_per_cost needs of each worker of both arms what it costs an hour, a "
            'number in any one unit: labels: {cost: "2.5"}',
        )
    return cost
