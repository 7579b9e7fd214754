"""HTTP/1.1 heads as bytes: what is forwarded, what is not, and the framing of answers (sans-IO).

The gateway frames every message itself, in both directions; no framing header of one side is ever
copied to the other, so the two sides cannot disagree about where a message ends.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from http import HTTPStatus

Header = tuple[bytes, bytes]
"""Name in lower case, value as received."""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
    }
)
"""RFC 9110 section 7.6.1, with the older names that are still sent."""

NOT_UPSTREAM = HOP_BY_HOP | {
    b"host",
    b"content-length",
    b"content-type",
    b"expect",
    b"accept-encoding",  # answers are observed, so they come uncompressed
    b"x-request-id",
    # said to this gateway, and nothing of a worker's business
    b"x-disagg-signature",
    b"x-disagg-arm",
    b"x-disagg-explain",
    b"x-disagg-session",
    b"x-disagg-slo-class",
    b"x-disagg-tenant",
}
NOT_DOWNSTREAM = HOP_BY_HOP | {b"content-length", b"x-request-id", b"x-disagg-explain"}

_PLAIN_CONNECTION = (b"keep-alive", b"close")
"""The usual values of ``Connection``; they name no other header."""

MAX_REQUEST_ID_CHARS = 128
_ID_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:-")

STATUS_LINES = {
    s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode("ascii")) for s in HTTPStatus
}


def status_line(status: int) -> bytes:
    """Return the first line of an answer, with its line end."""
    line = STATUS_LINES.get(status)
    return line if line is not None else b"HTTP/1.1 %d Unknown\r\n" % status


def header_value(headers: Sequence[Header], name: bytes) -> bytes | None:
    """Return the first value of a header, or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def request_id(headers: Sequence[Header]) -> str:
    """Return the client's ``X-Request-Id`` if it is short and harmless, else a new one."""
    given = header_value(headers, b"x-request-id")
    if given and len(given) <= MAX_REQUEST_ID_CHARS and _ID_BYTES.issuperset(given):
        return given.decode("ascii")
    return secrets.token_hex(16)


def _named_by_connection(headers: Sequence[Header]) -> frozenset[bytes]:
    """Return the headers that ``Connection`` declares to be hop-by-hop."""
    named = [
        token.strip().lower()
        for key, value in headers
        if key == b"connection"
        for token in value.split(b",")
    ]
    return frozenset(named) - {b"keep-alive", b"close", b""}


def forwarded(headers: Sequence[Header], dropped: frozenset[bytes]) -> bytes:
    """Return the headers that pass to the other side, as lines."""
    for key, value in headers:
        if key == b"connection" and value not in _PLAIN_CONNECTION:
            dropped = dropped | _named_by_connection(headers)
            break
    return b"".join([b"%b: %b\r\n" % h for h in headers if h[0] not in dropped])


def upstream_headers(headers: Sequence[Header], request_id_text: str) -> bytes:
    """Return the lines that all upstream calls of one request share."""
    return b"%bx-request-id: %b\r\ncontent-type: application/json\r\n" % (
        forwarded(headers, NOT_UPSTREAM),
        request_id_text.encode("ascii"),
    )


def post(path: bytes, host: bytes, shared: bytes, body: bytes) -> bytes:
    """Return a whole POST request."""
    return b"POST %b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
        path,
        host,
        shared,
        len(body),
        body,
    )


def get(path: bytes, host: bytes) -> bytes:
    """Return a whole GET request."""
    return b"GET %b HTTP/1.1\r\nhost: %b\r\naccept: application/json\r\n\r\n" % (path, host)


def answer_head(
    status: int, lines: bytes, *, length_bytes: int | None, chunked: bool, close: bool
) -> bytes:
    """Return the head of an answer.

    Args:
        status: HTTP status.
        lines: Header lines that say nothing of framing.
        length_bytes: Length of the body; None when it is not known.
        chunked: With an unknown length, use chunks (HTTP/1.1) or else close at the end.
        close: Whether the connection ends with this answer.
    """
    framing = b""
    if length_bytes is not None:
        framing = b"content-length: %d\r\n" % length_bytes
    elif chunked:
        framing = b"transfer-encoding: chunked\r\n"
    end = b"connection: close\r\n\r\n" if close else b"\r\n"
    return b"%b%b%b%b" % (status_line(status), lines, framing, end)
