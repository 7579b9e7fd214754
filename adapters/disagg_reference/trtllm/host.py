"""Drives a TensorRT-LLM connector pair as its executor loop does, over the engine's own KV.

Kept from the published texts: both classes are built at once on two threads, the scheduler half on
rank 0 only; each rank's calls come from a thread of its own; matches are asked for with the radix
tree locked and with the C++ view of a request; ``update_state_after_alloc`` is called on rank 0
without the others knowing; requests that load asynchronously are in no ``SchedulerOutput``;
metadata is pickled where there is more than one rank, and travels only with a batch; what is
finished is what all ranks say; ids that nobody asked about are errors; an id that was seen once is
never new again, and is told by what it has more than its predecessor. Metadata stays bound until
the next batch's, an engine with nothing to do asks for nothing, and the 1.2-era tells nobody that a
request was cancelled. What a connector does wrong is a ``BrokenRule`` with the rule's name.
"""

from __future__ import annotations

import importlib
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from disagg_plugins.errors import ConfigError, DisaggError
from disagg_reference.trtllm.interface import (
    Era,
    KvCacheLayout,
    LlmRequestCpp,
    LlmRequestPython,
    RequestData12,
    RequestDataMain,
    SchedulerOutput12,
    SchedulerOutputMain,
    be_rank,
    installed,
)

if TYPE_CHECKING:
    from disagg_reference.config import ModelConfig
    from disagg_reference.engine import MakeHost
    from disagg_reference.hosting import Batch, Scheduled
    from disagg_reference.pool import KVPool
    from disagg_reference.request import Request

T = TypeVar("T")

MATCH_S = 1.0
"""Longest look-up with the radix tree locked that is no wait: hashing 100,000 tokens takes 1 ms."""

LOADS_S = 60.0
CALL_S = 60.0
"""Longest call into a connector: what takes longer hangs the engine."""

Rule = Literal[
    "builds",
    "match is quick",
    "match is bounded",
    "asynchronous matches have tokens",
    "rank 0 alone never raises",
    "hooks never raise",
    "metadata pickles",
    "only asked ids finish",
    "what is parked is loaded",
    "answers are of the right kind",
]


class BrokenRule(DisaggError):
    """A connector broke a rule of the interface.

    Args:
        rule: Its name.
        detail: What it did.
    """

    def __init__(self, rule: Rule, detail: str) -> None:
        super().__init__(rule, detail)
        self.rule = rule
        self.detail = detail

    def __str__(self) -> str:
        return f"the connector broke the rule {self.rule!r}: {self.detail}"


