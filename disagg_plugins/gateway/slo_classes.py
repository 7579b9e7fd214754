"""Which SLO class a request is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disagg_plugins.gateway.refusals import RequestError
from disagg_plugins.gateway.wire import Header, header_value

if TYPE_CHECKING:
    from disagg_plugins.policy import SchedulerPolicy

SLO_CLASS_HEADER = b"x-disagg-slo-class"


def slo_class_of(headers: Sequence[Header], rules: SchedulerPolicy) -> str | None:
    """Return the SLO class that a request names, or the policy's.

    Raises:
        RequestError: 400; the policy has no such class.
    """
    given = header_value(headers, SLO_CLASS_HEADER)
    if given is None:
        return rules.default_slo_class
    name = given.decode("utf-8", "replace").strip()
    if name not in rules.slo_classes:
        known = ", ".join(rules.slo_classes) or "none (policy key scheduler.slo_classes)"
        raise RequestError(
            400,
            f"there is no SLO class {name[:64]!r}; known: {known}",
            code="unknown_slo_class",
        )
    return name
