"""The published KV connector interface, importable under TensorRT-LLM's own module names.

Two eras: ``1.2`` (old path, fewer fields) and ``main`` (new path, calls by layer group). A
TensorRT-LLM that is installed is never hidden.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from disagg_plugins.errors import UnsupportedEngineError

Era = Literal["1.2", "main"]
ERAS: tuple[Era, ...] = ("1.2", "main")

PATHS: dict[Era, str] = {
    "1.2": "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
    "main": "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",
}

_here = threading.local()


def mpi_rank() -> int:
    """Return the rank of the calling thread: all ranks of a host live in one process."""
    found: int = getattr(_here, "rank", 0)
    return found


def be_rank(rank: int) -> None:
    """Make the calling thread one of a rank."""
    _here.rank = rank


# What is handed to connectors


@dataclass
class RequestData12:
    """One request of an iteration, 1.2-era."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int


@dataclass
class RequestDataMain(RequestData12):
    """One request of an iteration, main-era."""

    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)


@dataclass
class SchedulerOutput12:
    """One iteration, 1.2-era."""

    new_requests: list[RequestData12] = field(default_factory=list)
    cached_requests: list[RequestData12] = field(default_factory=list)


@dataclass
class SchedulerOutputMain(SchedulerOutput12):
    """One iteration, main-era."""

    attention_dp_rank: int | None = None


# What connectors subclass


class Worker12(ABC):
    """``KvCacheConnectorWorker``, 1.2-era."""

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: Any = None
        super().__init__()

    def bind_connector_meta(self, metadata: object) -> None:
        """Take what the scheduler half made for this iteration."""
        self._metadata = metadata

    def get_connector_meta(self) -> object:
        """Return what was bound."""
        return self._metadata

    def _clear_connector_meta(self) -> None:
        self._metadata = None

    def register_forward_pass_callable(self) -> Any:
        """Return what is called at the end of a forward pass, or None."""
        return None

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        """Take the KV tensor."""

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None:
        """Begin to load."""

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Wait for a layer."""

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Save a layer."""

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None:
        """Wait for saves."""

    @abstractmethod
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Return which asynchronous saves and loads are over."""


class Scheduler12(ABC):
    """``KvCacheConnectorScheduler``, 1.2-era."""

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> object:
        """Return what the worker halves are told."""

    @abstractmethod
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Return what can be loaded."""

    @abstractmethod
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Return whether blocks are being saved asynchronously."""

    @abstractmethod
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Take a request's blocks."""


class WorkerMain(Worker12):
    """``KvCacheConnectorWorker``, main-era."""

    supports_attention_dp: bool = False

    def register_kv_cache_layout(self, layout: Any) -> None:
        """Take the layout; by default its one pool."""
        self.register_kv_caches(layout.as_single_pool_tensor())


class SchedulerMain(Scheduler12):
    """``KvCacheConnectorScheduler``, main-era."""

    supports_attention_dp: bool = False

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        grouped = {
            "request_finished": "request_finished_by_layer_group",
            "update_state_after_alloc": "update_state_after_alloc_by_layer_group",
        }
        own = vars(cls)
        for flat, by_group in grouped.items():
            if by_group in own and flat not in own:
                setattr(cls, flat, _only_grouped)

    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        """Like ``request_finished``; by default that, for one group."""
        (blocks,) = cache_block_ids_by_layer_group
        return self.request_finished(request, blocks)

    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        """Like ``update_state_after_alloc``; by default that, for one group."""
        (blocks,) = block_ids_by_layer_group
        self.update_state_after_alloc(request, blocks)

    def wait_for_initialization(self) -> None:
        """Return when the connector is ready."""


def _only_grouped(self: object, *args: object) -> None:
    raise NotImplementedError("this connector takes blocks by layer group")


@dataclass(frozen=True)
class KvCacheLayout:
    """The layout of one pool, as the main-era hands it over."""

    tensor: Any

    def as_single_pool_tensor(self) -> Any:
        """Return the pool."""
        return self.tensor


class LlmRequestCpp:
    """A request as ``get_num_new_matched_tokens`` sees it: what the C++ base class binds only."""

    __slots__ = ("_tokens", "prompt_len", "request_id")

    def __init__(self, request_id: int, tokens: Sequence[int]) -> None:
        self.request_id, self.prompt_len = request_id, len(tokens)
        self._tokens = list(tokens)

    def get_tokens(self, beam: int) -> list[int]:
        """Return the tokens of a beam."""
        if beam != 0:
            raise IndexError(beam)
        return list(self._tokens)

    @property
    def is_generation_only_request(self) -> bool:
        """A property here, a method on the Python subclass."""
        return False


class LlmRequestPython(LlmRequestCpp):
    """A request as the other callbacks see it."""

    __slots__ = ("py_request_id",)

    def __init__(self, request_id: int, tokens: Sequence[int]) -> None:
        super().__init__(request_id, tokens)
        self.py_request_id = request_id

    def is_generation_only_request(self) -> bool:  # type: ignore[override]
        """See ``LlmRequestCpp``."""
        return False


def modules(era: Era) -> dict[str, ModuleType]:
    """Return the modules of an era by their names."""
    path = PATHS[era]
    names = [path.rsplit(".", count)[0] for count in range(path.count("."), -1, -1)]
    found = {name: ModuleType(name) for name in names}
    for name, module in found.items():
        module.__path__ = []
        parent, _, last = name.rpartition(".")
        if parent in found:
            setattr(found[parent], last, module)
    root, interface = found["tensorrt_llm"], found[path]
    main = era == "main"
    root.__dict__.update(mpi_rank=mpi_rank, __version__="1.2.0" if not main else "1.4.0rc1")
    interface.__dict__.update(
        KvCacheConnectorWorker=WorkerMain if main else Worker12,
        KvCacheConnectorScheduler=SchedulerMain if main else Scheduler12,
        RequestData=RequestDataMain if main else RequestData12,
        SchedulerOutput=SchedulerOutputMain if main else SchedulerOutput12,
    )
    return found


@contextmanager
def installed(era: Era, *fresh: str) -> Iterator[None]:
    """Make the interface of an era importable, and modules named ``fresh`` be imported anew.

    Raises:
        UnsupportedEngineError: A real TensorRT-LLM is installed.
    """
    real = sys.modules.get("tensorrt_llm")
    if real is None and importlib.util.find_spec("tensorrt_llm") is not None:
        raise UnsupportedEngineError(
            "TensorRT-LLM is installed here: use it, not a host that follows its interface"
        )
    before = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] == "tensorrt_llm" or name in fresh
    }
    sys.modules.update(modules(era))
    try:
        yield
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] == "tensorrt_llm" or name in fresh:
                del sys.modules[name]
        sys.modules.update(before)
