"""Everything that differs between the known interfaces of TensorRT-LLM.

Two eras are known, called by where the connector's base classes are: the new path since about 1.3,
the old one in 1.2. The abstract methods are the same in both.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disagg_plugins.errors import UnsupportedEngineError

NEW_PATH = "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector"
OLD_PATH = "tensorrt_llm._torch.pyexecutor.kv_cache_connector"


def base_classes() -> tuple[type, type]:
    """Return ``KvCacheConnectorScheduler`` and ``KvCacheConnectorWorker``.

    Raises:
        UnsupportedEngineError: Neither path has them.
    """
    problems = []
    for path in (NEW_PATH, OLD_PATH):
        try:
            found = importlib.import_module(path)
            return found.KvCacheConnectorScheduler, found.KvCacheConnectorWorker
        except (ImportError, AttributeError) as exc:
            problems.append(f"{path}: {exc}")
    raise UnsupportedEngineError(
        f"no KV connector interface in this TensorRT-LLM ({'; '.join(problems)}); 1.2 and later "
        "have one"
    )


def rank() -> int:
    """Return the number of this process among the ranks (``tensorrt_llm.mpi_rank``)."""
    found: int = importlib.import_module("tensorrt_llm").mpi_rank()
    return found


def tokens_of(request: Any) -> list[int]:
    """Return a request's tokens; ``get_tokens(0)`` is bound in the C++ base class too."""
    return list(request.get_tokens(0))


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of a ``SchedulerOutput``, whatever the era.

    Attributes:
        request_id: Its id.
        tokens: New tokens; of a new request the whole prompt.
        blocks: New block ids; -1 stands for a block outside of a window.
        position: Tokens that were computed before. Where we load synchronously they are left out,
            where we load asynchronously they are in it.
        scheduled: Tokens that are computed now.
    """

    request_id: int
    tokens: Sequence[int]
    blocks: Sequence[int]
    position: int
    scheduled: int


def entries(output: Any) -> tuple[list[Entry], list[Entry]]:
    """Return the new and the known requests of an output; of None nothing (1.2-era)."""
    if output is None:
        return [], []
    return [_entry(r) for r in output.new_requests], [_entry(r) for r in output.cached_requests]


def _entry(data: Any) -> Entry:
    tokens = list(data.new_tokens)
    scheduled = getattr(data, "num_scheduled_tokens", None)
    return Entry(
        int(data.request_id),
        tokens,
        list(data.new_block_ids),
        int(data.computed_position),
        len(tokens) if scheduled is None else int(scheduled),
    )
