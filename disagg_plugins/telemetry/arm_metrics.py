"""The metrics of a canary's two arms on one page, each with the label ``arm``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from disagg_plugins.telemetry.metrics import Metrics


class ArmMetrics(Collector):
    """See the module.

    Args:
        arms: By name; what is of no arm is taken from the first.
        shared: Beginnings of the names of metrics that are of no arm.
    """

    def __init__(self, arms: Mapping[str, Metrics], shared: tuple[str, ...]) -> None:
        self._arms, self._shared = dict(arms), shared
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield every family once, for Prometheus' registry."""
        families: dict[str, Metric] = {}
        for number, (arm, metrics) in enumerate(self._arms.items()):
            for each in metrics.collect():
                shared = each.name.startswith(self._shared)
                if shared and number:
                    continue
                family = families.setdefault(
                    each.name, Metric(each.name, each.documentation, each.type)
                )
                for sample in each.samples:
                    if not shared:
                        sample = sample._replace(labels={"arm": arm, **sample.labels})
                    family.samples.append(sample)
        yield from families.values()

    def text(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self._registry)
