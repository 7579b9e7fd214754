"""The rollout as a state machine: what evidence, people and clocks do to the traffic (pure).

Rules
-----
- The candidate's weight is that of a step, or 0. It grows only by ``promote``, one step at a time,
  and by ``start``.
- ``promote`` needs all of: the phase ``running``, the bake time of this step, a judgement of this
  step's evidence that says so, no freeze, trusted clocks, and the approval of a person where the
  plan asks for one.
- ``rollback`` needs a judgement that says so, and nothing else: neither hold, freeze nor a clock
  that jumps stands in its way. Then only a person starts anew.
- At the last step the baseline serves nothing, so nothing can be compared any more; limits still
  roll back. The rollout is ``completed`` after that step's bake time.

Evidence begins anew with each step
-----------------------------------
What is asked at 25 % is whether the candidate holds *under that load*; requests that it served at
1 % do not answer that, and they would water down those that do. A reset is a new test with a new
chance of error, so its number must be bounded, and its time must not be anybody's choice: evidence
ends with ``promote`` alone, never with hold, resume, restart or a change of leader. Each step's
promise holds whatever came before it (it is about requests that are still to come), so with each of
k steps judged at level / k, a candidate that is nowhere worse is rolled back in the whole rollout
with a chance of at most ``level``, and a bad one passes the first step at which it is bad with a
chance of at most level / k. That costs log(k) of evidence a step: a third to a half more requests
at five steps. A request belongs to the step in which it arrived.

Clocks
------
Within a process time is measured with the monotonic clock; the wall clock must agree. Where another
process looked last (a restart, another leader), there is the wall clock alone. If it went back, or
on by more than ``max_gap_s``, nobody knows how long the step was watched: the rollout is held, and
a person looks. The time between two looks counts up to ``max_gap_s``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from disagg_plugins.canary.progress import (
    LATEST_WALL_S,
    MOST_STEPS,
    MOST_TEXT,
    Decision,
    Progress,
)
from disagg_plugins.errors import RolloutRefused

if TYPE_CHECKING:
    from disagg_plugins.canary.freeze import Freeze
    from disagg_plugins.canary.guardrails import Judgement
    from disagg_plugins.canary.progress import Kind, Phase

SKEW_S = 5.0
"""The wall clock may differ so much from the monotonic one between two looks, and between two
gateways: far more than NTP leaves, far less than a bake."""


@dataclass(frozen=True, slots=True)
class Instant:
    """One moment on two clocks.

    Args:
        wall_s: Seconds since 1970.
        mono_s: Seconds of a clock that never jumps, of this process.

    Raises:
        ValueError: A clock cannot show this.
    """

    wall_s: float
    mono_s: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.wall_s <= LATEST_WALL_S or not math.isfinite(self.mono_s):
            raise ValueError(f"no clock shows {self.wall_s!r} s and {self.mono_s!r} s")


@dataclass(frozen=True, slots=True)
class Plan:
    """How the traffic is moved.

    Args:
        steps: Percent of the traffic, growing, up to 100.
        bake_s: Least time at each step.
        approval: Whether a person approves each step after the first.
        freezes: When nothing is promoted.
        max_gap_s: See the module.
        fingerprint: Of all that the evidence depends on. Progress with another one is not gone on
            with: it is held until a person starts anew.

    Raises:
        ValueError: The steps are none.
    """

    steps: tuple[int, ...]
    bake_s: float
    approval: bool = False
    freezes: tuple[Freeze, ...] = ()
    max_gap_s: float = 300.0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if problem := steps_problem(self.steps):
            raise ValueError(problem)
        if not 0.0 <= self.bake_s < math.inf or not SKEW_S <= self.max_gap_s < math.inf:
            raise ValueError(f"a bake of {self.bake_s!r} s, a gap of {self.max_gap_s!r} s")

    def step_level(self, level: float) -> float:
        """Return the level at which one step is judged, of that of the whole rollout."""
        return level / len(self.steps)

    def frozen(self, wall_s: float) -> str | None:
        """Return the freeze that covers a time, in words, or None."""
        return next((freeze.words() for freeze in self.freezes if freeze.covers(wall_s)), None)


def steps_problem(steps: Sequence[int]) -> str | None:
    """Return what is wrong with steps in percent, or None."""
    if not 1 <= len(steps) <= MOST_STEPS:
        return f"between 1 and {MOST_STEPS} steps are needed"
    if steps[0] < 1 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        return "steps must grow, from 1 at least"
    return None if steps[-1] == 100 else f"the last step must be 100, not {steps[-1]}"


@dataclass(frozen=True, slots=True)
class Rollout:
    """The machine: a value; each call returns the next one and the decision that led there.

    Args:
        plan: How the traffic is moved.
        progress: Where it stands.
        last: When this process looked last, if nobody else did since; else None.
    """

    plan: Plan
    progress: Progress = Progress()
    last: Instant | None = None

    def tick(self, now: Instant, judgement: Judgement | None) -> tuple[Rollout, Decision | None]:
        """Look at the evidence; several times a minute.

        Args:
            now: The time.
            judgement: Of the evidence of ``progress.epoch``; None: it cannot be judged now, which
                never promotes.
        """
        progress = self.progress
        if not progress.active:
            return replace(self, last=now), None
        fault, elapsed_s = self._elapsed(now)
        seen = replace(
            progress,
            seen_wall_s=now.wall_s,
            baked_s=min(LATEST_WALL_S, progress.baked_s + elapsed_s),
        )
        following = replace(self, progress=seen, last=now)
        if judgement is not None and judgement.action == "rollback":
            why = judgement.reasons
            return following._decide(now, "rollback", "evidence", why, phase="rolled_back")
        if progress.phase == "held":
            return following, None
        if fault is not None:
            return following._held(now, "clock", fault)
        if self._foreign:
            return following._held(now, "plan", FOREIGN)
        if following._lacks(now, judgement):
            return following, None
        return following._forward(now, judgement)

    def lacks(self, now: Instant, judgement: Judgement | None) -> tuple[str, ...]:
        """Return, in words for people, what keeps the next step away; empty: nothing does."""
        if not self.progress.active:
            return (f"the rollout is {self.progress.phase}",)
        if self.progress.phase == "held":
            return (f"it is held: {self.progress.why}",)
        found = self._lacks(now, judgement)
        if self._asks_approval and not self.progress.approved:
            found += ("a person must approve",)
        return found

    def start(self, now: Instant, by: str, why: str = "") -> tuple[Rollout, Decision]:
        """Begin a rollout at the first step; one that ended is begun anew.

        Raises:
            RolloutRefused: One is under way, or there is a freeze.
        """
        self._demand("start", not self.progress.active)
        if frozen := self.plan.frozen(now.wall_s):
            raise RolloutRefused("start", f"nothing begins during the freeze {frozen}")
        progress = self.progress
        fresh = replace(
            progress,
            rollout=progress.rollout + 1,
            step=0,
            baked_s=0.0,
            seen_wall_s=now.wall_s,
            plan=self.plan.fingerprint,
        )
        begun = replace(self, progress=fresh, last=now)
        return begun._decide(now, "start", by, _told("begun", by, why), weight=self.plan.steps[0])

    def hold(self, now: Instant, by: str, why: str) -> tuple[Rollout, Decision]:
        """Keep the traffic where it is until ``resume``; evidence can still roll back.

        Raises:
            RolloutRefused: No rollout is under way, or it is held already.
        """
        self._demand("hold", self.progress.phase in ("running", "awaiting"))
        return self._held(now, by, why)

    def resume(self, now: Instant, by: str, why: str = "") -> tuple[Rollout, Decision]:
        """Go on after a hold; what was measured and baked stays.

        Raises:
            RolloutRefused: It is not held, or the plan is another one.
        """
        self._demand("resume", self.progress.phase == "held")
        if self._foreign:
            raise RolloutRefused("resume", FOREIGN)
        known = replace(self.progress, seen_wall_s=now.wall_s, why="")
        going = replace(self, progress=known, last=now)
        return going._decide(now, "resume", by, _told("resumed", by, why))

    def approve(self, now: Instant, by: str, why: str = "") -> tuple[Rollout, Decision]:
        """Approve the next step; it comes with the next look that finds nothing against it.

        Raises:
            RolloutRefused: No approval is awaited.
        """
        self._demand("approve", self.progress.phase == "awaiting")
        approved = replace(self, progress=replace(self.progress, approved=True))
        return approved._decide(now, "approve", by, _told("approved", by, why))

    def abort(self, now: Instant, by: str, why: str) -> tuple[Rollout, Decision]:
        """Take all traffic back, also after the rollout completed.

        Raises:
            RolloutRefused: The candidate has no traffic.
        """
        self._demand("abort", self.progress.weight > 0)
        return self._decide(now, "abort", by, (_short(why),), phase="aborted")

    @property
    def _foreign(self) -> bool:
        return self.progress.plan != self.plan.fingerprint

    @property
    def _at_end(self) -> bool:
        return self.progress.step == len(self.plan.steps) - 1

    @property
    def _asks_approval(self) -> bool:
        return self.plan.approval and not self._at_end

    def _demand(self, command: str, allowed: bool) -> None:
        if not allowed:
            raise RolloutRefused(command, f"the rollout is {self.progress.phase}")

    def _elapsed(self, now: Instant) -> tuple[str | None, float]:
        """Return what is wrong with the clocks, if anything, and the seconds that count."""
        wall_s = now.wall_s - (self.last.wall_s if self.last else self.progress.seen_wall_s)
        if self.last is None:
            if wall_s < -SKEW_S:
                return f"the wall clock is {-wall_s:.0f} s behind the last look", 0.0
            if wall_s > self.plan.max_gap_s:
                return (
                    f"nobody looked for {wall_s:.0f} s, or the wall clock leapt (at most "
                    f"{self.plan.max_gap_s:g} s)",
                    0.0,
                )
            return None, max(0.0, wall_s)
        mono_s = now.mono_s - self.last.mono_s
        if mono_s < 0.0:
            return f"the monotonic clock went back by {-mono_s:.3g} s", 0.0
        if abs(wall_s - mono_s) > SKEW_S:
            return f"the wall clock went on by {wall_s:.0f} s within {mono_s:.0f} s", 0.0
        return None, min(mono_s, self.plan.max_gap_s)

    def _lacks(self, now: Instant, judgement: Judgement | None) -> tuple[str, ...]:
        """Return what a promotion lacks besides approval."""
        found: list[str] = []
        left_s = self.plan.bake_s - self.progress.baked_s
        if left_s > 0.0:
            found.append(f"{left_s:.0f} s of {self.plan.bake_s:g} s of bake time are left")
        if judgement is None:
            found.append("the evidence cannot be judged now")
        if self._at_end:
            return tuple(found)  # nothing is compared, and what follows moves no traffic
        if frozen := self.plan.frozen(now.wall_s):
            found.append(f"frozen: {frozen}")
        if judgement is not None and judgement.action != "promote":
            found += judgement.reasons or (UNDECIDED,)
        return tuple(found)

    def _forward(
        self, now: Instant, judgement: Judgement | None
    ) -> tuple[Rollout, Decision | None]:
        """Make the step that nothing but perhaps an approval stands in the way of."""
        progress, plan = self.progress, self.plan
        reasons = judgement.reasons if judgement is not None else ()
        why = (f"{progress.baked_s:.0f} s watched at {progress.weight} %", *reasons)
        if self._at_end:
            return self._decide(now, "complete", "evidence", why, phase="completed")
        if plan.approval and not progress.approved:
            if progress.phase == "awaiting":
                return self, None
            return self._decide(now, "await", "evidence", why, phase="awaiting")
        step = progress.step + 1
        moved, decision = self._decide(now, "promote", "evidence", why, weight=plan.steps[step])
        beyond = replace(moved.progress, step=step, baked_s=0.0)
        return replace(moved, progress=beyond), decision

    def _held(self, now: Instant, by: str, why: str) -> tuple[Rollout, Decision]:
        held = replace(self, progress=replace(self.progress, why=_short(why)))
        return held._decide(now, "hold", by, (_short(why),), phase="held")

    def _decide(
        self,
        now: Instant,
        kind: Kind,
        by: str,
        why: Sequence[str],
        *,
        phase: Phase = "running",
        weight: int | None = None,
    ) -> tuple[Rollout, Decision]:
        before = self.progress
        to = before.weight if weight is None else weight
        if phase in ("rolled_back", "aborted"):
            to = 0
        after = replace(
            before,
            phase=phase,
            weight=to,
            approved=before.approved if phase == "running" and kind != "promote" else False,
            decisions=before.decisions + 1,
            why=before.why if phase == "held" else "",
        )
        decision = Decision(
            number=after.decisions,
            rollout=after.rollout,
            at_s=now.wall_s,
            kind=kind,
            by=_short(by),
            from_phase=before.phase,
            to_phase=phase,
            from_weight=before.weight,
            to_weight=to,
            step=before.step,
            baked_s=before.baked_s,
            why=tuple(_short(reason) for reason in why),
        )
        return replace(self, progress=after), decision


FOREIGN = (
    "the steps, the guardrails or the candidate are other ones than when it was started: abort it, "
    "and start anew"
)


UNDECIDED = "the evidence decides nothing yet"


def _told(what: str, by: str, why: str) -> tuple[str, ...]:
    return (f"{what} by {_short(by)}", *((why,) if why else ()))


def _short(text: str) -> str:
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 3] + "..."
