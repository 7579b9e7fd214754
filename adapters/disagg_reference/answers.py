"""The answers of the OpenAI API, from what the engine says of one request (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_reference.openai import Asked
    from disagg_reference.request import Output, Request
    from disagg_reference.text import Text

Plain = dict[str, object]


class Answer:
    """Makes the JSON of one answer.

    Args:
        asked: The request.
        request: The same for the engine.
        text: The tokenizer.
        name: Its id.
        model: As it is told.
        created_s: Seconds since the epoch.
    """

    def __init__(
        self, asked: Asked, request: Request, text: Text, *, name: str, model: str, created_s: int
    ) -> None:
        self._asked, self._request, self._text = asked, request, text
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._head: Plain = {"id": f"{kind}-{name}", "created": created_s, "model": model}
        self._begun = False

    def piece(self, text: str, tokens: list[Output], finish: str | None) -> Plain:
        """Return one event of a stream."""
        choice: Plain = {"index": 0, "finish_reason": finish}
        if self._asked.chat:
            delta: Plain = {"content": text}
            if not self._begun:
                delta = {"role": "assistant", **delta}
            choice["delta"] = delta
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(tokens)
        event: Plain = {**self._head, "object": self._object(stream=True), "choices": [choice]}
        if self._asked.ids:
            choice["token_ids"] = [o.token for o in tokens if o.token is not None]
            if not self._begun:
                where = event if self._asked.chat else choice
                where["prompt_token_ids"] = list(self._request.prompt)
        self._begun = True
        return event

    def usage_event(self) -> Plain:
        """Return the event that tells the usage, at the end of a stream."""
        head = {**self._head, "object": self._object(stream=True)}
        return {**head, "choices": [], "usage": self.usage()}

    def whole(self, text: str, tokens: list[Output], finish: str) -> Plain:
        """Return the answer in one piece."""
        choice: Plain = {"index": 0, "finish_reason": finish}
        if self._asked.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(tokens)
        answer: Plain = {
            **self._head,
            "object": self._object(stream=False),
            "choices": [choice],
            "usage": self.usage(),
            "kv_transfer_params": dict(self._request.told) or None,
        }
        if self._asked.ids or self._asked.request_id is not None:
            choice["token_ids"] = [o.token for o in tokens if o.token is not None]
            where = answer if self._asked.chat else choice
            where["prompt_token_ids"] = list(self._request.prompt)
        if self._asked.request_id is not None:  # TensorRT-LLM tells them beside the choices
            answer["prompt_token_ids"] = list(self._request.prompt)
        return answer

    def usage(self) -> Plain:
        """Return the tokens that were read, found and written."""
        request = self._request
        read, written = len(request.prompt), len(request.output)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {
                "cached_tokens": request.local_tokens + request.matched_tokens
            },
        }

    def _object(self, *, stream: bool) -> str:
        if not self._asked.chat:
            return "text_completion"
        return "chat.completion.chunk" if stream else "chat.completion"

    def _logprobs(self, tokens: list[Output]) -> Plain | None:
        if self._asked.sampling.logprobs is None:
            return None
        told = [o for o in tokens if o.token is not None and o.logprob is not None]
        if self._asked.chat:
            return {"content": [self._chat_logprob(o) for o in told]}
        return {
            "tokens": [self._text.token(o.token) for o in told if o.token is not None],
            "token_logprobs": [o.logprob for o in told],
            "top_logprobs": [self._best(o.best) for o in told],
            "text_offset": [],
        }

    def _best(self, best: Mapping[int, float]) -> Plain:
        found: Plain = {}
        for token, value in best.items():  # the best one first: halves of characters look alike
            found.setdefault(self._text.token(token), value)
        return found

    def _chat_logprob(self, output: Output) -> Plain:
        def entry(token: int, value: float | None) -> Plain:
            text = self._text.token(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        assert output.token is not None
        best = [entry(token, value) for token, value in output.best.items()]
        return {**entry(output.token, output.logprob), "top_logprobs": best}
