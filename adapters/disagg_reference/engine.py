"""The engine: a thread that plans, computes, samples and tells, one iteration after the other.

Requests come from any thread and are answered on the engine's. Nothing here waits without a bound;
an iteration that raises ends the engine, and every request hears of it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from disagg_plugins.errors import DisaggError, NoCapacityError
from disagg_reference.blocks import Blocks
from disagg_reference.config import ModelConfig, read_config
from disagg_reference.hosting import Batch, ConnectorHost
from disagg_reference.model import Hook, Llama, Piece
from disagg_reference.pool import KVPool, PoolShape
from disagg_reference.request import Output, Request, State
from disagg_reference.sampling import Sampler
from disagg_reference.scheduler import Scheduler
from disagg_reference.weights import load_weights

log = logging.getLogger(__name__)

IDLE_S = 0.25
"""Between two looks for work while there is none: a new request wakes the engine at once."""

POLL_S = 0.002
"""Between two polls while KV moves and nothing is computed."""

CLOSE_S = 10.0
"""Longest wait for an iteration that has begun, when the engine is closed."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine runs.

    Attributes:
        model: Folder in Hugging Face's form.
        dtype: Of weights and KV: ``float32``, ``bfloat16`` or ``float16``.
        device: As torch names it.
        tp_size: Ranks; all in this process.
        block_size_tokens: Tokens of a KV block.
        num_blocks: KV blocks.
        budget_tokens: Tokens of one iteration.
        most_running: Requests of one batch.
        most_waiting: Requests that may wait; more are refused.
    """

    model: Path
    dtype: str = "float32"
    device: str = "cpu"
    tp_size: int = 1
    block_size_tokens: int = 32
    num_blocks: int = 512
    budget_tokens: int = 512
    most_running: int = 64
    most_waiting: int = 1024


class Model(Protocol):
    """What computes; see ``model.Llama``."""

    def forward(self, pieces: Sequence[Piece], before: Hook, after: Hook) -> torch.Tensor:
        """Return the logits of the pieces that are sampled."""
        ...


MakeModel = Callable[[ModelConfig, Sequence[KVPool]], Model]
MakeHost = Callable[[Sequence[KVPool], ModelConfig], ConnectorHost]
BeforeStep = Callable[[int], None]


class EngineDead(DisaggError):
    """An iteration failed, and the engine takes no request any more."""


class NoHost:
    """Moves no KV."""

    def match(self, request: Request, computed_tokens: int) -> tuple[int, bool]:
        """See ``ConnectorHost``."""
        return 0, False

    def allocated(self, request: Request, block_ids: Sequence[int]) -> None:
        """See ``ConnectorHost``."""

    def begin(self, batch: Batch) -> None:
        """See ``ConnectorHost``."""

    def before_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""

    def after_layer(self, layer: int) -> None:
        """See ``ConnectorHost``."""

    def end(self) -> None:
        """See ``ConnectorHost``."""

    def cancel(self, request: Request) -> None:
        """See ``ConnectorHost``."""

    def finished(self, request: Request, block_ids: Sequence[int]) -> bool:
        """See ``ConnectorHost``."""
        return False

    def poll(self) -> tuple[Sequence[int], Sequence[int]]:
        """See ``ConnectorHost``."""
        return (), ()

    def close(self) -> None:
        """See ``ConnectorHost``."""


class Engine:
    """Loads a model at once; ``start`` begins to serve. Close it.

    Args:
        options: How it runs.
        make_host: Makes who moves KV, of the ranks' pools.
        before_step: Called before each iteration with its number, from 1: for faults.
        make_model: Makes what computes, of the configuration and the ranks' pools; None: the
            model of the folder.

    Attributes:
        config: Of the model.
        pools: KV of each rank.

    Raises:
        ConfigError: The model cannot be served like that.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        make_host: MakeHost | None = None,
        before_step: BeforeStep | None = None,
        make_model: MakeModel | None = None,
    ) -> None:
        self.options = options
        self.config = read_config(options.model)
        self.config.check_tp(options.tp_size)
        device = torch.device(options.device)
        self.pools = tuple(KVPool(shape, device) for shape in pool_shapes(options, self.config))
        self._model: Model
        if make_model is not None:
            self._model = make_model(self.config, self.pools)
        else:
            weights = load_weights(
                options.model,
                self.config,
                tp_size=options.tp_size,
                dtype=options.dtype,
                device=device,
            )
            self._model = Llama(self.config, weights, self.pools)
        blocks = Blocks(options.num_blocks, options.block_size_tokens)
        self._scheduler = Scheduler(
            blocks, budget_tokens=options.budget_tokens, most_running=options.most_running
        )
        self._before_step = before_step
        self._samplers: dict[int, Sampler] = {}
        self._held: dict[int, Request] = {}  # over, their blocks still being saved
        self._abandoned: set[int] = set()  # cancelled while their KV is being loaded
        self._steps = 0
        self._stuck = False  # requests wait for blocks that others have
        self._wake = threading.Condition()
        self._arrived: deque[Request] = deque()
        self._cancelled: deque[int] = deque()
        self._known: set[int] = set()  # under the condition, as are the three above
        self._closing = False
        self._problem = ""
        self._host: ConnectorHost = NoHost()
        if make_host is not None:
            self._host = make_host(self.pools, self.config)
        self._thread = threading.Thread(target=self._run, name="disagg-reference", daemon=True)

    # Any thread

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Take a request; its ``tell`` is called until an output has a ``finish_reason``.

        Raises:
            ValueError: It can never be served, or its id is in use.
            NoCapacityError: Too many wait.
            EngineDead: See there.
        """
        self._check(request)
        with self._wake:
            if self._problem or self._closing:
                raise EngineDead(self._problem or "the engine is closed")
            if request.request_id in self._known:
                raise ValueError(f"request {request.request_id} is there already")
            if len(self._known) >= self.options.most_waiting + self.options.most_running:
                raise NoCapacityError(
                    f"{len(self._known)} requests wait or run here", retry_after_s=1.0
                )
            self._known.add(request.request_id)
            self._arrived.append(request)
            self._wake.notify()

    def cancel(self, request_id: int) -> None:
        """Give a request up; it is told ``abort``, unless it is over already."""
        with self._wake:
            if request_id in self._known:
                self._cancelled.append(request_id)
                self._wake.notify()

    @property
    def problem(self) -> str:
        """Why the engine is dead; empty while it lives."""
        with self._wake:
            return self._problem

    def stats(self) -> dict[str, float]:
        """Return what ``/metrics`` tells; from another thread it may be an iteration old."""
        blocks = self._scheduler.blocks
        return {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting) + len(self._arrived),
            "loading": len(self._scheduler.loading),
            "held": len(self._held),
            "blocks_used": blocks.used,
            "blocks": blocks.count,
            "steps": self._steps,
        }

    def close(self) -> None:
        """End the engine; requests that are not over are told ``abort``."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is None:  # it never started
            self._host.close()
            return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("disagg: an iteration of the engine is not over after %g s", CLOSE_S)

    def _check(self, request: Request) -> None:
        if not request.prompt or request.max_tokens < 1:
            raise ValueError("a request has at least one prompt token, and asks for at least one")
        if max(request.prompt) >= self.config.vocab_size or min(request.prompt) < 0:
            raise ValueError(f"a prompt token is outside the {self.config.vocab_size} of the model")
        most = len(request.prompt) + request.max_tokens
        if most > self.config.max_tokens:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and an answer of {request.max_tokens} are "
                f"more than the model's {self.config.max_tokens} tokens"
            )
        if self._scheduler.blocks.needed(request.most_tokens) > self.options.num_blocks:
            raise ValueError(
                f"{most} tokens need more KV than the {self.options.num_blocks} blocks of "
                f"{self.options.block_size_tokens} tokens here"
            )

    # The engine's thread

    def _run(self) -> None:
        try:
            while self._receive():
                self._iterate()
        except BaseException as exc:  # whatever it is, nobody may wait for a dead engine
            log.exception("disagg: the engine failed at iteration %d", self._steps)
            with self._wake:
                self._problem = f"the engine failed: {type(exc).__name__}: {exc}"
        finally:
            try:
                self._end_all()
            finally:
                self._host.close()

    def _receive(self) -> bool:
        """Take what came in, waiting for it where there is nothing to do; False: to be closed."""
        with self._wake:
            moving = bool(self._held or self._scheduler.loading)
            ready = self._busy() and not self._stuck
            if not (self._arrived or self._cancelled or self._closing or ready):
                self._wake.wait(POLL_S if moving else IDLE_S)
            arrived, cancelled = list(self._arrived), list(self._cancelled)
            self._arrived.clear()
            self._cancelled.clear()
            if self._closing:
                self._scheduler.waiting.extend(arrived)  # to be told with the others
                return False
        self._scheduler.waiting.extend(arrived)
        for request_id in cancelled:
            self._cancel(request_id)
        return True

    def _busy(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _iterate(self) -> None:
        batch = self._scheduler.plan(self._host.match, self._host.allocated)
        self._stuck = not (batch.scheduled or batch.parked)
        if not self._stuck:
            self._steps += 1
            if self._before_step is not None:
                self._before_step(self._steps)
            self._host.begin(batch)
        if batch.scheduled:
            logits = self._model.forward(
                [
                    Piece(
                        each.request.tokens(0, each.start + each.count),
                        each.start,
                        each.request.blocks,
                        _is_sampled(each.request, each.start + each.count),
                    )
                    for each in batch.scheduled
                ],
                self._host.before_layer,
                self._host.after_layer,
            )
            self._host.end()
            self._after(batch, logits)
        self._poll()

    def _after(self, batch: Batch, logits: torch.Tensor) -> None:
        row = 0
        for each in batch.scheduled:
            request, end = each.request, each.start + each.count
            # what was brought is remembered with the first tokens that are computed behind it
            first = request.local_tokens if each.first else each.start
            request.computed_tokens = end
            self._scheduler.blocks.computed(request.tokens(0, end), request.blocks, first, end)
            if _is_sampled(request, end):
                self._sample(request, logits[row])
                row += 1

    def _sample(self, request: Request, logits: torch.Tensor) -> None:
        sampler = self._samplers.get(request.request_id)
        if sampler is None:
            sampler = self._samplers[request.request_id] = Sampler(request.sampling)
        if len(request.output) < request.min_tokens and request.eos:
            # a copy: what inference mode made cannot be written to out of it
            ends = torch.tensor(sorted(request.eos), device=logits.device)
            logits = logits.index_fill(0, ends, -torch.inf)
        chosen = sampler.choose(logits)
        request.output.append(chosen.token)
        if chosen.token in request.eos:
            self._over(request, Output(chosen.token, "stop", "", chosen.logprob, chosen.best))
        elif len(request.output) >= request.max_tokens:
            self._over(request, Output(chosen.token, "length", "", chosen.logprob, chosen.best))
        else:
            request.tell(Output(chosen.token, None, "", chosen.logprob, chosen.best))

    def _over(self, request: Request, last: Output) -> None:
        started = request.state is not State.WAITING
        self._scheduler.over(request)
        self._samplers.pop(request.request_id, None)
        if started and self._host.finished(request, request.blocks):
            self._held[request.request_id] = request
        else:
            self._free(request)
        request.tell(last)

    def _free(self, request: Request) -> None:
        self._scheduler.free(request)
        with self._wake:
            self._known.discard(request.request_id)

    def _cancel(self, request_id: int) -> None:
        for request in self._scheduler:
            if request.request_id == request_id:
                break
        else:
            return
        if request.state is State.LOADING:
            self._abandoned.add(request_id)  # its blocks are being written to
            self._host.cancel(request)
        else:
            self._over(request, Output(None, "abort"))

    def _poll(self) -> None:
        saved, loaded = self._host.poll()
        for request_id in loaded:
            request = self._scheduler.loaded(request_id)
            if request_id in self._abandoned:
                self._abandoned.discard(request_id)
                self._over(request, Output(None, "abort"))
        for request_id in saved:
            self._free(self._held.pop(request_id))

    def _end_all(self) -> None:
        with self._wake:
            problem = self._problem
            left = [*self._scheduler, *self._arrived]
            self._arrived.clear()
            self._known.clear()
        last = Output(None, "error", problem) if problem else Output(None, "abort")
        for request in left:
            request.state = State.OVER
            try:
                request.tell(last)
            except Exception:  # the others hear of it all the same
                log.exception("disagg: request %d cannot be told", request.request_id)


def pool_shapes(options: EngineOptions, config: ModelConfig) -> list[PoolShape]:
    """Return what the KV tensor of each rank is."""
    return [
        PoolShape(
            options.num_blocks,
            config.num_layers,
            config.num_kv_heads,
            config.num_kv_heads // options.tp_size,
            config.head_dim,
            options.block_size_tokens,
            options.dtype,
            rank,
            options.tp_size,
        )
        for rank in range(options.tp_size)
    ]


def _is_sampled(request: Request, end: int) -> bool:
    return end >= request.num_tokens
