"""Which worker of the policy this engine is, where the flag does not say.

The engine's core and workers are children of the API server, whose command line names its port;
the policy names every worker's URL. A port that fits exactly one worker gives the name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy

DEFAULT_PORT = 8000
"""vLLM's own (``vllm serve --help``, 0.32)."""

SERVER_WORDS = ("vllm.entrypoints.openai.api_server", "serve")
VARIABLE = "DISAGG_WORKER"


def port_of(argv: Sequence[str]) -> int | None:
    """Return the port that an API server's command line asks for, or None for other programs."""
    if not any(word in argv for word in SERVER_WORDS):
        return None
    for i, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag == "--port":
            text = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
            return int(text) if text.isdecimal() else None
    return DEFAULT_PORT


def worker_at(policy: Policy, port: int) -> str | None:
    """Return the only worker of the policy with that port, or None."""
    names = [w.name for w in policy.fleet.workers if urlsplit(w.url).port == port]
    return names[0] if len(names) == 1 else None


def ancestors() -> Iterable[Sequence[str]]:
    """Yield the command lines of this process and those above it, as far as they can be read."""
    try:
        process = psutil.Process()
        for each in (process, *process.parents()):
            yield each.cmdline()
    except psutil.Error:
        return


def worker_name(
    policy: Policy, given: object, command_lines: Iterable[Sequence[str]] | None = None
) -> str:
    """Return the name of this worker in reports.

    Args:
        policy: The policy.
        given: ``worker`` of the connector's extra config; wins if it is a text.
        command_lines: For tests; this process's ancestors otherwise.

    Returns:
        The given name, ``DISAGG_WORKER``, the worker whose port the server listens on, or host and
        process id, which the gateway shows as unknown.
    """
    if isinstance(given, str) and given:
        return given[:64]
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE][:64]
    for argv in ancestors() if command_lines is None else command_lines:
        port = port_of(argv)
        if port is not None and (name := worker_at(policy, port)) is not None:
            return name
    return f"{os.uname().nodename}-{os.getpid()}"[:64]
