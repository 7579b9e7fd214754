"""The KV that a pretend prefill worker holds for others, and how another one takes it.

What stands for the KV is the number from which an answer's tokens follow, so that a decode worker
that is given the handoff of another request answers that other prompt: a test sees it.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass

MAX_LEASES = 65_536
CLAIM_S = 2.0
"""Bound on taking a handoff over; then the prompt is computed."""

MAX_ANSWER_BYTES = 256


@dataclass(frozen=True, slots=True)
class Handoff:
    """What a handoff says of its KV: the worker that has it, and under which name."""

    host: str
    port: int
    key: str


def key_of(ticket: str) -> str:
    """Return the name under which the KV of a ticket is kept: fit for a URL."""
    return f"{zlib.crc32(ticket.encode()):08x}-{len(ticket)}-{zlib.adler32(ticket.encode()):08x}"


class Leases:
    """KV published and not taken yet; each is taken once or expires.

    Args:
        lease_s: How long one is kept.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self.expired = 0
        self._kept: dict[str, tuple[int, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def publish(self, key: str, seed: int) -> bool:
        """Keep KV under a name; False when there is no room."""
        if len(self._kept) >= MAX_LEASES:
            return False
        self.take(key)
        loop = asyncio.get_running_loop()
        self._kept[key] = (seed, loop.call_later(self.lease_s, self._expire, key))
        return True

    def take(self, key: str) -> int | None:
        """Return the KV of a name and forget it; None when it is not here (any more)."""
        found = self._kept.pop(key, None)
        if found is None:
            return None
        found[1].cancel()
        return found[0]

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._kept):
            self.take(key)

    def _expire(self, key: str) -> None:
        self._kept.pop(key, None)
        self.expired += 1


async def claim(handoff: Handoff, *, timeout_s: float = CLAIM_S) -> int | None:
    """Take a handoff from the worker that has it; None when it is gone or the worker is."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                handoff.host, handoff.port, limit=MAX_ANSWER_BYTES
            )
            writer.write(b"GET /kv/%b HTTP/1.1\r\nhost: x\r\n\r\n" % handoff.key.encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(min(length, MAX_ANSWER_BYTES))
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return None
    except ValueError:  # not the answer of a worker
        return None
    finally:
        if writer is not None:
            writer.transport.abort()
    return int(body) if head.startswith(b"HTTP/1.1 200") and body.isdigit() else None
