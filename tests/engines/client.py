"""A small measuring client for vLLM and SGLang: tokens, their log-probabilities, their times.

Both answer ``/v1/completions`` with one server-sent event for each step. What differs: vLLM names
tokens ``token_id:N`` when asked to, SGLang by their text alone; both give the ids beside them.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from disagg_plugins.errors import DisaggError

ANSWER_S = 300.0
"""Longest silence before a request counts as failed; far above any prompt used here."""

AS_IDS = {"return_tokens_as_token_ids": True, "return_token_ids": True}
"""The first is vLLM's alone (SGLang ignores fields it does not know), the second both have."""


class AnswerError(DisaggError):
    """The server answered with an error or ended early."""


@dataclass(slots=True)
class Completion:
    """One answer.

    Attributes:
        tokens: One entry a token: ``token_id:N`` from vLLM, texts from SGLang; without
            log-probabilities the text of one chunk an entry.
        ids: Token ids, where log-probabilities were asked for.
        top: For each token the best alternatives: token -> log-probability.
        started_s: Monotonic time of sending.
        text: The answer as text.
        arrivals_s: Monotonic times at which tokens arrived, one a streamed chunk.
        usage: The server's count of tokens.
        finish: Why it ended.
    """

    tokens: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    top: list[dict[str, float]] = field(default_factory=list)
    text: str = ""
    started_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.arrivals_s[0] - self.started_s

    @property
    def itls_s(self) -> list[float]:
        """Gaps between consecutive chunks, in seconds."""
        return [b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """(end-to-end - TTFT) / (tokens - 1), or None for fewer than two tokens."""
        if len(self.tokens) < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (len(self.tokens) - 1)


def complete(
    url: str,
    prompt: str | Sequence[int],
    *,
    max_tokens: int,
    model: str,
    ignore_eos: bool = True,
    logprobs: int | None = 2,
    extra: dict[str, Any] | None = None,
    request_id: str | None = None,
) -> Completion:
    """Stream one greedy completion.

    Args:
        url: ``http://host:port`` of a server or the gateway.
        prompt: Text or token ids.
        max_tokens: Output bound.
        model: The served model's name.
        ignore_eos: Whether to write on past the end of text, so that lengths are equal.
        logprobs: Alternatives to report for each token; None for none.
        extra: More fields of the request.
        request_id: Sent as ``X-Request-Id``; the gateway's record carries it.

    Raises:
        AnswerError: Any answer but a complete stream.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": ignore_eos,
        **({"logprobs": logprobs, **AS_IDS} if logprobs else {}),
        **(extra or {}),
    }
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=ANSWER_S)
    result = Completion(started_s=time.monotonic())
    try:
        headers = {"Content-Type": "application/json"}
        if request_id is not None:
            headers["X-Request-Id"] = request_id
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise AnswerError(f"{url} answered {answer.status}: {answer.read(2000)!r}")
        _read_stream(answer, result, url)
    except (OSError, http.client.HTTPException) as exc:
        raise AnswerError(f"{url}: {type(exc).__name__}: {exc}") from exc
    finally:
        connection.close()
    return result


def _read_stream(answer: http.client.HTTPResponse, result: Completion, url: str) -> None:
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise AnswerError(f"{url}: {event['error']}")
        if event.get("usage"):
            result.usage = event["usage"]
        for choice in event.get("choices", ()):
            result.finish = choice.get("finish_reason") or result.finish
            result.text += choice.get("text") or ""
            result.ids.extend(choice.get("token_ids") or ())
            if (logprobs := choice.get("logprobs")) is not None:
                result.tokens.extend(logprobs["tokens"])
                result.top.extend(logprobs["top_logprobs"])
            else:
                # A token that ends inside a character comes as a chunk without text: it counts,
                # as in `vllm bench serve`.
                result.tokens.append(choice.get("text", ""))
            result.arrivals_s.append(time.monotonic())
    raise AnswerError(f"{url}: the stream ended without [DONE]")


def first_difference(a: Completion, b: Completion) -> int | None:
    """Return the first position at which the two answers differ, or None.

    Ids are compared where both sides have them: engines write tokens differently.
    """
    ours: Sequence[object] = a.tokens
    theirs: Sequence[object] = b.tokens
    if a.ids and b.ids:
        ours, theirs = a.ids, b.ids
    for i, (x, y) in enumerate(zip(ours, theirs, strict=False)):
        if x != y:
            return i
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def is_tie(a: Completion, b: Completion, position: int, *, gap: float) -> bool:
    """Return whether the answers part at a tie of the two best tokens.

    Both sides must have both tokens among their best alternatives, no further apart than ``gap``
    in log-probability.
    """
    if position >= min(len(a.tokens), len(b.tokens)):
        return False
    x, y = a.tokens[position], b.tokens[position]
    return all(
        x in side.top[position]
        and y in side.top[position]
        and abs(side.top[position][x] - side.top[position][y]) <= gap
        for side in (a, b)
    )
