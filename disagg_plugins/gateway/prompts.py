"""What the gateway knows of prompts: their tokens, their beginnings, and who holds these.

Two sources say who holds a beginning. Engines that publish their KV events are believed exactly,
for prompts whose token ids are known. Otherwise a routed request is believed to be cached where it
was read and where its answer was written, for a while and as far as a worker's room goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from disagg_plugins.gateway.kv_events import KvEvents
from disagg_plugins.gateway.openai import CHAT, ParsedRequest
from disagg_plugins.scheduling.prefix_hashes import PIECE_TOKENS, PrefixHasher
from disagg_plugins.scheduling.prefix_index import MAX_ENTRIES, PrefixIndex
from disagg_plugins.types import Disaggregated, RequestProfile, Route, Worker

if TYPE_CHECKING:
    from disagg_plugins.gateway.body import Body
    from disagg_plugins.gateway.token_counter import Counting, Ids, TokenCounter
    from disagg_plugins.policy import Policy, WorkerPolicy

MAX_SALT_CHARS = 256
"""Of a cache's salt; a longer one takes no part in this."""


class Prompts:
    """Reads prompts and remembers where they went.

    Args:
        policy: The policy.
        counter: Counts with the model's tokenizer; None: text is estimated.
    """

    def __init__(self, policy: Policy, counter: TokenCounter | None) -> None:
        rules = policy.scheduler
        self.counter = counter
        self._hasher = PrefixHasher(os.urandom(32))
        self._piece_chars = max(1, round(PIECE_TOKENS * rules.chars_per_token))
        self._believed = PrefixIndex(
            max(1, rules.prefix.tokens // PIECE_TOKENS), ttl_s=rules.prefix.ttl_s
        )
        self._known = PrefixIndex(MAX_ENTRIES)
        endpoints = {w.name: w.kv_events for w in policy.fleet.workers if w.kv_events is not None}
        self.events = KvEvents(endpoints, self._known, self._hasher)

    def close(self) -> None:
        """Begin no more counting."""
        if self.counter is not None:
            self.counter.close()

    @property
    def spell(self) -> Callable[[int], str] | None:
        """Returns the text of a token; None: that is not known, or depends on its neighbours."""
        return None if self.counter is None else self.counter.spell

    def counting(self, parsed: ParsedRequest) -> Counting | None:
        """Return how the prompt can be counted, or None when it is exact or estimated."""
        return None if self.counter is None else self.counter.prepare(parsed)

    def read(self, parsed: ParsedRequest, ids: Ids | None, served_by_name: bool) -> ParsedRequest:
        """Return the request with what its prompt says.

        Args:
            parsed: The request.
            ids: Its prompt, as far as the tokenizer was asked.
            served_by_name: Whether the model's name may stand for an adapter, whose KV differs.
        """
        salt = _salt(parsed, served_by_name)
        if parsed.opaque is not None:
            return parsed
        if ids is not None:
            hashes = () if salt is None else self._hasher.of_ids(ids, salt)
            count = len(ids)
            return replace(parsed, prompt_tokens=count, tokens_by="tokenizer", prefix_hashes=hashes)
        hashes = () if salt is None else self._hashes(parsed, salt)
        return replace(parsed, prefix_hashes=hashes) if hashes else parsed

    def _hashes(self, parsed: ParsedRequest, salt: str) -> tuple[str, ...]:
        if parsed.exact:
            return self._hasher.of_ids(_prompt_ids(parsed.body), salt)
        text = None if parsed.batch else _text(parsed)
        return () if text is None else self._hasher.of_text(text, self._piece_chars, salt)

    def cached_tokens(self, parsed: ParsedRequest) -> Mapping[str, int]:
        """Return how many of the prompt's tokens each worker is believed to hold, best first."""
        hashes = parsed.prefix_hashes
        if not hashes:
            return {}
        found = dict(self._believed.longest(hashes))
        if parsed.tokens_by != "estimate" and self.events.workers:
            found = {name: n for name, n in found.items() if not self.events.knows(name)}
            found.update(self._known.longest(hashes))
            found = dict(sorted(found.items(), key=lambda each: -each[1]))
        most = parsed.prompt_tokens
        return {name: min(self._usable(name, n), most) for name, n in found.items()}

    def _usable(self, worker: str, pieces: int) -> int:
        """Return the tokens of the whole blocks among what a worker holds."""
        tokens = pieces * PIECE_TOKENS
        return tokens - tokens % self.events.block_tokens(worker)

    def routed(self, profile: RequestProfile, route: Route) -> None:
        """Believe that the workers of a request will hold its prompt."""
        if not profile.prefix_hashes:
            return
        now_s = time.monotonic()
        self._believe(route.decode, profile, now_s)
        if isinstance(route, Disaggregated):
            self._believe(route.prefill, profile, now_s)

    def _believe(self, worker: Worker, profile: RequestProfile, now_s: float) -> None:
        room = worker.kv_tokens
        bound = None if room is None else max(1, room // PIECE_TOKENS)
        self._believed.put(worker.name, profile.prefix_hashes, now_s, bound=bound)

    def forget(self, worker: str) -> None:
        """A worker has gone, and its cache with it."""
        self._believed.forget(worker)

    def joined(self, worker: WorkerPolicy) -> None:
        """A worker joined; listen to what it publishes, if it does."""
        if worker.kv_events is not None:
            self.events.join(worker.name, worker.kv_events)

    def left(self, worker: str) -> None:
        """A worker left the fleet: nothing is known of its name."""
        self.forget(worker)
        self.events.leave(worker)

    def sweep(self, now_s: float) -> None:
        """Give up what is believed no longer."""
        self._believed.expire(now_s)


def _salt(parsed: ParsedRequest, served_by_name: bool) -> str | None:
    """Return what tells KV of equal prompts apart, or None when that cannot be told."""
    salt: object = parsed.body.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or len(salt) > MAX_SALT_CHARS):
        return None
    name = parsed.model if served_by_name and parsed.model else ""
    return f"{name}\0{salt}" if name or salt else ""


def _prompt_ids(body: Body) -> Sequence[int]:
    prompt: list[int] = body["prompt"]
    return prompt


def _text(parsed: ParsedRequest) -> str | None:
    """Return the text of a prompt that is not tokenized here, or None when it is more than text."""
    body = parsed.body
    if parsed.endpoint != CHAT:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        return prompt if isinstance(prompt, str) else None
    parts = [str(body.get("tools") or "")]
    for message in body["messages"]:
        content = message.get("content")
        parts.append(f"\0{message.get('role')}\0")
        if isinstance(content, str):
            parts.append(content)
            continue
        for part in content if isinstance(content, list) else ():
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str):
                return None
            parts.append(text)
    return "".join(parts)
