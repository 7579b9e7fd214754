"""What workers are sent for one request, as JSON, and what work that is for them (sans-IO)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import msgspec

from disagg_plugins.errors import RemoteProtocolError
from disagg_plugins.gateway.announcing import AnnouncedBody
from disagg_plugins.gateway.dialect import announcing, opening
from disagg_plugins.gateway.openai import CHAT
from disagg_plugins.gateway.opened import Opened
from disagg_plugins.gateway.whole_answer import as_asked
from disagg_plugins.gateway.worker_state import Work
from disagg_plugins.scheduling.prediction import expected_output

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from disagg_plugins.gateway.dialect import (
        Body,
        Dialect,
        HandoffRef,
        OpeningDialect,
        Published,
    )
    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.resumption import Resumption
    from disagg_plugins.types import Worker

log = logging.getLogger(__name__)

_encode = msgspec.json.encode

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What a decoder raises at bytes that are no JSON."""


class UnreadableError(Exception):
    """A worker's answer is not JSON."""


class Bodies:
    """Writes the bodies of one request's calls, in each worker's dialect.

    Args:
        parsed: The request.
        dialects: By engine.
        resumption: Asks for what another worker would need to go on.
        spell: Returns the text of one token, where the texts of tokens, each by itself, make up
            the text of all; None where that is not known.
    """

    __slots__ = ("_dialects", "_parsed", "_resumption", "_spell")

    def __init__(
        self,
        parsed: ParsedRequest,
        dialects: Mapping[str, Dialect],
        resumption: Resumption,
        spell: Callable[[int], str] | None = None,
    ) -> None:
        self._parsed = parsed
        self._dialects = dialects
        self._resumption = resumption
        self._spell = spell

    def prefill(self, worker: Worker, ref: HandoffRef) -> bytes:
        """Return what asks ``worker`` to read the prompt and hand over its KV."""
        dialect = self._dialects[worker.engine]
        body = _encode(dialect.prefill_body(self._parsed.body, ref))
        opener = self._opener(ref)
        question = None if opener is None else _encode(opener.question(ref))
        return self._announced(dialect, "prefill", body, ref, None, question)

    def _opener(self, ref: HandoffRef) -> OpeningDialect | None:
        """Return the dialect of both workers if decode shall go on from what prefill writes."""
        parsed, engine = self._parsed, ref.prefill.engine
        if self._spell is None or engine != ref.decode.engine or not parsed.single:
            return None
        found = opening(self._dialects[engine])
        if found is None or parsed.opaque is not None:
            return None
        return found if found.opens(parsed.body, chat=parsed.endpoint == CHAT) else None

    def published(
        self, worker: Worker, ref: HandoffRef, answer: bytes, told: bytes = b""
    ) -> Published | None:
        """Return what the answer of a prefill worker tells of where the KV is.

        Args:
            worker: Who answered.
            ref: The handoff.
            answer: Its answer.
            told: What its adapter said when it was asked; empty: it was not, or did not know.

        Raises:
            UnreadableError: The answer is not JSON.
            RemoteProtocolError: It tells nothing of a handoff.
        """
        try:
            plain = msgspec.json.decode(answer)
        except UNREADABLE as exc:
            raise UnreadableError(f"its answer is not JSON: {exc}") from exc
        plain = plain if isinstance(plain, dict) else {}
        published = self._dialects[worker.engine].published(plain, ref)
        if not told or (opener := self._opener(ref)) is None or self._spell is None:
            return published
        try:
            found = opener.opening(msgspec.json.decode(told, type=dict), plain)
            if self._spell(found.token) != found.text:
                raise RemoteProtocolError("the tokenizer says otherwise than the worker")
        except (*UNREADABLE, RemoteProtocolError, OverflowError) as exc:  # ids of any length
            log.warning("handoff %s is decoded from its prompt alone: %s", ref.handoff_id, exc)
            return published
        return replace(published, opening=found)

    def decode(self, worker: Worker, ref: HandoffRef, published: Published | None) -> bytes:
        """Return what asks ``worker`` to write the answer to a prompt that was handed over."""
        dialect = self._dialects[worker.engine]
        found, opener = None if published is None else published.opening, opening(dialect)
        if found is not None and opener is not None:
            body = opener.continued_body(self._parsed.body, ref, found)
            self._resumption.opened = Opened(found)
        else:
            body = dialect.decode_body(self._parsed.body, ref, published)
        encoded = _encode(self._resumption.body(dialect, worker, body))
        return self._announced(dialect, "decode", encoded, ref, published)

    def _announced(
        self,
        dialect: Dialect,
        step: Literal["prefill", "decode"],
        body: bytes,
        ref: HandoffRef,
        published: Published | None,
        question: bytes | None = None,
    ) -> bytes:
        teller = announcing(dialect)
        if teller is None:
            return body
        told = teller.announcement(step, ref, published)
        if question is not None:
            told = {**told, "opening": True}
        return AnnouncedBody.of(body, _encode(told), question)

    def whole(self, worker: Worker) -> bytes:
        """Return what asks ``worker`` to do all of the request."""
        parsed, dialect = self._parsed, self._dialects.get(worker.engine)
        body = parsed.body if dialect is None else dialect.local_body(parsed.body)
        body = self._resumption.body(dialect, worker, body)
        return parsed.raw if body is parsed.body else _encode(body)

    def as_asked(self, answer: Body) -> tuple[bytes, bytes]:
        """Return a whole answer as the client wants it, and the line that names its type."""
        options = self._parsed.body.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return as_asked(answer, stream=self._parsed.stream, usage=usage)

    def rest(self, worker: Worker) -> bytes:
        """Return what asks ``worker`` for the rest of the answer.

        Raises:
            LocalProtocolError: It could not go on.
        """
        return _encode(self._resumption.next_body(self._dialects.get(worker.engine), worker))

    def reading(self) -> Work:
        """Return the work of reading the prompt for another worker."""
        tokens = self._parsed.prompt_tokens
        return Work(tokens, tokens)

    def writing(self, prompt_tokens: int) -> Work:
        """Return the work of the answer, for a worker that reads ``prompt_tokens`` itself."""
        parsed = self._parsed
        bound = expected_output(parsed.max_output_tokens)
        return Work(prompt_tokens, parsed.prompt_tokens, bound)
