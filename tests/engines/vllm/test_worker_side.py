"""Two worker halves in one process, real transports, caches of unlike layouts, no engine."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from disagg_kv_shm.transport import ShmTransport
from disagg_kv_tcp.transport import TcpTransport
from disagg_plugins.handoff.endpoints import local_host_id, to_json
from disagg_plugins.handoff.interfaces import Endpoint, Identity
from disagg_plugins.handoff.layouts import KVLayout, ModelFingerprint
from disagg_plugins.handoff.publications import PublicationStore
from disagg_plugins.handoff.reader import HandoffReader
from disagg_plugins.handoff.shards import head_range
from disagg_plugins.handoff.staging import StagingArena
from disagg_plugins.handoff.tickets import mint, new_handoff_id, verify
from disagg_plugins.policy import HandoffPolicy
from disagg_vllm.caches import HostCaches
from disagg_vllm.compat import cpu_write_block
from disagg_vllm.host_port import HostPort
from disagg_vllm.packing import Packing, discover_packing
from disagg_vllm.steps import LoadStep, PublishStep, StepPlan
from disagg_vllm.worker_side import WorkerSide

pytestmark = pytest.mark.engine

SECRET = b"0123456789abcdef0123456789abcdef"
LAYERS, HEADS, DIM, BLOCKS = 3, 4, 64, 24
POLICY = HandoffPolicy(staging_bytes=64 << 20, lease_s=5, connect_s=2, read_s=2, load_s=10)
TRANSPORTS = {"shm": ShmTransport(), "tcp": TcpTransport()}
WAIT_S = 10.0
PROMPT = "a" * 32


@dataclass
class Rank:
    """One worker half with caches that can be written and read as plain KV."""

    side: WorkerSide
    layout: KVLayout
    packing: Packing
    caches: list[torch.Tensor]
    store: PublicationStore
    counts: dict[str, float] = field(default_factory=dict)

    def fill(self, block_ids: Sequence[int], kv: torch.Tensor) -> None:
        """Write plain KV ``[layer, 2, token, head, dim]`` into blocks, through the packing."""
        for layer, cache in enumerate(self.caches):
            for i, block in enumerate(block_ids):
                size = self.layout.block_size_tokens
                tokens = torch.zeros((2, size, self.layout.num_kv_heads_local, DIM))
                piece = kv[layer, :, i * size : (i + 1) * size]
                tokens[:, : piece.shape[1]] = piece
                rows = tokens.permute(2, 0, 1, 3).reshape(-1, 2 * size * DIM).numpy()
                packed = torch.from_numpy(self.packing.pack(rows)).to(cache.dtype)
                cache[block] = packed.reshape(cache[block].shape)

    def read(self, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        """Return plain KV ``[layer, 2, token, head, dim]`` out of blocks."""
        size, layers = self.layout.block_size_tokens, []
        for cache in self.caches:
            blocks = []
            for block in block_ids:
                rows = cache[block].float().reshape(-1, 2 * size * DIM).numpy()
                plain = torch.from_numpy(self.packing.unpack(rows))
                blocks.append(plain.reshape(-1, 2, size, DIM).permute(1, 2, 0, 3))
            layers.append(torch.cat(blocks, dim=1)[:, :num_tokens])
        return torch.stack(layers)


class Workers:
    """Makes ranks and closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def make(
        self,
        *,
        isa: str = "vec",
        block_size: int = 32,
        tp: tuple[int, int] = (0, 1),
        transports: Sequence[str] = ("shm", "tcp"),
        model: str = "weights:a",
        policy: HandoffPolicy = POLICY,
        secret: bytes = SECRET,
    ) -> Rank:
        first, end = head_range(*tp, HEADS)
        heads = end - first
        packing = discover_packing(
            cpu_write_block(isa),
            isa=isa,
            num_heads=heads,
            block_size_tokens=block_size,
            head_dim=DIM,
            dtype=torch.bfloat16,
        )
        layout = KVLayout(
            LAYERS, HEADS, first, heads, DIM, "bfloat16", block_size, "hctd", packing.name
        )
        caches = [
            torch.zeros((BLOCKS, heads, block_size, 2 * DIM), dtype=torch.bfloat16)
            for _ in range(LAYERS)
        ]
        port = HostPort(HostCaches(caches, layout.row_bytes), layout, packing)
        fingerprint = ModelFingerprint(model, "bfloat16", LAYERS, HEADS, DIM, "none")
        identity = Identity(f"rank {tp}", fingerprint, layout, *tp)
        counts: dict[str, float] = {}
        sides: list[WorkerSide] = []

        def count(name: str, amount: float) -> None:
            counts[name] = counts.get(name, 0) + amount

        def on_event(event: object) -> None:
            step = event.step  # type: ignore[attr-defined]
            if step in ("consumed", "expired", "failed"):
                count(step, 1)
                sides[0].publication_ended(event.handoff_id)  # type: ignore[attr-defined]

        store = PublicationStore(
            identity=identity,
            arena=StagingArena(policy.staging_bytes),
            policy=policy,
            secret=secret,
            unpack=port.unpack,
            on_event=on_event,
        )
        offered = {n: TRANSPORTS[n] for n in transports}
        listeners = {
            n: t.listen(store, identity, secret=secret, policy=policy) for n, t in offered.items()
        }
        reader = HandoffReader(identity=identity, transports=offered, policy=policy, secret=secret)
        side = WorkerSide(
            layer_names=[f"layers.{i}" for i in range(LAYERS)],
            port=port,
            layout=layout,
            block_ratio=1,
            store=store,
            listeners=list(listeners.values()),
            endpoint=Endpoint(
                *tp, local_host_id(), {n: listener.address for n, listener in listeners.items()}
            ),
            reader=reader,
            verify=lambda text: verify(secret, text, time.time()),
            count=count,
        )
        sides.append(side)
        self._stack.callback(side.close)
        return Rank(side, layout, packing, caches, store, counts)


