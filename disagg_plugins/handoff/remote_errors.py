"""Errors that cross the wire: an exception here becomes an ERROR frame, and the reverse."""

from __future__ import annotations

from disagg_plugins.errors import (
    AuthenticationError,
    HandoffAborted,
    HandoffError,
    HandoffTimeout,
    IncompatiblePeerError,
    ProtocolError,
    RemoteProtocolError,
    TransportError,
)
from disagg_plugins.handoff.frames import FrameType, pack_frame
from disagg_plugins.handoff.messages import ErrorMessage, encode


def error_frame(exc: BaseException) -> bytes:
    """Return the ERROR frame that tells a peer about ``exc``."""
    mismatches: list[tuple[str, str | int, str | int]] = []
    text = exc.problem if isinstance(exc, HandoffError) else str(exc)
    match exc:
        case AuthenticationError():
            code = "auth"
        case IncompatiblePeerError():
            code = "version" if exc.mismatches[0][0] == "protocol version" else "incompatible"
            mismatches = [(f[:256], _plain(a), _plain(b)) for f, a, b in exc.mismatches[:32]]
            text = f"{exc.ours}\n{exc.theirs}"
        case HandoffTimeout():
            code = "timeout"
        case HandoffError():
            code = "aborted"
        case ProtocolError():
            code = "protocol"
        case _:
            code, text = "internal", f"the publisher failed with {type(exc).__name__}"
    message = ErrorMessage(code, text[:8192], mismatches)  # type: ignore[arg-type]
    return pack_frame(FrameType.ERROR, encode(message))


def exception_of(message: ErrorMessage, *, handoff_id: str, ours: str) -> Exception:
    """Return the exception that an ERROR stands for, seen from this side."""
    match message.code:
        case "auth":
            return AuthenticationError(f"the publisher refused: {message.message}")
        case "incompatible" | "version":
            theirs = message.message.partition("\n")[0]
            swapped: list[tuple[str, object, object]] = [
                (field, b, a) for field, a, b in message.mismatches
            ]
            return IncompatiblePeerError(swapped, ours=ours, theirs=theirs)
        case "aborted" | "timeout":
            return HandoffAborted(handoff_id, f"the publisher says: {message.message}")
        case "protocol":
            return RemoteProtocolError(f"the publisher refused: {message.message}")
        case _:
            return TransportError("handoff", message.message)


def _plain(value: object) -> str | int:
    return value if isinstance(value, int) else str(value)[:256]