class _Rank:
    """One rank: a thread, and the worker half that is called on it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._thread = ThreadPoolExecutor(
            1, f"rank-{number}", initializer=be_rank, initargs=(number,)
        )
        self.worker: Any = None

    def begin(self, do: Callable[[], T]) -> Future[T]:
        """Do something on the rank's thread."""
        return self._thread.submit(do)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class TrtllmHost:
    """See the module, and ``hosting.ConnectorHost``.

    Args:
        pools: KV of each rank.
        llm_args: What both classes are built with.
        scheduler: Class of the scheduler half.
        worker: Class of the worker half.
        era: Whose interface is followed.
        overlap: Whether it is told as with the overlap scheduler: an iteration does not know the
            token that the one before samples, and there is a further ``get_finished``.
        none_outputs: Whether iterations in which requests only load have no output at all, as the
            1.2-era may have.
        loads_s: Longest time that a request may be parked: nothing but the connector wakes it.

    Raises:
        BrokenRule: The classes cannot be built.
    """

    def __init__(
        self,
        pools: Sequence[KVPool],
        llm_args: Any,
        scheduler: Callable[[Any], Any],
        worker: Callable[[Any], Any],
        *,
        era: Era = "main",
        overlap: bool = False,
        none_outputs: bool = False,
        loads_s: float = LOADS_S,
    ) -> None:
        self._era, self._overlap, self._none_outputs = era, overlap, none_outputs
        self._loads_s = loads_s
        self._parked: dict[int, float] = {}  # since when
        self._ranks = [_Rank(number) for number in range(len(pools))]
        self._radix = threading.Lock()
        # tokens and blocks told of each id; never forgotten: ids are for an engine's life
        self._histories: dict[int, tuple[list[int], list[int]]] = {}
        self._live: set[int] = set()
        self._iterated = False
        self._matches: dict[int, tuple[int, bool]] = {}
        self._new_loading: list[int] = []
        self._new_saving: list[int] = []
        self._pending: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in pools]
        self._over: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in pools]
        self.scheduler: Any = None
        try:
            self._build(llm_args, scheduler, worker)
            for rank, pool in zip(self._ranks, pools, strict=True):
                self._on(rank, "builds", partial(self._register, rank, pool))
        except BaseException:
            self.close()
            raise

    def _build(
        self, llm_args: Any, scheduler: Callable[[Any], Any], worker: Callable[[Any], Any]
    ) -> None:
        def make(kind: Callable[[Any], Any], number: int) -> Any:
            be_rank(number)
            return kind(llm_args)

        for rank in self._ranks:
            both = ThreadPoolExecutor(2)  # not in a with: that would wait for one that hangs
            futures = {"worker": both.submit(make, worker, rank.number)}
            if rank.number == 0:
                futures["scheduler"] = both.submit(make, scheduler, rank.number)
            both.shutdown(wait=False)
            if wait(futures.values(), CALL_S).not_done:
                raise BrokenRule("builds", f"not built after {CALL_S:g} s")
            if "scheduler" in futures and futures["scheduler"].exception() is None:
                self.scheduler = futures["scheduler"].result()
            if futures["worker"].exception() is None:
                rank.worker = futures["worker"].result()
            for name, future in futures.items():
                if (problem := future.exception()) is not None:
                    raise BrokenRule("builds", f"the {name} half raised {problem!r}") from problem

    def _register(self, rank: _Rank, pool: KVPool) -> None:
        if self._era == "main":
            rank.worker.register_kv_cache_layout(KvCacheLayout(pool.tensor))
        else:
            rank.worker.register_kv_caches(pool.tensor)

    # Calls into the connector

    def _on(self, rank: _Rank, rule: Rule, do: Callable[[], T]) -> T:
        """Call something on a rank's thread and wait for it."""
        future = rank.begin(do)
        return self._result(rank, rule, future)

    def _result(self, rank: _Rank, rule: Rule, future: Future[T]) -> T:
        if wait([future], CALL_S).not_done:
            raise BrokenRule(rule, f"rank {rank.number} has not answered for {CALL_S:g} s")
        problem = future.exception()
        if isinstance(problem, BrokenRule):
            raise problem
        if problem is not None:
            raise BrokenRule(rule, f"rank {rank.number} raised {problem!r}") from problem
        return future.result()

    def _on_all(self, rule: Rule, do: Callable[[Any], T]) -> list[T]:
        """Call the worker halves of all ranks side by side."""
        futures = [rank.begin(lambda r=rank: do(r.worker)) for rank in self._ranks]  # type: ignore[misc]
        return [self._result(r, rule, f) for r, f in zip(self._ranks, futures, strict=True)]

    # One iteration

    def match(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """See ``ConnectorHost``: on rank 0, with the radix tree locked, then broadcast."""
        view = LlmRequestCpp(request.request_id, request.prompt)

        def ask() -> Any:
            with self._radix:
                started_s = time.monotonic()
                answer = self.scheduler.get_num_new_matched_tokens(view, computed_tokens)
                if (took_s := time.monotonic() - started_s) > MATCH_S:
                    raise BrokenRule(
                        "match is quick", f"it took {took_s:.2f} s with the radix tree locked"
                    )
            return answer

        answer = self._on(self._ranks[0], "rank 0 alone never raises", ask)
        try:
            matched, parks = answer
        except (TypeError, ValueError):
            raise BrokenRule("answers are of the right kind", f"a match of {answer!r}") from None
        if type(matched) is not int or type(parks) is not bool:
            raise BrokenRule("answers are of the right kind", f"a match of {answer!r}")
        if parks and not matched:
            raise BrokenRule(
                "asynchronous matches have tokens", "no token is loaded, asynchronously"
            )
        if matched < 0 or computed_tokens + matched >= len(request.prompt):
            raise BrokenRule(
                "match is bounded",
                f"{matched} tokens behind {computed_tokens} of a prompt of {len(request.prompt)}",
            )
        self._matches[request.request_id] = matched, parks
        self._live.add(request.request_id)
        return matched, parks

    def allocated(self, request: Request, block_ids: Sequence[int]) -> None:
        """See ``ConnectorHost``: on rank 0, and no other rank knows."""
        view, blocks = LlmRequestPython(request.request_id, request.prompt), list(block_ids)

        def tell() -> None:
            if self._era == "main":
                self.scheduler.update_state_after_alloc_by_layer_group(view, [blocks])
            else:
                self.scheduler.update_state_after_alloc(view, blocks)

        self._on(self._ranks[0], "rank 0 alone never raises", tell)

    def begin(self, batch: Batch) -> None:
        """See ``ConnectorHost``: metadata is made on rank 0 and reaches every rank."""
        self._iterated = True
        self._new_loading += [request.request_id for request in batch.parked]
        self._parked.update((r.request_id, time.monotonic()) for r in batch.parked)
        output: Any = self._output(batch)
        if self._none_outputs and not batch.scheduled:
            output = None
        metadata = self._on(
            self._ranks[0],
            "hooks never raise",
            lambda: self.scheduler.build_connector_meta(output),
        )
        copies = self._broadcast(metadata)
        for rank, copy in zip(self._ranks, copies, strict=True):
            self._on(rank, "hooks never raise", partial(rank.worker.bind_connector_meta, copy))
        self._on_all("hooks never raise", lambda worker: worker.start_load_kv(None))

    def _broadcast(self, metadata: object) -> list[object]:
        """Return each rank's metadata: the very object where there is one rank, else copies."""
        if len(self._ranks) == 1:
            return [metadata]
        try:
            sent = pickle.dumps(metadata)
            return [metadata, *(pickle.loads(sent) for _ in self._ranks[1:])]
        except Exception as exc:
            raise BrokenRule("metadata pickles", f"{type(metadata).__name__}: {exc!r}") from exc

    def _output(self, batch: Batch) -> SchedulerOutput12:
        kind = SchedulerOutputMain if self._era == "main" else SchedulerOutput12
        output = kind()
        for each in batch.scheduled:
            new = each.request.request_id not in self._histories
            (output.new_requests if new else output.cached_requests).append(self._data(each))
        return output

    def _data(self, each: Scheduled) -> RequestData12:
        request = each.request
        told_tokens, told_blocks = self._histories.setdefault(request.request_id, ([], []))
        known = request.num_tokens
        if self._overlap and request.output:
            known -= 1
        tokens = request.tokens(len(told_tokens), max(known, len(told_tokens)))
        blocks = list(request.blocks[len(told_blocks) :])
        told_tokens += tokens
        told_blocks += blocks
        matched, parked = self._matches.get(request.request_id, (0, False))
        position = each.start if each.start < len(request.prompt) else known - 1
        if each.first and not parked:
            position -= matched  # what is loaded synchronously is not counted yet
        kind = RequestDataMain if self._era == "main" else RequestData12
        data = kind(request.request_id, tokens, blocks, position, each.count)
        if isinstance(data, RequestDataMain):
            data.new_block_ids_by_layer_group = [list(blocks)]
        return data

    def before_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""
        self._on_all("hooks never raise", lambda w: w.wait_for_layer_load(layer, None))

    def after_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""
        self._on_all("hooks never raise", lambda w: w.save_kv_layer(layer, None))

    def end(self) -> None:
        """See ``ConnectorHost``."""
        self._on_all("hooks never raise", lambda worker: worker.wait_for_save(None))

    def cancel(self, request: Request) -> None:
        """See ``ConnectorHost``: the interface has no word for it that is sure to be heard."""

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        """See ``ConnectorHost``: asked on rank 0, then broadcast."""
        tokens = request.tokens(0, request.num_tokens)
        view, blocks = LlmRequestPython(request.request_id, tokens), list(block_ids)
        view.prompt_len = len(request.prompt)
        self._matches.pop(request.request_id, None)
        self._live.discard(request.request_id)
        if self._era == "1.2" and _was_cancelled(request):
            return False  # the loop gives its blocks back, and tells nobody

        def ask() -> Any:
            if self._era == "main":
                return self.scheduler.request_finished_by_layer_group(view, [blocks])
            return self.scheduler.request_finished(view, blocks)

        answer = self._on(self._ranks[0], "hooks never raise", ask)
        if type(answer) is not bool:
            raise BrokenRule("answers are of the right kind", f"request_finished: {answer!r}")
        if answer:
            self._new_saving.append(request.request_id)
        return answer

    def poll(self) -> tuple[Sequence[int], Sequence[int]]:
        """See ``ConnectorHost``: what every rank says is over; nobody is asked while all is idle.

        The executor then waits for a request, so what is being saved stays until one comes.
        """
        if not (self._live or self._iterated):
            return (), ()
        self._iterated = False
        for _ in range(2 if self._overlap else 1):
            saving, loading = self._new_saving, self._new_loading
            self._new_saving, self._new_loading = [], []
            for asked in self._pending:
                asked[0].update(saving)
                asked[1].update(loading)
            answers = self._on_all(
                "hooks never raise", partial(_get_finished, saving=saving, loading=loading)
            )
            for rank, answer in enumerate(answers):
                self._note_over(rank, answer)
        saved = set.intersection(*(over[0] for over in self._over))
        loaded = set.intersection(*(over[1] for over in self._over))
        for over in self._over:
            over[0].difference_update(saved)
            over[1].difference_update(loaded)
        for request_id in loaded:
            del self._parked[request_id]
        for request_id, since_s in self._parked.items():
            if (took_s := time.monotonic() - since_s) > self._loads_s:
                raise BrokenRule(
                    "what is parked is loaded", f"request {request_id} waits for {took_s:.1f} s"
                )
        return sorted(saved), sorted(loaded)

    def _note_over(self, rank: int, answer: Any) -> None:
        try:
            parts: tuple[Iterable[int], Iterable[int]] = answer
            saved, loaded = (list(part) for part in parts)
        except (TypeError, ValueError):
            raise BrokenRule("answers are of the right kind", f"get_finished: {answer!r}") from None
        for ids, kind in ((saved, 0), (loaded, 1)):
            for request_id in ids:
                if request_id not in self._pending[rank][kind]:
                    raise BrokenRule(
                        "only asked ids finish",
                        f"rank {rank} says {request_id!r} {('saved', 'loaded')[kind]}, which "
                        f"nobody asked about, or which it had said before",
                    )
                self._pending[rank][kind].discard(request_id)
                self._over[rank][kind].add(request_id)

    def close(self) -> None:
        """End the connector, where it can be ended, and the ranks' threads."""
        for half in (self.scheduler, *(rank.worker for rank in self._ranks)):
            if callable(end := getattr(half, "close", None)):
                end()
        for rank in self._ranks:
            rank.close()


def _was_cancelled(request: Request) -> bool:
    output = request.output
    return len(output) < request.max_tokens and not (output and output[-1] in request.eos)


def _get_finished(worker: Any, *, saving: list[int], loading: list[int]) -> Any:
    return worker.get_finished(list(saving), list(loading))


def host_maker(path: Path, model: Path, era: Era = "main") -> MakeHost:
    """Return what makes a host of the connector that a YAML file names.

    Args:
        path: Has TensorRT-LLM's ``kv_connector_config``.
        model: The model's folder.
        era: Whose interface is followed.

    Raises:
        ConfigError: The file is wrong.
    """
    module, scheduler, worker = read_connector_config(path)

    def make(pools: Sequence[KVPool], config: ModelConfig) -> TrtllmHost:
        with installed(era, module):
            found = importlib.import_module(module)
            kinds = getattr(found, scheduler), getattr(found, worker)
            return TrtllmHost(pools, llm_args(pools, model), *kinds, era=era)

    return make


def read_connector_config(path: Path) -> tuple[str, str, str]:
    """Return module, scheduler class and worker class of a ``kv_connector_config``.

    Raises:
        ConfigError: One is missing, or there is another key: the 1.2-era refuses those.
    """
    try:
        said = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as exc:
        raise ConfigError(f"cannot be read: {exc}", file=str(path)) from exc
    config = said.get("kv_connector_config") if isinstance(said, dict) else None
    keys = ("connector_module", "connector_scheduler_class", "connector_worker_class")
    if not isinstance(config, dict) or set(config) != set(keys):
        raise ConfigError(
            f"kv_connector_config must have exactly {', '.join(keys)}", file=str(path)
        )
    module, scheduler, worker = (str(config[key]) for key in keys)
    return module, scheduler, worker


def llm_args(pools: Sequence[KVPool], model: Path) -> SimpleNamespace:
    """Return what a connector reads of ``TorchLlmArgs``."""
    shape = pools[0].shape
    return SimpleNamespace(
        model=str(model),
        dtype=shape.dtype,
        tensor_parallel_size=len(pools),
        pipeline_parallel_size=1,
        context_parallel_size=1,
        enable_attention_dp=False,
        max_beam_width=1,
        kv_cache_config=SimpleNamespace(
            tokens_per_block=shape.block_size_tokens,
            dtype="auto",
            max_attention_window=None,
            enable_block_reuse=True,
        ),
    )
