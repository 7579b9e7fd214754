"""What ``disagg`` logs to standard error: when, how bad, by whom, and nothing twice."""

from __future__ import annotations

import logging
from datetime import datetime

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

OWN = (
    "disagg_plugins",
    "disagg_reference",
    "disagg_vllm",
    "disagg_sglang",
    "disagg_trtllm",
    "disagg_kv_shm",
    "disagg_kv_tcp",
)
"""The packages of this project; what libraries have to say below a warning is theirs."""


class IsoFormatter(logging.Formatter):
    """Writes local time with its offset, as ISO 8601 has it: logs of several hosts are compared."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time of a record, to the millisecond."""
        return (
            datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        )


def set_up() -> None:
    """Log warnings to standard error, unless the process logs already."""
    handler = logging.StreamHandler()
    handler.setFormatter(IsoFormatter(FORMAT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def show_progress() -> None:
    """Show what this project's own packages tell, for commands that run for long."""
    for name in OWN:
        logger = logging.getLogger(name)
        # with --debug the root lets more through already
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
