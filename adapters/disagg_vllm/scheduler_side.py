"""The scheduler half of the connector: which blocks to publish, which to load, and when to wait.

Lives in vLLM's EngineCore process and never does I/O. It imports no engine: requests and
scheduler outputs are read by the attributes they have (vLLM 0.32 ``v1/core/sched/output.py``).

Rules:

* A prefill request reserves its staging before it is scheduled. While the bound is exceeded it
  waits (vLLM asks again every step), at most ``handoff.staging_wait_s``; then it runs unpublished
  and the decode worker computes the prompt itself.
* A reservation ends when every rank has reported the end of its publication.
* A decode request loads what its own prefix cache lacks, once. After a failed load, a preemption
  or a mismatch it computes like any other request.
* Every handoff that reached this worker is answered: published, loaded, released or aborted.
* Nothing here raises into the engine: a bad request is counted, told and served without a handoff.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from disagg_plugins.engine.params import HandoffParams, answer_params, read_params
from disagg_plugins.errors import AuthenticationError, DisaggError, UnsupportedEngineError
from disagg_plugins.handoff.prompts import prompt_digest
from disagg_vllm.steps import (
    LoadResult,
    LoadStep,
    PublishStep,
    ReleaseStep,
    StepPlan,
    StepResult,
)

if TYPE_CHECKING:
    from disagg_plugins.types import HandoffId

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class PrefillJob:
    """One request whose KV this worker publishes."""

    handoff_id: HandoffId
    ticket: str
    num_tokens: int
    prompt: str
    staged_bytes: int
    first_asked_s: float | None = None
    reserved: bool = False
    opened: bool = False
    block_ids: list[int] = field(default_factory=list)
    blocks_published: int = 0
    complete: bool = False


@dataclass(slots=True)
class DecodeJob:
    """One request whose KV this worker loads."""

    handoff_id: HandoffId
    params: HandoffParams
    num_prompt_tokens: int
    prompt: str = ""
    state: Literal["waiting", "loading", "done"] = "waiting"
    tokens_local: int = 0
    tokens_asked: int = 0
    ranks_left: int = 0
    results: list[LoadResult] = field(default_factory=list)


class SchedulerSide:
    """Decides for one engine what each step publishes and loads.

    Args:
        block_size_tokens: Tokens of one scheduler block.
        block_bytes: Bytes one block takes in one rank's staging area, over all layers.
        staging_bytes: The bound on one rank's staging area.
        staging_wait_s: How long a prefill waits for staging.
        tp_size: Ranks of this worker.
        verify: Checks a ticket for this worker and a step and returns its handoff id; raises
            ``DisaggError``.
        report: Takes a record for the gateway; must not block.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        block_size_tokens: int,
        block_bytes: int,
        staging_bytes: int,
        staging_wait_s: float,
        tp_size: int,
        verify: Callable[[str, Literal["prefill", "decode"]], HandoffId],
        report: Report,
        clock: Callable[[], float],
    ) -> None:
        self._block_size_tokens = block_size_tokens
        self._block_bytes = block_bytes
        self._staging_bytes = staging_bytes
        self._staging_wait_s = staging_wait_s
        self._tp_size = tp_size
        self._verify = verify
        self._report = report
        self._clock = clock
        self._prefills: dict[str, PrefillJob] = {}
        self._decodes: dict[str, DecodeJob] = {}
        self._seen: dict[str, None] = {}
        self._handoffs: dict[str, str] = {}
        self._reserved: dict[str, int] = {}
        self._ended: Counter[str] = Counter()
        self._plan = StepPlan()
        self.endpoints: list[dict[str, object]] = []
        self.counts: Counter[str] = Counter()

    @property
    def reserved_bytes(self) -> int:
        """Staging that is spoken for, in bytes of one rank."""
        return sum(self._reserved.values())

    @property
    def jobs(self) -> int:
        """Requests with a handoff that this half still remembers."""
        return len(self._prefills) + len(self._decodes)

    # Arrival -------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Read the handoff of a new request, if it has one; remember that it was looked at."""
        request_id = request.request_id
        if request_id in self._seen:
            return
        self._seen[request_id] = None
        try:
            params = read_params(getattr(request, "kv_transfer_params", None))
            if params is None:
                return
            handoff_id = self._verify(params.ticket, params.step)
            if handoff_id in self._handoffs:
                raise AuthenticationError(
                    f"handoff {handoff_id} is in use by request {self._handoffs[handoff_id]}; a "
                    "ticket is good for one request on each side"
                )
            if getattr(request, "lora_request", None) is not None:
                raise UnsupportedEngineError(
                    "the request uses a LoRA adapter, and adapters are not part of what the two "
                    "workers compare; it is not split"
                )
        except DisaggError as error:
            self.counts["rejected"] += 1
            logger.warning("request %s runs without a handoff: %s", request_id, error)
            return
        num_tokens, digest = request.num_prompt_tokens, digest_of(request)
        self._handoffs[handoff_id] = request_id
        if params.step == "prefill":
            blocks = -(-num_tokens // self._block_size_tokens)
            self._prefills[request_id] = PrefillJob(
                handoff_id,
                params.ticket,
                num_tokens,
                digest,
                blocks * self._block_bytes,
            )
        elif params.num_tokens != num_tokens or params.prompt not in ("", digest):
            self._reject_prompt(request_id, handoff_id, params, num_tokens)
        else:
            self._decodes[request_id] = DecodeJob(handoff_id, params, num_tokens, digest)

    def _reject_prompt(
        self, request_id: str, handoff_id: HandoffId, params: HandoffParams, num_tokens: int
    ) -> None:
        problem = (
            f"the prefill worker read another prompt ({params.num_tokens} tokens) than this worker "
            f"({num_tokens} tokens): tokenizer or chat template differ; the prompt is computed here"
        )
        self.counts["mismatched"] += 1
        self._handoffs.pop(handoff_id, None)
        logger.warning("request %s, handoff %s: %s", request_id, handoff_id, problem)
        self._release(handoff_id, params, failed=problem)
        self._report_failure(handoff_id, problem, tokens_recomputed=num_tokens)

    # Scheduling ----------------------------------------------------------------------------

    def num_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Answer vLLM's ``get_num_new_matched_tokens``; see there for the meaning."""
        self.on_new_request(request)
        if (prefill := self._prefills.get(request.request_id)) is not None:
            return (0, False) if self._may_prefill(request.request_id, prefill) else (None, False)
        job = self._decodes.get(request.request_id)
        if job is None or job.state != "waiting":
            return 0, False
        missing = job.num_prompt_tokens - num_computed_tokens
        job.tokens_local = num_computed_tokens
        # The engine computes the last prompt token itself in any case, to sample from it.
        if missing <= 1:
            return 0, False
        return missing, True

    def _may_prefill(self, request_id: str, job: PrefillJob) -> bool:
        if job.reserved:
            return True
        now_s = self._clock()
        if job.first_asked_s is None:
            job.first_asked_s = now_s
        free_bytes = self._staging_bytes - self.reserved_bytes
        if job.staged_bytes <= free_bytes:
            self._reserved[job.handoff_id] = job.staged_bytes
            job.reserved = True
            return True
        waited_s = now_s - job.first_asked_s
        if job.staged_bytes <= self._staging_bytes and waited_s < self._staging_wait_s:
            return False
        self.counts["staging_full"] += 1
        problem = (
            f"{job.staged_bytes} bytes of staging wanted, {free_bytes} of {self._staging_bytes} "
            f"free after {waited_s:.2f} s (handoff.staging_bytes, handoff.staging_wait_s); "
            "not published"
        )
        logger.warning("request %s, handoff %s: %s", request_id, job.handoff_id, problem)
        self._report_failure(job.handoff_id, problem)
        self._handoffs.pop(job.handoff_id, None)
        del self._prefills[request_id]
        return True

    def after_alloc(self, request: Any, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """Take the blocks that vLLM allocated (``update_state_after_alloc``)."""
        job = self._decodes.get(request.request_id)
        if job is None or job.state != "waiting":
            return
        if num_external_tokens == 0:
            # Everything was in the local prefix cache, or the engine refused external tokens.
            job.state = "done"
            self._release(job.handoff_id, job.params)
            self._report_loaded(job, seconds=0.0)
            return
        job.state = "loading"
        job.tokens_asked = num_external_tokens
        job.ranks_left = self._tp_size
        first_token = job.num_prompt_tokens - num_external_tokens
        self._plan.load.append(
            LoadStep(
                request.request_id,
                job.handoff_id,
                job.params.ticket,
                job.params.endpoints,
                job.prompt,
                first_token,
                job.num_prompt_tokens,
                tuple(block_ids[: -(-job.num_prompt_tokens // self._block_size_tokens)]),
            )
        )

    def take_plan(self, output: Any) -> StepPlan:
        """Return the plan of the step that ``output`` (vLLM's SchedulerOutput) describes."""
        for new in output.scheduled_new_reqs:
            self._plan_publish(
                new.req_id, new.block_ids, new.num_computed_tokens, output, replace=True
            )
        cached = output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", ())
        for i, request_id in enumerate(cached.req_ids):
            self._plan_publish(
                request_id,
                cached.new_block_ids[i],
                cached.num_computed_tokens[i],
                output,
                replace=request_id in resumed,
            )
        plan, self._plan = self._plan, StepPlan()
        return plan

    def _plan_publish(
        self,
        request_id: str,
        block_ids: Sequence[Sequence[int]] | None,
        num_computed_tokens: int,
        output: Any,
        *,
        replace: bool,
    ) -> None:
        job = self._prefills.get(request_id)
        if job is None or job.complete:
            return
        new_ids = list(block_ids[0]) if block_ids else []
        if replace:
            job.block_ids = new_ids
        else:
            job.block_ids.extend(new_ids)
        end_token = min(
            num_computed_tokens + output.num_scheduled_tokens.get(request_id, 0), job.num_tokens
        )
        last = end_token == job.num_tokens
        size = self._block_size_tokens
        end_block = -(-end_token // size) if last else end_token // size
        if end_block <= job.blocks_published and not (last or not job.opened):
            return
        self._plan.publish.append(
            PublishStep(
                job.handoff_id,
                job.ticket,
                job.num_tokens,
                job.prompt,
                job.blocks_published,
                tuple(job.block_ids[job.blocks_published : end_block]),
                last,
            )
        )
        job.opened = True
        job.complete = last
        job.blocks_published = max(job.blocks_published, end_block)

    # Ends ----------------------------------------------------------------------------------

    def request_finished(self, request: Any) -> dict[str, object] | None:
        """Return what travels back to the gateway, or None (vLLM's ``request_finished``)."""
        request_id = request.request_id
        self._seen.pop(request_id, None)
        for job in (self._prefills.get(request_id), self._decodes.get(request_id)):
            if job is not None:
                self._handoffs.pop(job.handoff_id, None)
        if (prefill := self._prefills.pop(request_id, None)) is not None:
            if prefill.complete:
                return answer_params(
                    num_tokens=prefill.num_tokens,
                    prompt=prefill.prompt,
                    endpoints=self.endpoints,
                )
            if prefill.opened:
                self._plan.abort.append((prefill.handoff_id, "the prefill request was aborted"))
            else:
                self._reserved.pop(prefill.handoff_id, None)
            self.counts["aborted"] += 1
        elif (decode := self._decodes.get(request_id)) is not None:
            if decode.state == "waiting":
                failed = "the decode request was aborted"
                self._release(decode.handoff_id, decode.params, failed=failed)
            if decode.state != "loading":
                del self._decodes[request_id]
        return None

    def take_result(self, result: StepResult) -> None:
        """Learn what the ranks did (vLLM's ``update_connector_output``)."""
        for handoff_id, ranks in result.ended.items():
            self._ended[handoff_id] += ranks
            if self._ended[handoff_id] >= self._tp_size:
                del self._ended[handoff_id]
                self._reserved.pop(handoff_id, None)
        for load in result.loads:
            job = self._decodes.get(load.request_id)
            if job is None:
                continue
            job.results.append(load)
            job.ranks_left -= 1
            if job.ranks_left <= 0:
                job.state = "done"
                self._load_ended(job)
                if load.request_id not in self._seen:
                    del self._decodes[load.request_id]

    def _load_ended(self, job: DecodeJob) -> None:
        problems = sorted({r.problem for r in job.results if r.problem})
        if problems:
            self.counts["load_failed"] += 1
            recomputed = job.num_prompt_tokens - job.tokens_local
            self._report_failure(job.handoff_id, "; ".join(problems), tokens_recomputed=recomputed)
            return
        self.counts["loaded"] += 1
        self._report_loaded(job, seconds=max((r.seconds for r in job.results), default=0.0))

    def _release(self, handoff_id: HandoffId, params: HandoffParams, failed: str = "") -> None:
        self._plan.release.append(ReleaseStep(handoff_id, params.ticket, params.endpoints, failed))

    # Reports -------------------------------------------------------------------------------

    def _report_loaded(self, job: DecodeJob, *, seconds: float) -> None:
        # The last prompt token is computed even after a full load (the engine samples from it).
        loaded = min(job.tokens_asked, job.num_prompt_tokens - job.tokens_local - 1)
        first = job.results[0] if job.results else None
        self._report(
            {
                "kind": "loaded",
                "handoff_id": job.handoff_id,
                "num_tokens": loaded,
                "tokens_local": job.tokens_local,
                "tokens_recomputed": job.num_prompt_tokens - job.tokens_local - loaded,
                "bytes": sum(r.payload_bytes for r in job.results),
                "transport": first.transport if first else "none",
                "form": first.form if first else "none",
                "seconds": seconds,
            }
        )

    def _report_failure(
        self, handoff_id: HandoffId, problem: str, *, tokens_recomputed: int | None = None
    ) -> None:
        record: dict[str, Any] = {
            "kind": "failed",
            "handoff_id": handoff_id,
            "problem": problem[:500],
        }
        if tokens_recomputed is not None:
            record["tokens_recomputed"] = tokens_recomputed
        self._report(record)


def digest_of(request: Any) -> str:
    """Return the digest of a vLLM request's prompt, its images and other inputs included."""
    features = getattr(request, "mm_features", None) or ()
    parts = [f"{f.identifier}@{f.mm_position}" for f in features]
    return prompt_digest(request.prompt_token_ids or (), parts)


def staged_block_bytes(kv_cache_config: Any) -> int:
    """Return the bytes of one block over all layers of one rank, from vLLM's KVCacheConfig."""
    group = kv_cache_config.kv_cache_groups[0]
    return int(group.kv_cache_spec.page_size_bytes) * len(group.layer_names)


__all__ = ["DecodeJob", "PrefillJob", "SchedulerSide", "staged_block_bytes"]
