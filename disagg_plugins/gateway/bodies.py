"""What workers are sent for one request, as JSON, and what work that is for them (sans-IO)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from disagg_plugins.gateway.announcing import AnnouncedBody
from disagg_plugins.gateway.dialect import announcing
from disagg_plugins.gateway.worker_state import Work
from disagg_plugins.scheduling.prediction import expected_output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from disagg_plugins.gateway.dialect import Dialect, HandoffRef, Published
    from disagg_plugins.gateway.openai import ParsedRequest
    from disagg_plugins.gateway.resumption import Resumption
    from disagg_plugins.types import Worker

_encode = msgspec.json.encode


class UnreadableError(Exception):
    """A worker's answer is not JSON."""


class Bodies:
    """Writes the bodies of one request's calls, in each worker's dialect.

    Args:
        parsed: The request.
        dialects: By engine.
        resumption: Asks for what another worker would need to go on.
    """

    __slots__ = ("_dialects", "_parsed", "_resumption")

    def __init__(
        self, parsed: ParsedRequest, dialects: Mapping[str, Dialect], resumption: Resumption
    ) -> None:
        self._parsed = parsed
        self._dialects = dialects
        self._resumption = resumption

    def prefill(self, worker: Worker, ref: HandoffRef) -> bytes:
        """Return what asks ``worker`` to read the prompt and hand over its KV."""
        dialect = self._dialects[worker.engine]
        body = _encode(dialect.prefill_body(self._parsed.body, ref))
        return self._announced(dialect, "prefill", body, ref, None)

    def published(self, worker: Worker, ref: HandoffRef, answer: bytes) -> Published | None:
        """Return what the answer of a prefill worker tells of where the KV is.

        Raises:
            UnreadableError: It is not JSON.
            RemoteProtocolError: It tells nothing of a handoff.
        """
        try:
            plain = msgspec.json.decode(answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise UnreadableError(f"its answer is not JSON: {exc}") from exc
        dialect = self._dialects[worker.engine]
        return dialect.published(plain if isinstance(plain, dict) else {}, ref)

    def decode(self, worker: Worker, ref: HandoffRef, published: Published | None) -> bytes:
        """Return what asks ``worker`` to write the answer to a prompt that was handed over."""
        dialect = self._dialects[worker.engine]
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
    ) -> bytes:
        teller = announcing(dialect)
        if teller is None:
            return body
        return AnnouncedBody.of(body, _encode(teller.announcement(step, ref, published)))

    def whole(self, worker: Worker) -> bytes:
        """Return what asks ``worker`` to do all of the request."""
        parsed, dialect = self._parsed, self._dialects.get(worker.engine)
        body = parsed.body if dialect is None else dialect.local_body(parsed.body)
        body = self._resumption.body(dialect, worker, body)
        return parsed.raw if body is parsed.body else _encode(body)

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
