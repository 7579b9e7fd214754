"""Scripts of events and commands: a test of a sans-IO machine reads like its sequence diagram.

::

    Script(Flow())
        .on(Started("relay")).expect(SendPrefill())
        .on(ClientGone()).expect(Cancel("prefill"), Finish("client_gone"))
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

E_contra = TypeVar("E_contra", contravariant=True)
C = TypeVar("C")


class Machine(Protocol[E_contra, C]):
    """Anything that takes an event and returns commands."""

    def on(self, event: E_contra, /) -> list[C]:
        """Take an event; return commands."""
        ...


class Script(Generic[E_contra, C]):
    """Drives a machine and compares what it answers."""

    def __init__(self, machine: Machine[E_contra, C]) -> None:
        self.machine = machine
        self._answered: list[C] | None = None
        self._event: E_contra | None = None

    def on(self, event: E_contra) -> Script[E_contra, C]:
        """Feed an event.

        Raises:
            AssertionError: Commands of the event before were not expected by anyone.
        """
        if self._answered:
            raise AssertionError(f"{self._event!r} answered {self._answered!r}, nobody expected it")
        self._event = event
        self._answered = self.machine.on(event)
        return self

    def expect(self, *commands: object) -> Script[E_contra, C]:
        """Compare the answer to the last event with ``commands``, all of them, in order.

        Raises:
            AssertionError: They differ.
        """
        if self._answered != list(commands):
            raise AssertionError(
                f"on {self._event!r}\n  expected {list(commands)!r}\n  answered {self._answered!r}"
            )
        self._answered = None
        return self
