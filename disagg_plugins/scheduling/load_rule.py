"""Split when a prefill worker would be done before a decode worker could read without harm.

In tokens of reading at full speed, so that nothing needs to be measured:

- split: ``queue(prefill) + prompt + min_prompt_tokens``. What waits on the prefill worker is read
  first; the handoff costs as much as reading ``scheduler.split.min_prompt_tokens``, since from
  there on moving pays.
- local: ``(queue(decode) + prompt) * STEP_TOKENS / slack``. A decode worker with answers to write
  may read only ``slack`` tokens a step without slowing them, where an idle one reads
  ``STEP_TOKENS``; each running request takes a token of the slack for itself.

The smaller number wins. An idle decode worker has no answers to harm, so there nothing is split.
"""

from __future__ import annotations

from disagg_plugins import hookimpl
from disagg_plugins.policy import Policy, SchedulerPolicy
from disagg_plugins.scheduling.candidates import Candidates
from disagg_plugins.types import FleetView, RequestProfile, Role, SplitDecision, Worker, WorkerLoad

STEP_TOKENS = 2048
"""Tokens that a step reads at full speed: vLLM's default ``max_num_batched_tokens``."""

HARMLESS_TOKENS = 512
"""Tokens of a mixed step that decoding requests hardly feel. A decode step waits for memory, so
arithmetic is free up to about the hardware's ratio of both; Sarathi-Serve (OSDI 2024) takes chunks
of 512 for a strict TBT."""

LEAST_SLACK_TOKENS = 32
"""Left to a prompt on a worker full of answers: engines do not starve it."""


class LoadRule:
    """Weighs the queue of the prefill workers against the slack of the decode workers."""

    def __init__(self) -> None:
        self._set(SchedulerPolicy())

    def _set(self, rules: SchedulerPolicy) -> None:
        self._handoff_tokens = rules.split.min_prompt_tokens
        self._prefills = Candidates(rules.candidates)
        self._decodes = Candidates(rules.candidates)

    @hookimpl
    def disagg_on_start(self, policy: Policy) -> None:
        """See ``hookspecs.disagg_on_start``."""
        self._set(policy.scheduler)

    @hookimpl
    def disagg_select_split(self, profile: RequestProfile, fleet: FleetView) -> SplitDecision:
        """See ``hookspecs.disagg_select_split``."""
        if profile.unsplittable is not None:
            return SplitDecision(False, f"cannot be split: {profile.unsplittable}")
        split = [
            fleet.load(w).prompt_tokens + _unread(profile, w) + self._handoff_tokens
            for w in self._prefills.of(fleet.serving(Role.PREFILL))
            if w.handoffs
        ]
        if not split:
            return SplitDecision(False, "no healthy prefill worker")
        local = [
            _local_tokens(fleet.load(w), _unread(profile, w))
            for w in self._decodes.of(fleet.serving(Role.DECODE))
            if w.whole
        ]
        if not local:
            return SplitDecision(True, "no decode worker here reads prompts")
        there, here = min(split), min(local)
        numbers = (
            f"a prefill worker is done after the time of {there} tokens, a decode worker could "
            f"read without harm in that of {here}"
        )
        if there < here:
            return SplitDecision(True, f"splitting: {numbers}")
        return SplitDecision(False, f"staying local: {numbers}")


def _unread(profile: RequestProfile, worker: Worker) -> int:
    return max(0, profile.prompt_tokens - profile.cached_tokens.get(worker.name, 0))


def _local_tokens(load: WorkerLoad, tokens: int) -> int:
    queue = load.prompt_tokens + tokens
    running = max(0, load.requests - load.prefills)
    if not running:
        return queue
    slack = max(LEAST_SLACK_TOKENS, HARMLESS_TOKENS - running)
    return queue * STEP_TOKENS // slack
