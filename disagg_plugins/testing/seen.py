"""What a pretend engine saw of its clients."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

Json = dict[str, object]


@dataclass(slots=True)
class Seen:
    """What the engine saw."""

    requests: int = 0
    prefills: int = 0
    decodes: int = 0
    locals: int = 0
    completed: int = 0
    aborted: int = 0
    claimed: int = 0
    not_claimed: int = 0
    bodies: deque[Json] = field(default_factory=lambda: deque(maxlen=64))
    headers: deque[dict[str, str]] = field(default_factory=lambda: deque(maxlen=64))
