"""The heads and the errors that the client of one request gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from disagg_plugins.gateway.refusals import RequestError, error_body
from disagg_plugins.gateway.sse import read_answer
from disagg_plugins.gateway.wire import NOT_DOWNSTREAM, forwarded
from disagg_plugins.telemetry.records import FailureRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from disagg_plugins.gateway.dialect import Body
    from disagg_plugins.gateway.flow import BreakAnswer
    from disagg_plugins.gateway.reply import Reply
    from disagg_plugins.gateway.timeline import Timeline
    from disagg_plugins.gateway.wire import Header
    from disagg_plugins.telemetry.records import RequestRecord

_encode = msgspec.json.encode

_JSON = ((b"content-type", b"application/json"),)


class Answers:
    """Answers of the gateway's own, and what stands before those of workers.

    Args:
        client: Who is answered.
        own_lines: Lines of the gateway's own in every head.
        record: Is told the status.
    """

    __slots__ = ("_client", "_own_lines", "_record")

    def __init__(self, client: Reply, own_lines: bytes, record: RequestRecord) -> None:
        self._client = client
        self._own_lines = own_lines
        self._record = record

    def lines(self, headers: Sequence[Header]) -> bytes:
        """Return the lines of a head that passes a worker's ``headers`` on."""
        return forwarded(headers, NOT_DOWNSTREAM) + self._own_lines

    def verbatim(self, status: int, headers: Sequence[Header], body: bytes) -> None:
        """Answer what a worker answered that is no success."""
        if not body.lstrip().startswith(b"{"):
            message = f"the worker answered {status} without saying why"
            self.error(status, message, code=None)
            return
        self._record.status = status
        self._client.answer(status, body, self.lines(headers))

    def whole(self, answer: Body, as_asked: tuple[bytes, bytes], times: Timeline) -> None:
        """Answer in one go with what prefill has ended, and record it.

        Args:
            answer: Of the prefill worker.
            as_asked: The same as the client asked for it, and the line that names its type.
            times: Are told that the first token came with it.
        """
        body, type_line = as_asked
        said, record = read_answer(_encode(answer)), self._record
        record.status, record.ended_by_prefill = 200, True
        record.finish = said.finish
        record.prompt_tokens, record.output_tokens = said.prompt_tokens, said.output_tokens
        times.stamp(times.prefill_end_s)
        self._client.answer(200, body, type_line + self._own_lines)

    def error(self, status: int, message: str, *, code: str | None) -> None:
        """Answer with an error of the gateway's own."""
        self._record.status = status
        body = error_body(status, message, code=code)
        again = b"retry-after: 1\r\n" if status == 503 else b""
        self._client.answer(status, body, self.lines(_JSON) + again)

    def abandoned(self, exc: Exception) -> None:
        """End the answer to a request at which the gateway itself failed, as far as it goes."""
        status, code, message = 500, "internal", "the gateway failed; its log says why"
        if isinstance(exc, RequestError):
            status, code, message = exc.status, exc.code or "invalid_json", exc.message
        detail = f"{type(exc).__name__}: {exc}"[:300]
        self._record.failures.append(FailureRecord("", "gateway", code, detail))
        if self._client.started:
            self._client.break_off(b"")
        else:
            self.error(status, message, code=code)

    def break_off(self, last: bytes, why: BreakAnswer, *, events: bool) -> None:
        """End an answer visibly; one made of ``events`` with an event that tells why."""
        if events:
            error = error_body(why.status, why.message, code=why.code)
            last += b"data: %b\n\n" % error
        self._client.break_off(last)