@pytest.fixture
def workers() -> Iterator[Workers]:
    with ExitStack() as stack:
        yield Workers(stack)


def some_kv(num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    kv = torch.randn(LAYERS, 2, num_tokens, HEADS, DIM, generator=generator)
    return kv.to(torch.bfloat16).float()


def ticket() -> tuple[str, str]:
    handoff_id = new_handoff_id()
    text = mint(
        SECRET, handoff_id=handoff_id, prefill="p", decode="d", now_s=time.time(), valid_s=60
    )
    return handoff_id, text


def publish(rank: Rank, handoff: tuple[str, str], kv: torch.Tensor, chunk_blocks: int) -> None:
    """Run the prefill's steps: ``chunk_blocks`` blocks in each forward pass."""
    num_tokens = kv.shape[2]
    blocks = list(range(rank.layout.num_blocks(num_tokens), 0, -1))
    heads = slice(rank.layout.head_start, rank.layout.head_start + rank.layout.num_kv_heads_local)
    rank.fill(blocks, kv[:, :, :, heads])
    for first in range(0, len(blocks), chunk_blocks):
        ids = tuple(blocks[first : first + chunk_blocks])
        last = first + chunk_blocks >= len(blocks)
        step = PublishStep(*handoff, num_tokens, PROMPT, first, ids, last)
        rank.side.start_step(StepPlan(publish=[step]))
        for layer in range(LAYERS):
            rank.side.publish_layer(f"layers.{layer}")
        rank.side.end_step()


def load(
    rank: Rank,
    handoff: tuple[str, str],
    sources: Sequence[Rank],
    tokens: tuple[int, int],
    prompt: str = "a" * 32,
) -> tuple[bool, list[int]]:
    """Run the decode's load; return whether it succeeded, and the blocks."""
    blocks = list(range(2, 2 + rank.layout.num_blocks(tokens[1])))
    endpoints = to_json([s.side.endpoint for s in sources])
    step = LoadStep("r", *handoff, tuple(endpoints), prompt, *tokens, tuple(blocks))
    rank.side.start_loads(StepPlan(load=[step]))
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        received, failed = rank.side.take_received()
        if received:
            return not failed, blocks
        time.sleep(0.005)
    raise AssertionError(f"the load did not end within {WAIT_S} s")


def settled(rank: Rank) -> bool:
    """Return whether the publisher's staging is empty, after at most ``WAIT_S``."""
    deadline_s = time.monotonic() + WAIT_S
    while rank.store.arena.used_bytes and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return rank.store.arena.used_bytes == 0


@pytest.mark.parametrize("transports", [["shm"], ["tcp"]])
@pytest.mark.parametrize("chunk_blocks", [1, 100])
@pytest.mark.parametrize("num_tokens", [32, 75])
def test_equal_layouts_move_whole_blocks(
    workers: Workers, transports: list[str], chunk_blocks: int, num_tokens: int
) -> None:
    p, d = workers.make(transports=transports), workers.make(transports=transports)
    kv, handoff = some_kv(num_tokens), ticket()
    publish(p, handoff, kv, chunk_blocks)
    ok, blocks = load(d, handoff, [p], (0, num_tokens))
    assert ok
    assert torch.equal(d.read(blocks, num_tokens), kv)
    (result,) = d.side.take_result().loads  # type: ignore[union-attr]
    assert (result.form, result.transport) == ("native", transports[0])
    assert settled(p)
    assert p.counts["consumed"] == 1


@pytest.mark.parametrize("transports", [["shm"], ["tcp"]])
@pytest.mark.parametrize(
    ("p_kind", "d_kind"),
    [(("vec", 32), ("amx", 32)), (("amx", 64), ("vec", 32)), (("vec", 32), ("vec", 96))],
)
def test_unlike_layouts_move_through_the_canonical_form(
    workers: Workers,
    transports: list[str],
    p_kind: tuple[str, int],
    d_kind: tuple[str, int],
) -> None:
    p = workers.make(isa=p_kind[0], block_size=p_kind[1], transports=transports)
    d = workers.make(isa=d_kind[0], block_size=d_kind[1], transports=transports)
    kv, handoff = some_kv(205), ticket()
    publish(p, handoff, kv, 3)
    ok, blocks = load(d, handoff, [p], (0, 205))
    assert ok
    assert torch.equal(d.read(blocks, 205), kv)
    (result,) = d.side.take_result().loads  # type: ignore[union-attr]
    assert result.form == "canonical"


def test_only_blocks_that_the_prefix_cache_lacks_are_written(workers: Workers) -> None:
    p, d = workers.make(), workers.make()
    kv, handoff = some_kv(100), ticket()
    publish(p, handoff, kv, 100)
    ok, blocks = load(d, handoff, [p], (64, 100))
    assert ok
    moved = d.read(blocks, 100)
    assert torch.equal(moved[:, :, 64:], kv[:, :, 64:])
    assert not moved[:, :, :64].any()


@pytest.mark.parametrize(("p_size", "d_size"), [(1, 2), (2, 1), (2, 2), (4, 2), (1, 4)])
def test_tensor_parallel_sizes_may_differ(workers: Workers, p_size: int, d_size: int) -> None:
    prefill = [workers.make(tp=(r, p_size)) for r in range(p_size)]
    decode = [workers.make(tp=(r, d_size)) for r in range(d_size)]
    kv, handoff = some_kv(70), ticket()
    for rank in prefill:
        publish(rank, handoff, kv, 2)
    for rank in decode:
        ok, blocks = load(rank, handoff, prefill, (0, 70))
        assert ok
        start = rank.layout.head_start
        heads = kv[:, :, :, start : start + rank.layout.num_kv_heads_local]
        assert torch.equal(rank.read(blocks, 70), heads)
    assert all(settled(rank) for rank in prefill)


def test_another_model_is_refused_before_a_byte_moves(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    p, d = workers.make(model="weights:a"), workers.make(model="weights:b")
    handoff = ticket()
    publish(p, handoff, some_kv(40), 9)
    ok, blocks = load(d, handoff, [p], (0, 40))
    assert not ok
    assert not d.read(blocks, 40).any()
    problem = d.side.take_result().loads[0].problem  # type: ignore[union-attr]
    assert "weights:a" in problem
    assert "weights:b" in problem


@pytest.mark.parametrize(("tokens", "prompt"), [(40, "b" * 32), (39, PROMPT)])
def test_kv_of_another_prompt_or_length_is_refused_by_the_publisher_s_own_word(
    workers: Workers, tokens: int, prompt: str
) -> None:
    p, d = workers.make(), workers.make()
    handoff = ticket()
    publish(p, handoff, some_kv(40), 9)
    ok, blocks = load(d, handoff, [p], (0, tokens), prompt)
    assert not ok
    assert not d.read(blocks, tokens).any()


def test_a_step_with_too_few_blocks_fails_its_handoff_and_not_the_engine(
    workers: Workers,
) -> None:
    p = workers.make()
    handoff = ticket()
    p.side.start_step(StepPlan(publish=[PublishStep(*handoff, 100, PROMPT, 0, (1,), True)]))
    p.side.publish_layer("layers.0")
    p.side.end_step()
    assert settled(p)
    assert p.counts["failed"] == 1


def test_a_peer_that_hangs_does_not_hold_up_loads_from_others(workers: Workers) -> None:
    policy = POLICY.model_copy(update={"connect_s": 3.0})
    p, d = workers.make(policy=policy), workers.make(policy=policy)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        hanging = to_json([Endpoint(0, 1, local_host_id(), {"tcp": address})])
        steps = [
            LoadStep(f"h{i}", *ticket(), tuple(hanging), PROMPT, 0, 40, (1, 2)) for i in range(16)
        ]
        d.side.start_loads(StepPlan(load=steps))
        handoff = ticket()
        publish(p, handoff, some_kv(40), 9)
        started_s = time.monotonic()
        ok, _ = load(d, handoff, [p], (0, 40))
        assert ok
        assert time.monotonic() - started_s < policy.connect_s


def test_another_secret_gets_nothing(workers: Workers) -> None:
    p, d = workers.make(), workers.make(secret=b"x" * 32)
    handoff = ticket()
    publish(p, handoff, some_kv(40), 9)
    ok, blocks = load(d, handoff, [p], (0, 40))
    assert not ok
    assert not d.read(blocks, 40).any()


def test_a_publisher_that_is_gone_fails_the_load_in_bounded_time(workers: Workers) -> None:
    p, d = workers.make(), workers.make()
    handoff = ticket()
    publish(p, handoff, some_kv(40), 9)
    p.side.close()
    ok, _ = load(d, handoff, [p], (0, 40))
    assert not ok


def test_an_aborted_prefill_frees_its_staging_and_fails_its_reader(workers: Workers) -> None:
    p, d = workers.make(), workers.make()
    kv, handoff = some_kv(100), ticket()
    step = PublishStep(*handoff, 100, PROMPT, 0, (1, 2), False)
    p.fill([1, 2], kv)
    p.side.start_step(StepPlan(publish=[step]))
    for layer in range(LAYERS):
        p.side.publish_layer(f"layers.{layer}")
    p.side.end_step()
    assert p.store.arena.used_bytes > 0
    p.side.start_step(StepPlan(abort=[(handoff[0], "the client went away")]))
    assert settled(p)
    ok, _ = load(d, handoff, [p], (0, 100))
    assert not ok


def test_a_handoff_that_nobody_claims_is_freed_when_its_lease_ends(workers: Workers) -> None:
    p = workers.make(policy=POLICY.model_copy(update={"lease_s": 0.3}))
    publish(p, ticket(), some_kv(40), 9)
    assert p.store.arena.used_bytes > 0
    assert settled(p)
    assert p.counts["expired"] == 1
    result = p.side.take_result()
    assert result is not None
    assert sum(result.ended.values()) == 1


def test_staging_over_its_bound_is_refused_and_said(workers: Workers) -> None:
    p = workers.make(policy=POLICY.model_copy(update={"staging_bytes": 1 << 20}))
    handoff = ticket()
    publish(p, handoff, some_kv(700), 99)
    assert p.counts["publish_failed"] == 1
    assert p.side.take_result().ended == {handoff[0]: 1}  # type: ignore[union-attr]


def test_a_released_handoff_frees_its_publisher_at_once(workers: Workers) -> None:
    from disagg_vllm.steps import ReleaseStep

    p, d = workers.make(), workers.make()
    handoff = ticket()
    publish(p, handoff, some_kv(40), 9)
    endpoints = tuple(to_json([p.side.endpoint]))
    d.side.start_loads(StepPlan(release=[ReleaseStep(*handoff, endpoints)]))
    assert settled(p)
    assert p.counts["consumed"] == 1


def test_staging_is_used_again_over_many_handoffs(workers: Workers) -> None:
    p, d = workers.make(), workers.make()
    kv = some_kv(75)
    for _ in range(60):
        handoff = ticket()
        publish(p, handoff, kv, 2)
        ok, blocks = load(d, handoff, [p], (0, 75))
        assert ok
    np.testing.assert_array_equal(d.read(blocks, 75).numpy(), kv.numpy())
    assert settled(p)
    assert p.store.arena.peak_bytes <= 2 * p.layout.staged_bytes(75)
