"""One gateway's part in a shared rollout: it counts, follows, and decides when it leads.

``look`` is called every few seconds, on a thread, as the store may block. It writes what this
gateway counted, reads how far the rollout is, and, where this gateway holds the lease, judges the
evidence of all gateways and moves the rollout. What a look decides holds for all gateways from
their next look on.

When the memory fails
---------------------
Nothing is promoted, and the traffic stays where it was (``View.trouble`` says why): the store may
be away for a moment, and to drop a candidate that is healthy would move traffic for no reason. But
a gateway can still see what happens to its own requests: if these alone condemn the candidate, it
takes its own traffic back at once, and writes the rollback down when the store is back. (That is a
test of its own, with the level of a step, in each gateway that loses its store.) Evidence is
counted on meanwhile. Damage is no new beginning: a memory that went back to an earlier state is
held, or aborted if the rollout was over already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from disagg_plugins.canary.guardrails import Judgement
from disagg_plugins.canary.progress import Progress
from disagg_plugins.canary.rollout import Rollout
from disagg_plugins.errors import ConfigError, DamagedState, StoreConflict, StoreError

if TYPE_CHECKING:
    from disagg_plugins.canary.case import Case, Compared, Terms
    from disagg_plugins.canary.metrics import Outcome
    from disagg_plugins.canary.parity import ParityJudgement
    from disagg_plugins.canary.progress import Decision, Epoch
    from disagg_plugins.canary.rollout import Instant, Plan
    from disagg_plugins.canary.store import Lease, Store, Stored

    Act = Callable[[Rollout], tuple[Rollout, Decision]]

TRIES = 5
"""Of a person's command that others' writes came before: a leader writes every few seconds."""


@dataclass(frozen=True, slots=True)
class View:
    """What a gateway knows after a look.

    Attributes:
        progress: How far the rollout is, as far as is known.
        weight: Percent of the traffic that this gateway gives the candidate; 0 as long as the
            memory was never read.
        leads: Whether this gateway decided.
        lacks: What keeps the next step away, in words; of the leader only.
        trouble: Why the memory cannot be used; nothing is promoted then.
    """

    progress: Progress
    weight: int
    leads: bool = False
    lacks: tuple[str, ...] = ()
    trouble: str | None = None

    @property
    def epoch(self) -> Epoch:
        """What a request that arrives now belongs to."""
        return self.progress.epoch


class Keeper:
    """See the module. One thread at a time.

    Args:
        store: Shared with the other gateways.
        plan: The same in all of them.
        terms: What the candidate is judged by at one step (``Plan.step_level``); as above.
        gateway: This gateway's name: unique, and the same after a restart.
        writer: Unique to this process, such as a random number.
        lease_s: After so long without a look another gateway decides.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        terms: Terms,
        *,
        gateway: str,
        writer: str,
        lease_s: float,
    ) -> None:
        self._store = store
        self._plan = plan
        self._terms = terms
        self._gateway, self._writer, self._lease_s = gateway, writer, lease_s
        self._known: Stored | None = None
        self._ours = terms.empty()  # what this gateway counted in the epoch of ``_known``
        self._adopted = False
        self._condemned: Judgement | None = None  # by this gateway alone, not written down yet
        self._last: Instant | None = None  # look that wrote revision ``_written``
        self._written = 0
        self._lease: Lease | None = None

    def look(self, now: Instant, outcomes: Iterable[tuple[Epoch, Outcome | Compared]] = ()) -> View:
        """Count, follow and, as leader, decide.

        Args:
            now: The time.
            outcomes: What ended since the last look, in the order of ``cohort``, and the pairs that
                came together, each with the epoch of the view at its arrival: what arrived in
                another step says nothing here.
        """
        for epoch, outcome in outcomes:
            if self._known is not None and epoch == self._known.progress.epoch:
                self._ours.observe(outcome)
        try:
            try:
                return self._look(now)
            except StoreConflict:  # others may write between our reading and our writing
                return self._look(now)
        except (StoreError, DamagedState, ConfigError) as exc:
            self._lease = None
            return self._alone(str(exc))

    def report(self) -> tuple[Case, Judgement, ParityJudgement | None]:
        """Return all the evidence and its numbers; takes tenths of a second.

        Of all gateways, as far as the memory can be read; else of this one alone. Where no rollout
        is under way, it is what this gateway saw since it started or the last one ended.
        """
        case = self._ours
        known = self._known
        if known is not None and known.progress.active:
            with contextlib.suppress(StoreError, DamagedState, ConfigError):
                case, _ = self._gather(known.progress.epoch)
        return (case, *case.judge())

    def close(self) -> None:
        """Let another gateway lead at once; the store stays open."""
        lease, self._lease = self._lease, None
        if lease is not None:
            self._store.resign(lease)

    def _look(self, now: Instant) -> View:
        stored = self._follow(now)
        progress = stored.progress
        if not progress.active:
            return View(progress, progress.weight)
        if progress.plan == self._plan.fingerprint:
            self._share(progress.epoch)
        if self._condemned is not None:
            stored = self._write_condemnation(now, stored, self._condemned)
            return View(stored.progress, stored.progress.weight)
        self._lease = self._store.lead(self._gateway, self._lease_s)
        if self._lease is None:
            return View(progress, progress.weight)
        return self._lead(now, stored, self._lease)

    def _follow(self, now: Instant) -> Stored:
        """Read how far the rollout is; evidence begins anew with a new epoch."""
        stored, known = self._store.load(), self._known
        if known is not None and stored.revision < known.revision and stored.progress.active:
            stored = self._went_back(now, stored, known)
        if known is None or stored.progress.epoch != known.progress.epoch:
            self._ours, self._adopted, self._condemned = self._terms.empty(), False, None
        self._known = stored
        return stored

    def _went_back(self, now: Instant, stored: Stored, known: Stored) -> Stored:
        rollout = Rollout(self._plan, stored.progress)
        why = f"the memory went back from revision {known.revision} to {stored.revision}"
        if not known.progress.active:
            return self._commit(stored, rollout.abort(now, "store", why))
        if stored.progress.phase == "held":
            return stored
        return self._commit(stored, rollout.hold(now, "store", why))

    def _share(self, epoch: Epoch) -> None:
        """Write what this gateway counted, after taking over what it counted before a restart."""
        if not self._adopted:
            before = self._store.adopt(epoch, self._gateway, self._writer)
            if before is not None:
                earlier = self._terms.load(before)
                earlier.merge(self._ours)
                self._ours = earlier
            self._adopted = True
        self._store.contribute(epoch, self._gateway, self._writer, self._ours.as_dict())

    def _lead(self, now: Instant, stored: Stored, lease: Lease) -> View:
        # another process looked meanwhile: this one's monotonic clock says nothing of it
        last = self._last if stored.revision == self._written else None
        rollout = Rollout(self._plan, stored.progress, last)
        case: Case | None = None
        damage: str | None = None
        if stored.progress.plan == self._plan.fingerprint:
            case, damage = self._gather(stored.progress.epoch)
        quick = _judged(case, damage)
        moved, decision = rollout.tick(now, quick)
        if decision is not None and case is not None and quick is not None:
            full, _ = case.judge()  # all the numbers, for the log
            moved, decision = rollout.tick(now, replace(quick, reasons=full.reasons))
        decisions = [decision] if decision is not None else []
        if damage is not None and moved.progress.phase in ("running", "awaiting"):
            moved, held = moved.hold(now, "store", damage)
            decisions.append(held)
        revision = self._store.commit(
            moved.progress, decisions, revision=stored.revision, lease=lease
        )
        self._written, self._last = revision, now
        if moved.progress.epoch != stored.progress.epoch or not moved.progress.active:
            self._ours, self._adopted = self._terms.empty(), False
        self._known = replace(stored, progress=moved.progress, revision=revision)
        same = moved.progress.epoch == stored.progress.epoch
        judged = quick if same else Judgement("wait", (), ())  # of a step that has no evidence yet
        lacks = moved.lacks(now, judged) if moved.progress.active else ()
        return View(moved.progress, moved.progress.weight, leads=True, lacks=lacks)

    def _gather(self, epoch: Epoch) -> tuple[Case, str | None]:
        """Return what all gateways counted together, and what of it was damaged."""
        total, damage = self._terms.empty(), None
        for gateway, evidence in self._store.evidence(epoch).items():
            try:
                total.merge(self._terms.load(evidence))
            except DamagedState as exc:
                damage = f"the evidence of gateway {gateway}: {exc}"
        return total, damage

    def _alone(self, trouble: str) -> View:
        """Return the view without a memory."""
        if self._known is None:
            return View(Progress(), 0, trouble=trouble)
        progress = self._known.progress
        if progress.active and self._condemned is None and self._ours.decide() == "rollback":
            self._condemned, _ = self._ours.judge()
        weight = 0 if self._condemned is not None else progress.weight
        return View(progress, weight, trouble=trouble)

    def _write_condemnation(self, now: Instant, stored: Stored, judgement: Judgement) -> Stored:
        moved, decision = Rollout(self._plan, stored.progress).tick(now, judgement)
        if decision is None:  # what is over needs none
            return stored
        result = self._commit(stored, (moved, decision))
        self._known, self._condemned = result, None
        return result

    def _commit(self, stored: Stored, made: tuple[Rollout, Decision]) -> Stored:
        moved, decision = made
        revision = self._store.commit(
            moved.progress, [decision], revision=stored.revision, lease=None
        )
        return replace(stored, progress=moved.progress, revision=revision)


def _judged(case: Case | None, damage: str | None) -> Judgement | None:
    """Return what the evidence says in short; of damaged evidence only that it is bad."""
    if case is None:
        return None
    action = case.decide()
    if damage is not None and action != "rollback":
        return None
    return Judgement(action, (), ())


def command(store: Store, plan: Plan, act: Act) -> Decision:
    """Carry out a person's command, from any process.

    Args:
        store: The rollout's memory.
        plan: Its plan.
        act: Such as ``lambda rollout: rollout.hold(now, by, why)``; it may be called again.

    Raises:
        RolloutRefused: The rollout does not allow it now.
        StoreError: It could not be written.
        DamagedState: What is stored cannot be.
    """
    left = TRIES
    while True:
        stored = store.load()
        moved, decision = act(Rollout(plan, stored.progress))
        left -= 1
        try:
            store.commit(moved.progress, [decision], revision=stored.revision, lease=None)
        except StoreConflict:
            if not left:
                raise
        else:
            return decision
