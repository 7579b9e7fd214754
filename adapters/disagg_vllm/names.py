"""Which worker of the policy this engine is, where the flag does not say.

The engine's core and workers are children of the API server, whose command line names its port;
the policy names every worker's URL. A port that fits exactly one worker gives the name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import psutil

from disagg_plugins.engine.settings import MAX_NAME_CHARS, WORKER_ENV, nameless, worker_at

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy

DEFAULT_PORT = 8000
"""vLLM's own (``vllm serve --help``, 0.32)."""

SERVER_WORDS = ("vllm.entrypoints.openai.api_server", "serve")


def port_of(argv: Sequence[str]) -> int | None:
    """Return the port that an API server's command line asks for, or None for other programs."""
    if not any(word in argv for word in SERVER_WORDS):
        return None
    text = option_of(argv, "--port")
    if text is None:
        return DEFAULT_PORT
    return int(text) if text.isdecimal() else None


def option_of(argv: Sequence[str], flag: str) -> str | None:
    """Return what an API server's command line gives for ``flag``, or None."""
    if not any(word in argv for word in SERVER_WORDS):
        return None
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name == flag:
            return value if equals else argv[i + 1] if i + 1 < len(argv) else ""
    return None


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
        return given[:MAX_NAME_CHARS]
    if os.environ.get(WORKER_ENV):
        return os.environ[WORKER_ENV][:MAX_NAME_CHARS]
    for argv in ancestors() if command_lines is None else command_lines:
        port = port_of(argv)
        if port is not None and (name := worker_at(policy, port)) is not None:
            return name
    return nameless()
