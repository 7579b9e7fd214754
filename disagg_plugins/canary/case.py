"""All the evidence of one step: what the guardrails count, and what pairs of answers show (pure).

Parity takes part as one more guardrail: of n guardrails and parity, each has its share of the level
(union bound). It condemns. A step waits until enough pairs were looked at for damage that shows in
most answers to have condemned, and for as long as answers differ more than they may; it does not
wait for a proof that two arms say the same, which needs far more pairs than a step has copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from disagg_plugins.canary.guardrails import Guardrails, Judgement
from disagg_plugins.canary.parity import Parity, ParityJudgement
from disagg_plugins.canary.state import known

if TYPE_CHECKING:
    from disagg_plugins.canary.answer import Difference
    from disagg_plugins.canary.guardrail import Guardrail
    from disagg_plugins.canary.guardrails import Action
    from disagg_plugins.canary.metrics import Arm, Outcome
    from disagg_plugins.canary.parity import Allowed


@dataclass(frozen=True, slots=True)
class Compared:
    """A pair of answers; the request itself went to the baseline.

    Attributes:
        arm: Where the copy went.
        prompt_tokens: Of its prompt.
        difference: Between the answers; None: the copy was never answered.
    """

    arm: Arm
    prompt_tokens: int
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Terms:
    """What a candidate is judged by.

    Args:
        guardrails: See ``guardrails``.
        level: Of one step.
        parity: What answers may differ by; None: they are not compared.
    """

    guardrails: tuple[Guardrail, ...]
    level: float
    parity: Allowed | None = None

    def empty(self) -> Case:
        """Return a case without evidence."""
        if self.parity is None:
            return Case(self, Guardrails(self.guardrails, self.level), None)
        share = self.level / (len(self.guardrails) + 1)
        guardrails = Guardrails(self.guardrails, self.level - share)
        return Case(self, guardrails, Parity(self.parity, share))

    def load(self, state: object) -> Case:
        """Return the case of ``Case.as_dict``, for the same terms.

        Raises:
            DamagedState: It is anything else, or was gathered for others.
        """
        plain = known(state, ("guardrails", "parity"), "the evidence of a step")
        empty = self.empty()
        guardrails = Guardrails.from_dict(
            plain["guardrails"], self.guardrails, empty.guardrails.level
        )
        parity = None
        if empty.parity is not None:
            allowed, level = empty.parity.allowed, empty.parity.level
            parity = Parity.from_dict(plain["parity"], allowed, level)
        return Case(self, guardrails, parity)


class Case:
    """The evidence of one step; made by ``Terms``.

    Attributes:
        guardrails: What requests showed.
        parity: What pairs showed; None: they are not compared.
    """

    __slots__ = ("_terms", "guardrails", "parity")

    def __init__(self, terms: Terms, guardrails: Guardrails, parity: Parity | None) -> None:
        self._terms = terms
        self.guardrails, self.parity = guardrails, parity

    def observe(self, seen: Outcome | Compared) -> None:
        """Count one request, or one pair.

        Raises:
            ValueError: A number of it cannot be; nothing is counted then.
        """
        if not isinstance(seen, Compared):
            self.guardrails.observe(seen)
        elif self.parity is None:
            return
        elif seen.difference is None:
            self.parity.lose(seen.arm)
        else:
            self.parity.observe(seen.arm, seen.prompt_tokens, seen.difference)

    def merge(self, other: Case) -> None:
        """Add what another gateway counted of the same step.

        Raises:
            ValueError: It was gathered for other terms.
        """
        self.guardrails.merge(other.guardrails)
        if self.parity is not None and other.parity is not None:
            self.parity.merge(other.parity)

    def decide(self) -> Action:
        """Return what to do; takes some milliseconds, so not for each request."""
        if self.parity is not None and self.parity.decide() == "worse":
            return "rollback"
        action = self.guardrails.decide()
        if action == "promote" and self.parity is not None and self.parity.waits_for():
            return "wait"
        return action

    def judge(self) -> tuple[Judgement, ParityJudgement | None]:
        """Return the same with all the numbers; takes tenths of a second, so for people."""
        judgement = self.guardrails.judge()
        if self.parity is None:
            return judgement, None
        parity = self.parity.judge()
        if parity.answer == "worse":
            reasons: Sequence[str] = parity.reasons
            if judgement.action == "rollback":
                reasons = (*judgement.reasons, *parity.reasons)
            judgement = replace(judgement, action="rollback", reasons=tuple(reasons))
        elif judgement.action != "rollback" and (waits := self.parity.waits_for()):
            told = judgement.reasons if judgement.action == "wait" else ()
            judgement = replace(judgement, action="wait", reasons=(*told, *waits))
        return judgement, parity

    def as_dict(self) -> dict[str, object]:
        """Return the evidence as plain values, for JSON."""
        parity = None if self.parity is None else self.parity.as_dict()
        return {"guardrails": self.guardrails.as_dict(), "parity": parity}
