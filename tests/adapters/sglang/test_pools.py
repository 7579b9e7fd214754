"""Pages of a pool in host memory, against a loop that copies element by element."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from disagg_plugins.errors import HandoffAborted, UnsupportedEngineError
from disagg_plugins.handoff.canonical import to_canonical
from disagg_plugins.handoff.layouts import KVLayout
from disagg_plugins.testing.handoffs import WAIT_S
from disagg_sglang.pools import HostPool, PageSink

torch = pytest.importorskip("torch")

LAYERS, PAGES, HEADS, HEAD_DIM, HEAD_START = 2, 8, 4, 3, 4
PAGE_IDS = np.array([5, 0, 7, 2], dtype=np.int64)


class Case:
    """A pool of random KV; ``start`` keeps what it held."""

    def __init__(
        self,
        page_tokens: int = 4,
        dtype: str = "float32",
        extra_slots: int = 0,
        kind: type[Any] = HostPool,
    ) -> None:
        self.size = page_tokens
        self.dtype = getattr(torch, dtype)
        self.layout = KVLayout(
            num_layers=LAYERS,
            num_kv_heads=HEAD_START + HEADS,
            head_start=HEAD_START,
            num_kv_heads_local=HEADS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            block_size_tokens=page_tokens,
            order="cthd",
        )
        self.random = torch.Generator().manual_seed(7)
        slots = PAGES * page_tokens + extra_slots
        self.kv = [[self.values(slots) for _ in range(LAYERS)] for _ in range(2)]
        self.start = [[buffer.clone() for buffer in buffers] for buffers in self.kv]
        self.pool = kind(*self.kv, self.layout)

    def values(self, num_tokens: int, heads: int = HEADS) -> Any:
        return torch.randn(num_tokens, heads, HEAD_DIM, generator=self.random).to(self.dtype)

    def rows(self, layer: int, page_ids: Any) -> Any:
        """Return block rows as a loop over every token reads them."""
        rows = torch.empty(len(page_ids), 2, self.size, HEADS, HEAD_DIM, dtype=self.dtype)
        for i, page in enumerate(page_ids):
            for c in range(2):
                for token in range(self.size):
                    rows[i, c, token] = self.kv[c][layer][int(page) * self.size + token]
        return rows

    def gather(self, layer: int, page_ids: Any) -> Any:
        out = np.zeros((len(page_ids), self.layout.row_bytes), np.uint8)
        self.pool.gather(layer, page_ids, out)
        return out

    def unchanged(self) -> bool:
        pairs = zip(self.kv, self.start, strict=True)
        return all(torch.equal(a, b) for now, then in pairs for a, b in zip(now, then, strict=True))


def raw(tensor: Any) -> bytes:
    data: bytes = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return data


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["host", "device"])
def kind(request: pytest.FixtureRequest) -> type[Any]:
    """The pool of a host, and that of a device: on CPU tensors both must do the same."""
    from disagg_sglang.device_pool import DevicePool

    return {"host": HostPool, "device": DevicePool}[request.param]


@pytest.fixture(params=[1, 4])
def case(request: pytest.FixtureRequest, dtype: str, kind: type[Any]) -> Case:
    return Case(request.param, dtype, kind=kind)


# HostPool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(LAYERS))
def test_gather_reads_pages_in_the_order_they_are_named(case: Case, layer: int) -> None:
    assert case.gather(layer, PAGE_IDS).tobytes() == raw(case.rows(layer, PAGE_IDS))
    assert case.unchanged()


def test_gathered_rows_are_what_the_layout_says(case: Case) -> None:
    num_tokens = len(PAGE_IDS) * case.size
    kv = to_canonical(
        case.gather(0, PAGE_IDS),
        case.layout,
        first_token=0,
        num_tokens=num_tokens,
        first_head=HEAD_START + 1,
        end_head=HEAD_START + 3,
    )
    slots = [int(page) * case.size + token for page in PAGE_IDS for token in range(case.size)]
    expected = torch.stack([case.kv[c][0][slots][:, 1:3] for c in range(2)])
    assert kv.tobytes() == raw(expected)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_scatter_writes_pages_and_nothing_else(case: Case, layer: int) -> None:
    rows = case.values(len(PAGE_IDS) * 2 * case.size)
    rows = rows.reshape(len(PAGE_IDS), 2, case.size, HEADS, HEAD_DIM)
    case.pool.scatter(layer, PAGE_IDS, memoryview(raw(rows)))
    for i, page in enumerate(PAGE_IDS):
        for c in range(2):
            for token in range(case.size):
                case.start[c][layer][int(page) * case.size + token] = rows[i, c, token]
    assert case.unchanged()


def test_what_was_gathered_can_be_scattered_elsewhere(case: Case) -> None:
    there = np.array([1, 3, 4, 6], dtype=np.int64)
    case.pool.scatter(0, there, memoryview(case.gather(0, PAGE_IDS)).cast("B"))
    assert raw(case.rows(0, there)) == raw(case.rows(0, PAGE_IDS))


@pytest.mark.parametrize("heads", [(0, 4), (0, 1), (1, 3), (3, 4)])
@pytest.mark.parametrize("missing_tokens", [0, 1])
def test_scatter_canonical_writes_tokens_and_heads_and_nothing_else(
    case: Case, heads: tuple[int, int], missing_tokens: int
) -> None:
    first, end = heads
    num_tokens = len(PAGE_IDS) * case.size - missing_tokens
    kv = case.values(2 * num_tokens, end - first).reshape(2, num_tokens, end - first, HEAD_DIM)
    pages = PAGE_IDS[: case.layout.num_blocks(num_tokens)]
    case.pool.scatter_canonical(1, pages, first, end, memoryview(raw(kv)))
    for c in range(2):
        for token in range(num_tokens):
            slot = int(pages[token // case.size]) * case.size + token % case.size
            case.start[c][1][slot, first:end] = kv[c, token]
    assert case.unchanged()


def test_no_pages_are_no_work(case: Case) -> None:
    none = PAGE_IDS[:0]
    assert case.gather(0, none).size == 0
    case.pool.scatter(0, none, memoryview(b""))
    case.pool.check_pages(none)
    assert case.unchanged()


def test_slots_behind_the_last_whole_page_are_left_alone(kind: type[Any]) -> None:
    case = Case(page_tokens=4, extra_slots=3, kind=kind)
    assert case.pool.num_pages == PAGES
    assert case.gather(1, PAGE_IDS).tobytes() == raw(case.rows(1, PAGE_IDS))


@pytest.mark.parametrize("page_ids", [[-1], [0, PAGES], [1 << 40]])
def test_pages_outside_of_the_pool_are_refused(page_ids: list[int]) -> None:
    with pytest.raises(HandoffAborted, match=f"outside of the pool's {PAGES}"):
        Case().pool.check_pages(np.array(page_ids, dtype=np.int64))


def test_every_page_of_the_pool_is_taken() -> None:
    Case().pool.check_pages(np.arange(PAGES, dtype=np.int64))


def test_a_pool_on_a_device_is_refused() -> None:
    layout = Case().layout
    buffers = [torch.empty(8, HEADS, HEAD_DIM, device="meta")] * LAYERS
    with pytest.raises(UnsupportedEngineError, match="on meta"):
        HostPool(buffers, buffers, layout)


# PageSink ------------------------------------------------------------------------------------


FIRST_BLOCK = 10


def sink(case: Case) -> PageSink:
    return PageSink(case.pool, PAGE_IDS, FIRST_BLOCK)


def rows_of(case: Case, count: int) -> memoryview:
    return memoryview(raw(case.values(count * 2 * case.size)))


def canonical_of(case: Case, num_tokens: int, heads: int = HEADS) -> memoryview:
    return memoryview(raw(case.values(2 * num_tokens, heads)))


def test_rows_go_to_the_pages_of_their_blocks(case: Case) -> None:
    rows = rows_of(case, 2)
    sink(case).write_native(1, FIRST_BLOCK + 1, rows)
    assert raw(case.rows(1, PAGE_IDS[1:3])) == bytes(rows)
    assert raw(case.kv[0][0]) == raw(case.start[0][0]), "another layer"


def test_canonical_kv_goes_to_the_pages_of_its_tokens_and_this_ranks_heads(case: Case) -> None:
    num_tokens = 2 * case.size
    kv = canonical_of(case, num_tokens, heads=2)
    first_token = (FIRST_BLOCK + 2) * case.size
    sink(case).write_canonical(0, first_token, HEAD_START + 1, HEAD_START + 3, kv)
    written = case.rows(0, PAGE_IDS[2:])[:, :, :, 1:3]
    assert raw(written.transpose(0, 1)) == bytes(kv)


@pytest.mark.parametrize(
    ("first_block", "count"), [(FIRST_BLOCK - 1, 1), (FIRST_BLOCK + 4, 1), (FIRST_BLOCK + 3, 2)]
)
def test_blocks_that_are_not_awaited_are_refused(first_block: int, count: int) -> None:
    case = Case()
    words = r"the peer sent blocks \[.*\) of a request that awaits \[10, 14\)"
    with pytest.raises(HandoffAborted, match=words):
        sink(case).write_native(0, first_block, rows_of(case, count))
    kv, first_token = canonical_of(case, count * case.size), first_block * case.size
    with pytest.raises(HandoffAborted, match=words):
        sink(case).write_canonical(0, first_token, HEAD_START, HEAD_START + HEADS, kv)
    assert case.unchanged()


def test_canonical_kv_that_starts_inside_a_page_is_refused() -> None:
    case = Case()
    with pytest.raises(HandoffAborted, match="inside a page"):
        sink(case).write_canonical(
            0, FIRST_BLOCK * 4 + 1, HEAD_START, HEAD_START + HEADS, canonical_of(case, 2)
        )
    assert case.unchanged()


@pytest.mark.parametrize("heads", [(HEAD_START - 1, HEAD_START), (HEAD_START + 4, HEAD_START + 5)])
def test_heads_of_another_rank_are_refused(heads: tuple[int, int]) -> None:
    case = Case()
    with pytest.raises(HandoffAborted, match="heads"):
        sink(case).write_canonical(0, FIRST_BLOCK * 4, *heads, canonical_of(case, 4, heads=1))
    assert case.unchanged()


def test_a_closed_sink_writes_nothing() -> None:
    case = Case()
    closed = sink(case)
    closed.close()
    closed.close()
    with pytest.raises(HandoffAborted, match="given the request up"):
        closed.write_native(0, FIRST_BLOCK, rows_of(case, 1))
    kv = canonical_of(case, 4)
    with pytest.raises(HandoffAborted, match="given the request up"):
        closed.write_canonical(0, FIRST_BLOCK * 4, HEAD_START, HEAD_START + HEADS, kv)
    with pytest.raises(HandoffAborted, match="given the request up"):
        closed.finish(lambda: pytest.fail("it was written"))
    assert case.unchanged()


def test_a_finished_sink_is_closed() -> None:
    case = Case()
    finished, written = sink(case), []
    finished.finish(lambda: written.append(1))
    assert written == [1]
    with pytest.raises(HandoffAborted):
        finished.write_native(0, FIRST_BLOCK, rows_of(case, 1))


def test_a_sink_whose_last_write_fails_can_still_be_closed() -> None:
    failing = sink(Case())
    with pytest.raises(ZeroDivisionError):
        failing.finish(lambda: 1 / 0)
    failing.close()


def test_closing_waits_for_the_piece_that_is_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case()
    writing, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    scatter = case.pool.scatter

    def slow(*args: Any) -> None:
        writing.set()
        go_on.wait(WAIT_S)
        assert not closed.is_set()
        scatter(*args)

    monkeypatch.setattr(case.pool, "scatter", slow)
    target, rows = sink(case), rows_of(case, 1)
    writer = threading.Thread(target=target.write_native, args=(0, FIRST_BLOCK, rows))
    closer = threading.Thread(target=lambda: (target.close(), closed.set()))
    writer.start()
    assert writing.wait(WAIT_S)
    closer.start()
    assert not closed.wait(0.05)
    go_on.set()
    writer.join(WAIT_S)
    closer.join(WAIT_S)
    assert closed.is_set()
    assert raw(case.rows(0, PAGE_IDS[:1])) == bytes(rows)
