"""Which transport carries a handoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disagg_plugins import hookimpl
from disagg_plugins.errors import TransportError
from disagg_plugins.hook_calls import HookCalls, NonsenseError
from disagg_plugins.types import HandoffEvent, HandoffPair, TransportCapabilities

if TYPE_CHECKING:
    from disagg_plugins.plugins import PluginHost

Offered = Sequence[tuple[str, TransportCapabilities]]


class ConnectorHooks:
    """The typed facade of the KV connector hooks."""

    def __init__(self, calls: HookCalls) -> None:
        self._calls = calls

    def select_transport(self, pair: HandoffPair, offered: Offered) -> str | None:
        """Return the first valid answer: a name in ``offered``, or None."""
        names = [name for name, _ in offered]

        def check(answer: object) -> str:
            if not isinstance(answer, str) or answer not in names:
                raise NonsenseError(f"answered {answer!r}, not one of {', '.join(names)}")
            return answer

        arguments = {"pair": pair, "offered": tuple(offered)}
        found = self._calls.first("disagg_select_transport", check, arguments)
        return None if found is None else found[1]

    def on_handoff(self, event: HandoffEvent) -> None:
        """Tell every plugin of one step of a handoff."""
        self._calls.tell("disagg_on_handoff", {"event": event})


class PreferredTransport:
    """The built-in choice: the first offered transport that can reach the peer."""

    @hookimpl
    def disagg_select_transport(self, pair: HandoffPair, offered: Offered) -> str | None:
        """See ``hookspecs.disagg_select_transport``."""
        return next((name for name, can in offered if _reaches(can, pair)), None)


def choose_transport(
    host: PluginHost, pair: HandoffPair, offered: Offered, preference: Sequence[str]
) -> str:
    """Return the name of the transport for one handoff.

    Args:
        host: The plugins, which are asked first.
        pair: The two ends.
        offered: What both ends can speak.
        preference: ``handoff.transports`` of the policy: transports that are not named are not
            used.

    Raises:
        TransportError: None of the offered and allowed transports can reach the peer.
    """
    given = dict(offered)
    allowed = [
        (name, given[name]) for name in preference if name in given and _reaches(given[name], pair)
    ]
    if not allowed:
        where = "on one host" if pair.same_host else "on two hosts"
        raise TransportError(
            "choice",
            f"the two workers {where} share {_listed(given)}, the policy allows "
            f"{_listed(preference)}: none of these can carry the handoff; name one that can in "
            "handoff.transports",
        )
    return host.connector.select_transport(pair, allowed) or allowed[0][0]


def _reaches(can: TransportCapabilities, pair: HandoffPair) -> bool:
    return can.same_host if pair.same_host else can.cross_host


def _listed(names: Sequence[str] | dict[str, TransportCapabilities]) -> str:
    return ", ".join(names) or "no transport"
