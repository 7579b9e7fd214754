"""Whether a client was served right, told clearly, or wronged (pure)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["right", "clear_error", "lost", "duplicated", "wrong", "client_abort"]


@dataclass(slots=True)
class Reply:
    """What a client got.

    Attributes:
        status: Of the answer's head; 0: no head came.
        body: Without framing.
        complete: The framing said that this is all.
        surplus: More came after it.
        problem: Why there is no more; empty when complete.
        seconds: From sending to the end.
        aborted: The client itself reset the connection.
        gateway_gone: The gateway was ended meanwhile, on purpose.
    """

    status: int = 0
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False
    surplus: bool = False
    problem: str = ""
    seconds: float = 0.0
    aborted: bool = False
    gateway_gone: bool = False


def judge(reply: Reply, expected: str, *, stream: bool) -> tuple[Verdict, str]:
    """Return the verdict on one reply and, unless it is right, why.

    Args:
        reply: What came.
        expected: The text of the right answer.
        stream: Whether a stream was asked for.
    """
    if reply.surplus:
        return "duplicated", "bytes after the end of the answer"
    if reply.status == 200:
        verdict, why = (_stream if stream else _whole)(reply, expected)
    elif reply.status:
        verdict, why = _error(reply)
    else:
        verdict, why = "lost", reply.problem or "no answer"
    if verdict == "lost" and reply.aborted:
        return "client_abort", why
    if verdict == "lost" and reply.gateway_gone:
        return "clear_error", f"the gateway was ended: {why}"
    return verdict, why


def _error(reply: Reply) -> tuple[Verdict, str]:
    if not reply.complete:
        return "lost", f"an incomplete answer of status {reply.status}"
    message = _message(bytes(reply.body))
    if message is None:
        return "lost", f"status {reply.status} without a JSON error: {bytes(reply.body[:80])!r}"
    return "clear_error", f"{reply.status} {message}"


def _message(raw: bytes) -> str | None:
    try:
        said = json.loads(raw)
    except ValueError:
        return None
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) and message else None


def _whole(reply: Reply, expected: str) -> tuple[Verdict, str]:
    if not reply.complete:
        return "lost", f"broken off after {len(reply.body)} bytes: {reply.problem}"
    try:
        choice = json.loads(reply.body)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (ValueError, LookupError, TypeError):
        return "wrong", f"no answer in {bytes(reply.body[:80])!r}"
    return _compare(text, expected, complete=True)


def _stream(reply: Reply, expected: str) -> tuple[Verdict, str]:
    text, error, ended = "", None, False
    for event in bytes(reply.body).split(b"\n\n"):
        if not event.startswith(b"data: "):
            continue
        data = event[6:]
        if data == b"[DONE]":
            ended = True
            continue
        if ended:
            return "duplicated", "an event after the end mark"
        error = error or _message(data)
        try:
            text += _piece(json.loads(data))
        except ValueError:
            if reply.complete:
                return "wrong", f"an event that is not JSON: {data[:80]!r}"
    verdict, why = _compare(text, expected, complete=False)
    if verdict != "right":
        return verdict, why
    if error is not None:
        return "clear_error", f"an error event: {error}"
    if not reply.complete and not ended:
        return "lost", f"cut off without a word after {len(text)} characters: {reply.problem}"
    if not ended:
        return "wrong", "a complete stream without its end mark"
    return _compare(text, expected, complete=True)


def _piece(event: object) -> str:
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return ""
    choice = choices[0]
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _compare(text: str, expected: str, *, complete: bool) -> tuple[Verdict, str]:
    if text == expected or (not complete and expected.startswith(text)):
        return "right", ""
    got, wanted = text.split(), expected.split()
    if len(set(got)) < len(got) and list(dict.fromkeys(got)) == wanted[: len(set(got))]:
        return "duplicated", f"tokens twice: {text[:80]!r}"
    return "wrong", f"{text[:80]!r} instead of {expected[:80]!r}"
