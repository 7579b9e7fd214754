"""Looks at the evidence every few seconds, on a thread of its own, and carries out commands.

The memory may block for seconds and a verdict takes tenths of one: nothing of that happens on the
gateway's loop. One thread does all of it, one thing at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from disagg_plugins.canary.answer import compare
from disagg_plugins.canary.case import Compared
from disagg_plugins.canary.keeper import View, command
from disagg_plugins.canary.progress import Progress
from disagg_plugins.canary.rollout import Instant
from disagg_plugins.canary.shadow import Pair
from disagg_plugins.errors import ConfigError, DamagedState, StoreError

if TYPE_CHECKING:
    from disagg_plugins.canary.case import Case
    from disagg_plugins.canary.guardrail import Guardrail
    from disagg_plugins.canary.guardrails import Judgement
    from disagg_plugins.canary.keeper import Keeper
    from disagg_plugins.canary.metrics import Outcome
    from disagg_plugins.canary.parity import ParityJudgement
    from disagg_plugins.canary.progress import Decision, Epoch
    from disagg_plugins.canary.rollout import Plan, Rollout
    from disagg_plugins.canary.store import Store

    Seen = tuple[Epoch, Outcome | Compared | Pair]

log = logging.getLogger(__name__)

T = TypeVar("T")

Do = Literal["start", "approve", "hold", "resume", "rollback"]
DOS: tuple[Do, ...] = ("start", "approve", "hold", "resume", "rollback")
"""What people may command."""

REPORT_S = 2.0
"""A report is good for so long: making one takes tenths of a second of the machine."""

HISTORY_S = 30.0
"""Between two points of the history; each needs a report."""

MOST_HISTORY = 1_000
"""Points kept: 8 hours of a rollout."""

MOST_DECISIONS = 100


MEMORY_ERRORS = (StoreError, DamagedState, ConfigError)
"""What reading or writing the memory may raise."""


def instant() -> Instant:
    """Return this moment."""
    return Instant(time.time(), time.monotonic())


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known at one moment; see ``Keeper.report``."""

    at_s: float
    case: Case
    judgement: Judgement
    parity: ParityJudgement | None
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One point of the history: figures of each guardrail, by its name.

    Attributes:
        figures: Of the baseline (None: it has none), and of the candidate, each as estimate, low
            and high; and what is allowed.
    """

    at_s: float
    rollout: int
    weight: int
    figures: dict[str, tuple[Triple | None, Triple, float | None]]


Triple = tuple[float | None, float, float]


def act(rollout: Rollout, do: Do, now: Instant, by: str, why: str) -> tuple[Rollout, Decision]:
    """Return the rollout after a person's command, and the decision.

    Raises:
        RolloutRefused: The rollout does not allow it now.
    """
    if do == "start":
        return rollout.start(now, by, why)
    if do == "approve":
        return rollout.approve(now, by, why)
    if do == "resume":
        return rollout.resume(now, by, why)
    if do == "hold":
        return rollout.hold(now, by, why or f"held by {by}")
    return rollout.abort(now, by, why or f"rolled back by {by}")


class Lookout:
    """See the module.

    Args:
        keeper: This gateway's part in the rollout.
        store: The rollout's memory.
        plan: Its plan.
        look_s: Interval of looks.
        tie_gap: See ``answer.compare``.
        seen: Returns what was seen since it was last asked; called on the loop.
        looked: Told of each view, on the loop.

    Attributes:
        view: After the last look.
        history: The figures of this rollout, over time.
    """

    def __init__(
        self,
        keeper: Keeper,
        store: Store,
        plan: Plan,
        *,
        look_s: float,
        tie_gap: float,
        seen: Callable[[], Sequence[Seen]],
        looked: Callable[[View], object],
    ) -> None:
        self._keeper, self._store, self._plan = keeper, store, plan
        self._look_s, self._tie_gap = look_s, tie_gap
        self._seen, self._looked = seen, looked
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disagg-canary")
        self._wake = asyncio.Event()
        self._report: Report | None = None
        self._reporting = asyncio.Lock()
        self._history_s = float("-inf")
        self.view = View(Progress(), 0)
        self.history: deque[Point] = deque(maxlen=MOST_HISTORY)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            self._wake.clear()
            try:
                async with asyncio.timeout(self._look_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def look(self) -> View:
        """Look once; whatever goes wrong, there is a view."""
        try:
            # in its turn, though who waits be cancelled: what it holds would not be counted
            view, point = await asyncio.shield(self._on_thread(self._look, list(self._seen())))
        except Exception as exc:  # the requests go on, at the weight that is known
            log.exception("the look at the canary's evidence failed")
            trouble = f"the look failed: {type(exc).__name__}: {exc}"
            view, point = replace(self.view, leads=False, trouble=trouble), None
        if view.trouble and view.trouble != self.view.trouble:
            log.warning("the canary's memory cannot be used: %s", view.trouble)
        if self.history and self.history[-1].rollout != view.progress.rollout:
            self.history.clear()
        if point is not None:
            self.history.append(point)
        if view.progress.decisions != self.view.progress.decisions:
            self._report = None  # it lacks the newest decision
        self.view = view
        try:
            self._looked(view)
        except Exception:  # the next look tries again
            log.exception("a view of the canary could not be followed")
        return view

    async def act(self, do: Do, by: str, why: str) -> Decision:
        """Carry out a person's command, and look; cancelled before its turn, it is not carried out.

        Raises:
            RolloutRefused: The rollout does not allow it now.
            StoreError: It could not be written.
            DamagedState: What is stored cannot be.
        """

        def decide() -> Decision:
            decision = command(self._store, self._plan, lambda r: act(r, do, instant(), by, why))
            log.warning("canary: %s by %r: %r", do, by, why or "no reason given")
            return decision

        decision = await self._on_thread(decide)
        self._report = None
        await self.look()
        return decision

    async def report(self) -> Report:
        """Return all that is known, at most ``REPORT_S`` old."""
        async with self._reporting:  # who asks meanwhile gets the same one: looks wait for each
            report = self._report
            if report is None or time.monotonic() - report.at_s > REPORT_S:
                report = await self._on_thread(self._make_report)
                self._report = report
            return report

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    async def close(self) -> None:
        """Count what was seen, let another gateway lead, and let go of the memory."""
        await self.look()
        try:
            await self._on_thread(self._end)
        except MEMORY_ERRORS as exc:
            log.warning("the canary's memory could not be told of the end: %s", exc)
        finally:
            self._thread.shutdown(wait=False)

    def _on_thread(self, do: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, do, *args)

    # On the thread

    def _look(self, seen: Iterable[Seen]) -> tuple[View, Point | None]:
        now = instant()
        plain = [(epoch, self._compared(x) if isinstance(x, Pair) else x) for epoch, x in seen]
        before = self.view.progress.epoch
        view = self._keeper.look(now, plain)
        changed = view.progress.epoch != before
        if not view.progress.active or not (changed or now.mono_s - self._history_s >= HISTORY_S):
            return view, None
        self._history_s = now.mono_s
        try:
            return view, _point(now.wall_s, view, self._keeper.report()[1])
        except Exception:  # what was decided holds all the same
            log.exception("a point of the canary's history could not be made")
            return view, None

    def _compared(self, pair: Pair) -> Compared:
        difference = compare(pair.original, pair.answer, tie_gap=self._tie_gap)
        return Compared(pair.copy.arm, pair.copy.original.prompt_tokens, difference)

    def _make_report(self) -> Report:
        decisions: tuple[Decision, ...] = ()
        try:
            decisions = tuple(self._store.decisions(most=MOST_DECISIONS))
        except MEMORY_ERRORS as exc:
            log.info("the canary's log cannot be read: %s", exc)
        case, judgement, parity = self._keeper.report()
        return Report(time.monotonic(), case, judgement, parity, decisions)

    def _end(self) -> None:
        try:
            self._keeper.close()
        finally:
            self._store.close()


def _point(at_s: float, view: View, judgement: Judgement) -> Point:
    figures: dict[str, tuple[Triple | None, Triple, float | None]] = {}
    for verdict in judgement.verdicts:
        baseline = verdict.baseline
        ours = None if baseline is None else (baseline.estimate, baseline.low, baseline.high)
        candidate = verdict.candidate
        theirs = (candidate.estimate, candidate.low, candidate.high)
        figures[title(verdict.guardrail)] = (ours, theirs, verdict.allowed)
    return Point(at_s, view.progress.rollout, view.weight, figures)


def title(guardrail: Guardrail) -> str:
    """Return the name of a guardrail that no other one has."""
    return guardrail.name if guardrail.limit is None else f"{guardrail.name} limit"
