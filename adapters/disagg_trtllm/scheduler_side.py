"""The scheduler half: which prompts are published, which are loaded, and from what.

Lives on rank 0. It never raises into the engine, where an exception on one rank leaves the others
waiting for ever; never blocks in ``match``, which runs with the engine's radix tree locked; and
counts computed tokens itself, since what the engine tells differs between kinds of loads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from disagg_plugins.errors import DisaggError, LocalProtocolError
from disagg_plugins.handoff.prompts import prompt_digest
from disagg_trtllm.openings import Openings
from disagg_trtllm.plan import LoadStep, Plan, PublishStep

if TYPE_CHECKING:
    from disagg_plugins.handoff.tickets import Ticket
    from disagg_trtllm.announcements import Announcement
    from disagg_trtllm.compat import Entry
    from disagg_trtllm.fetching import Fetched, Fetcher
    from disagg_trtllm.settings import Settings

log = logging.getLogger(__name__)

MOST_ANNOUNCED = 4096
"""Prompts announced to be published whose requests have not come; the oldest goes first."""

MAX_PROBLEM_CHARS = 500

NOTHING: Mapping[str, object] = {}


@dataclass(slots=True)
class _Prefill:
    """A prompt that is to be published."""

    ticket: str
    handoff_id: str
    expires_s: float  # wall clock: nothing can be published after
    opening: bool = False
    blocks: list[int] = field(default_factory=list)
    tokens: Sequence[int] = ()
    computed: int = 0


@dataclass(slots=True)
class _Decode:
    """A prompt that is loaded, or was."""

    fetched: Fetched
    first_token: int
    end_token: int
    planned: bool = False
    in_batches: int = 0


class SchedulerSide:
    """See the module.

    Args:
        settings: What the engine was told.
        fetcher: Has what was fetched.
        block_size_tokens: Tokens of one block.
        report: Takes a record for the gateway; must not block.
    """

    def __init__(
        self,
        settings: Settings,
        fetcher: Fetcher,
        *,
        block_size_tokens: int,
        report: Callable[[dict[str, object]], None],
    ) -> None:
        self._settings, self._fetcher, self._report = settings, fetcher, report
        self._block_size_tokens = block_size_tokens
        self._lock = threading.Lock()
        self._announced: dict[int, _Prefill] = {}  # under the lock; the rest is the engine's
        self._openings = Openings()
        self._prefills: dict[int, _Prefill] = {}
        self._decodes: dict[int, _Decode] = {}
        self._plan = Plan()
        self.counts: Counter[str] = Counter()

    # Announcements (threads of their own)

    def announced(self, said: Announcement) -> Mapping[str, object]:
        """Take an announcement, return the answer; to decode, return when the KV is here.

        Raises:
            AuthenticationError: The ticket is not good for this worker.
            DisaggError: It cannot be fetched: the prompt will be computed; or its tokens are not
                known.
        """
        side: Literal["prefill", "decode"] = "decode" if said.step == "decode" else "prefill"
        ticket = self._settings.verify(said.ticket, side)
        if said.step == "opening":
            prompt, token = self._openings.take(said.request_id, ticket.handoff_id)
            return {"prompt": prompt, "token": token}
        if said.step == "prefill":
            with self._lock:
                if said.request_id in self._announced:
                    raise LocalProtocolError(f"request {said.request_id} was announced before")
                self._announced[said.request_id] = _Prefill(
                    said.ticket, ticket.handoff_id, ticket.expires_s, said.opening
                )
                if len(self._announced) > MOST_ANNOUNCED:
                    del self._announced[next(iter(self._announced))]
            return NOTHING
        try:
            self._fetch(said, ticket)
        except DisaggError as exc:
            self.counts["fetch_failed"] += 1
            log.warning("handoff %s is not fetched: %s", ticket.handoff_id, exc)
            self._failed(ticket.handoff_id, f"{type(exc).__name__}: {exc}", said.num_tokens)
            raise
        return NOTHING

    def _fetch(self, said: Announcement, ticket: Ticket) -> None:
        self._fetcher.fetch(
            said.request_id,
            ticket,
            said.ticket,
            num_tokens=said.num_tokens,
            prompt=said.prompt,
            endpoints=said.endpoints,
        )

    # The engine's loop

    def match(self, request_id: int, tokens: Sequence[int], computed: int) -> tuple[int, bool]:
        """Return how many more prompt tokens can be loaded, and whether asynchronously.

        At least one token is left to the engine, which samples from it: the one that prefill wrote,
        where it stands behind the prompt, else the last one of the prompt.
        """
        fetched = self._fetcher.look(request_id)
        if fetched is None:
            return 0, False
        read = fetched.num_tokens
        problem = ""
        if not 0 <= len(tokens) - read <= 1 or fetched.prompt != prompt_digest(tokens[:read]):
            problem = (
                f"the prefill worker read another prompt ({read} tokens) than this worker "
                f"({len(tokens)} tokens): tokenizer or chat template differ"
            )
        end = min(read, len(tokens) - 1)
        wanted = end - computed
        if problem or wanted <= 0:
            self._fetcher.drop(request_id)
            if problem:
                self.counts["mismatched"] += 1
                log.warning("request %d computes its prompt itself: %s", request_id, problem)
                self._failed(fetched.handoff_id, problem, len(tokens) - computed)
            else:
                self._loaded(fetched, computed, end)
            return 0, False
        taken = self._fetcher.take(request_id)
        if taken is None:  # its lease ended just now
            return 0, False
        self._decodes[request_id] = _Decode(taken, computed, end)
        return wanted, self._settings.asynchronous

    def allocated(self, request_id: int, block_ids: Sequence[int]) -> None:
        """Take the blocks of a prompt; a load is planned for this very iteration.

        A request that is parked while it loads is in no ``SchedulerOutput``.
        """
        decode = self._decodes.get(request_id)
        if decode is None or decode.planned:
            return
        end = decode.end_token
        try:
            blocks = tuple(int(block) for block in block_ids)
            blocks = blocks[: -(-end // self._block_size_tokens)]
        except Exception:
            # what was promised must be loaded, for the engine takes these tokens for computed:
            # without blocks every rank fails, which is loud
            log.exception("request %d: its blocks cannot be read", request_id)
            blocks = ()
        decode.planned = True
        self._plan.load.append(
            LoadStep(
                request_id,
                decode.fetched.staged,
                decode.first_token,
                end,
                blocks,
                decode.fetched.until_s,
            )
        )
        self.counts["loaded"] += 1
        self._loaded(decode.fetched, decode.first_token, end)

    def plan(self, new: Sequence[Entry], known: Sequence[Entry]) -> Plan:
        """Return what this iteration publishes and loads."""
        for is_new, entries in ((True, new), (False, known)):
            for entry in entries:
                try:
                    self._advance(entry, new=is_new)
                except Exception:  # one request's; the others' loads must not be lost with it
                    log.exception("request %d goes on without a handoff", entry.request_id)
                    self._prefills.pop(entry.request_id, None)
        self._reap()
        return self.pending()

    def pending(self) -> Plan:
        """Return what is planned so far; it is planned no more."""
        plan, self._plan = self._plan, Plan()
        return plan

    def _reap(self) -> None:
        """Forget requests that went without a word: the 1.2-era tells nobody of a cancelled one."""
        for request_id in [i for i in self._decodes if not self._fetcher.has(i)]:
            del self._decodes[request_id]
        now_s = time.time()
        with self._lock:
            for waiting in (self._prefills, self._announced):
                for request_id in [i for i, p in waiting.items() if p.expires_s < now_s]:
                    del waiting[request_id]
        self._openings.sweep(now_s)

    def _advance(self, entry: Entry, *, new: bool) -> None:
        if new:
            with self._lock:
                announced = self._announced.pop(entry.request_id, None)
            if announced is not None:
                announced.tokens = entry.tokens
                announced.computed = entry.position
                self._prefills[entry.request_id] = announced
        decode = self._decodes.get(entry.request_id)
        if decode is not None:
            decode.in_batches += 1
            if decode.in_batches > 2:  # every rank has begun a later iteration: it has copied
                self._fetcher.drop(entry.request_id)
                del self._decodes[entry.request_id]
            return
        prefill = self._prefills.get(entry.request_id)
        if prefill is None:
            return
        prefill.blocks = list(entry.blocks) if new else [*prefill.blocks, *entry.blocks]
        prefill.computed += entry.scheduled
        num_tokens = len(prefill.tokens)
        if prefill.computed < num_tokens:
            return
        del self._prefills[entry.request_id]
        blocks = prefill.blocks[: -(-num_tokens // self._block_size_tokens)]
        if len(blocks) * self._block_size_tokens < num_tokens or min(blocks) < 0:
            problem = f"{num_tokens} tokens are not all in the cache: {blocks[:8]!r}..."
            log.warning("request %d is not published: %s", entry.request_id, problem)
            self._failed(prefill.handoff_id, problem, None)
            return
        self._plan.publish.append(
            PublishStep(
                entry.request_id,
                prefill.ticket,
                num_tokens,
                prompt_digest(prefill.tokens),
                tuple(blocks),
            )
        )
        self.counts["published"] += 1
        if prefill.opening:
            self._openings.expect(
                entry.request_id, prefill.handoff_id, prefill.tokens, prefill.expires_s
            )

    def finished(self, request_id: int, tokens: Callable[[], Sequence[int]]) -> None:
        """A request is over, whichever way; ``tokens`` returns those of its prompt and answer."""
        self._openings.finished(request_id, tokens)
        with self._lock:
            self._announced.pop(request_id, None)
        self._prefills.pop(request_id, None)
        decode = self._decodes.pop(request_id, None)
        if decode is None or decode.in_batches or not self._settings.asynchronous:
            self._fetcher.drop(request_id)
        # else threads may be copying it: its lease ends it

    @property
    def jobs(self) -> int:
        """Requests that this half still remembers."""
        with self._lock:
            waiting = len(self._announced) + len(self._prefills) + len(self._decodes)
        return waiting + len(self._openings)

    # Reports

    def _loaded(self, fetched: Fetched, computed: int, end: int) -> None:
        loaded = max(0, end - computed)
        self._report(
            {
                "kind": "loaded",
                "handoff_id": fetched.handoff_id,
                "num_tokens": loaded,
                "tokens_local": computed,
                "tokens_recomputed": max(0, fetched.num_tokens - computed - loaded),
                "bytes": fetched.report.payload_bytes,
                "transport": fetched.report.transport,
                "form": fetched.report.form,
                "seconds": fetched.report.seconds,
            }
        )

    def _failed(self, handoff_id: str, problem: str, recomputed: int | None) -> None:
        record: dict[str, object] = {
            "kind": "failed",
            "handoff_id": handoff_id,
            "problem": problem[:MAX_PROBLEM_CHARS],
        }
        if recomputed is not None:
            record["tokens_recomputed"] = recomputed
        self._report(record)
