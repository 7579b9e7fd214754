"""How far a rollout is, and the records of what was decided (pure).

Both are stored as plain values. Reading them checks every bound: what is damaged is an error, and
nothing is promoted from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from disagg_plugins.canary.state import integer, known, number
from disagg_plugins.errors import DamagedState

Phase = Literal["pending", "running", "awaiting", "held", "completed", "rolled_back", "aborted"]
Kind = Literal[
    "start", "promote", "complete", "await", "approve", "hold", "resume", "rollback", "abort"
]

ACTIVE: frozenset[Phase] = frozenset({"running", "awaiting", "held"})
"""Phases in which evidence is gathered and can roll back."""

WEIGHTLESS: frozenset[Phase] = frozenset({"pending", "rolled_back", "aborted"})
"""Phases in which the candidate gets no request."""

LATEST_WALL_S = 253_000_000_000.0
"""In the year 9987: what a calendar can still tell."""

MOST_STEPS = 100
MOST_TEXT = 2_000
"""Characters of one reason that are kept."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """What evidence belongs to: one step of one rollout."""

    rollout: int
    step: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the rollout is.

    Attributes:
        phase: Where it stands.
        rollout: Number of the rollout, from 1; 0: none was ever started.
        step: Index of the step, from 0.
        weight: Percent of the traffic that the candidate gets.
        baked_s: Time watched at this step.
        seen_wall_s: The wall clock at the last look, in seconds since 1970.
        approved: Whether a person approved the next step.
        decisions: How many decisions were made; the number of the last one.
        plan: Fingerprint of the plan it was started with.
        why: Why it is held; empty otherwise.
    """

    phase: Phase = "pending"
    rollout: int = 0
    step: int = 0
    weight: int = 0
    baked_s: float = 0.0
    seen_wall_s: float = 0.0
    approved: bool = False
    decisions: int = 0
    plan: str = ""
    why: str = ""

    @property
    def active(self) -> bool:
        """Whether evidence is gathered and can roll back."""
        return self.phase in ACTIVE

    @property
    def epoch(self) -> Epoch:
        """What evidence gathered now belongs to."""
        return Epoch(self.rollout, self.step)

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values."""
        return {name: getattr(self, name) for name in Progress.__slots__}

    @staticmethod
    def from_dict(state: object) -> Progress:
        """Return the progress of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        plain = known(state, Progress.__slots__, "the rollout")
        phase = _phase(plain["phase"])
        result = Progress(
            phase=phase,
            rollout=integer(plain["rollout"], 0, None, "the number of the rollout"),
            step=integer(plain["step"], 0, MOST_STEPS, "the step"),
            weight=integer(plain["weight"], 0, 100, "the weight"),
            baked_s=number(plain["baked_s"], 0.0, LATEST_WALL_S, "the time watched"),
            seen_wall_s=number(plain["seen_wall_s"], 0.0, LATEST_WALL_S, "the last look"),
            approved=_flag(plain["approved"]),
            decisions=integer(plain["decisions"], 0, None, "the number of decisions"),
            plan=_text(plain["plan"]),
            why=_text(plain["why"]),
        )
        if (result.weight == 0) != (phase in WEIGHTLESS):
            raise DamagedState(f"the rollout is {phase} at {result.weight} %")
        return result


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision, as it stands in the log.

    Attributes:
        number: From 1, without gaps.
        rollout: Number of the rollout.
        at_s: The wall clock, in seconds since 1970.
        kind: What was decided.
        by: ``evidence``, ``clock``, ``store``, or the name of a person.
        from_phase: Before.
        to_phase: After.
        from_weight: Percent of the traffic before.
        to_weight: Percent of the traffic after.
        step: Index of the step at which it was made.
        baked_s: Time watched at that step.
        why: The reasons, with the numbers that made it.
    """

    number: int
    rollout: int
    at_s: float
    kind: Kind
    by: str
    from_phase: Phase
    to_phase: Phase
    from_weight: int
    to_weight: int
    step: int
    baked_s: float
    why: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return it as plain values."""
        plain: dict[str, object] = {name: getattr(self, name) for name in Decision.__slots__}
        return {**plain, "why": list(self.why)}

    @staticmethod
    def from_dict(state: object) -> Decision:
        """Return the decision of ``as_dict``.

        Raises:
            DamagedState: It is anything else.
        """
        plain = known(state, Decision.__slots__, "a decision")
        why = plain["why"]
        if not isinstance(why, list):
            raise DamagedState("the reasons of a decision are no list")
        return Decision(
            number=integer(plain["number"], 1, None, "the number of a decision"),
            rollout=integer(plain["rollout"], 0, None, "the number of the rollout"),
            at_s=number(plain["at_s"], 0.0, LATEST_WALL_S, "the time of a decision"),
            kind=_kind(plain["kind"]),
            by=_text(plain["by"]),
            from_phase=_phase(plain["from_phase"]),
            to_phase=_phase(plain["to_phase"]),
            from_weight=integer(plain["from_weight"], 0, 100, "the weight before"),
            to_weight=integer(plain["to_weight"], 0, 100, "the weight after"),
            step=integer(plain["step"], 0, MOST_STEPS, "the step"),
            baked_s=number(plain["baked_s"], 0.0, LATEST_WALL_S, "the time watched"),
            why=tuple(_text(reason) for reason in why),
        )


_PHASES: Mapping[object, Phase] = {phase: phase for phase in get_args(Phase)}
_KINDS: Mapping[object, Kind] = {kind: kind for kind in get_args(Kind)}


def _phase(value: object) -> Phase:
    found = _PHASES.get(value) if isinstance(value, str) else None
    if found is None:
        raise DamagedState(f"{value!r} is no phase of a rollout")
    return found


def _kind(value: object) -> Kind:
    found = _KINDS.get(value) if isinstance(value, str) else None
    if found is None:
        raise DamagedState(f"{value!r} is no kind of decision")
    return found


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise DamagedState(f"{value!r} is neither true nor false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise DamagedState(f"a text of at most {MOST_TEXT} characters is expected")
    return value
