"""The rules of TensorRT-LLM's connector interface, with every KV byte checked on every forward."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from disagg_plugins.errors import LocalProtocolError
from disagg_reference.request import Output, Request
from disagg_reference.trtllm.interface import ERAS
from disagg_trtllm import compat
from tests.adapters.trtllm.conftest import Build, Pair, prompt

if TYPE_CHECKING:
    from disagg_trtllm.plan import LoadStep

WAYS = list(itertools.product(ERAS, ("sync", "async"), ((1, 1), (2, 2), (1, 2), (2, 1))))
IDS = [f"{era}-{loads}-{a}to{b}" for era, loads, (a, b) in WAYS]


@pytest.mark.parametrize(("era", "loads", "ranks"), WAYS, ids=IDS)
def test_decode_goes_on_from_prefill(pair: Build, era, loads, ranks) -> None:
    two = pair(era=era, loads=loads, ranks=ranks)
    for length in (2, 8, 9, 40, 100):
        asked = two.hand_over(prompt(length))
        assert len(asked.tokens) == 8
        assert asked.request.matched_tokens == length - 1
    two.prefill.wait_empty()
    two.decode.wait_empty()
    assert [r["kind"] for r in two.decode.reports] == ["loaded"] * 5
    assert {r["tokens_recomputed"] for r in two.decode.reports} == {1}


@pytest.mark.parametrize("loads", ["sync", "async"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2)])
def test_many_at_once_in_chunks_and_beside_others(pair: Build, loads, ranks) -> None:
    two = pair(
        loads=loads, ranks=ranks, prefill={"budget_tokens": 16}, decode={"budget_tokens": 16}
    )
    given = [prompt(length) for length in (50, 33, 70, 20)]
    numbers = [two.number() for _ in given]
    tickets = [two.ticket() for _ in given]
    for each, number, ticket in zip(given, numbers, tickets, strict=True):
        two.publish(each, number, ticket)
        assert two.fetch(each, number, ticket) == (200, {})
    asked = []
    for each, number in zip(given, numbers, strict=True):
        asked += [two.decode.ask(each, 12, number), two.decode.ask(prompt(25), 6)]
    assert [len(each.tokens) for each in asked] == [12, 6] * 4
    assert [a.request.matched_tokens for a in asked[::2]] == [len(g) - 1 for g in given]
    two.prefill.wait_empty()
    two.decode.wait_empty()


@pytest.mark.parametrize("loads", ["sync", "async"])
def test_a_beginning_that_decode_has_is_left_alone(pair: Build, loads) -> None:
    two = pair(loads=loads)
    given = prompt(60)
    assert two.decode.ask(given[:30], 1).tokens
    asked = two.hand_over(given)
    assert len(asked.tokens) == 8
    assert (asked.request.local_tokens, asked.request.matched_tokens) == (24, 35)
    two.decode.wait_empty()


def test_a_prompt_that_decode_has_already_is_not_loaded(pair: Build) -> None:
    two = pair()
    given = prompt(33)
    assert two.decode.ask((*given, 1), 1).tokens
    asked = two.hand_over(given)
    assert len(asked.tokens) == 8
    assert (asked.request.local_tokens, asked.request.matched_tokens) == (32, 0)
    (report,) = two.decode.reports
    assert (report["kind"], report["num_tokens"]) == ("loaded", 0)
    two.decode.wait_empty()


def test_a_prompt_that_prefill_has_already_is_published_all_the_same(pair: Build) -> None:
    two = pair()
    given = prompt(70)
    assert two.prefill.ask(given, 3).tokens
    asked = two.hand_over(given)
    assert len(asked.tokens) == 8
    assert asked.request.matched_tokens == 69


@pytest.mark.parametrize("loads", ["sync", "async"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 2)])
def test_the_overlap_scheduler_changes_nothing(pair: Build, loads, ranks) -> None:
    two = pair(loads=loads, ranks=ranks, overlap=True)
    for length in (16, 41):
        asked = two.hand_over(prompt(length), 20)
        assert len(asked.tokens) == 20
        assert asked.request.matched_tokens == length - 1
    two.prefill.wait_empty()
    two.decode.wait_empty()


def test_a_block_out_of_a_window_is_nobodys_block(pair: Build) -> None:
    """-1 is a valid subscript, of a block that is another request's."""
    two = pair()
    told = two.prefill.host._data

    def windowed(each):
        data = told(each)
        data.new_block_ids[:1] = [-1] * len(data.new_block_ids[:1])
        return data

    two.prefill.host._data = windowed
    given, number, ticket = prompt(30), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.fetch(given, number, ticket)[0] == 409
    unmatched(two, given, number)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2)])
def test_iterations_without_an_output_change_nothing(pair: Build, ranks) -> None:
    two = pair(era="1.2", loads="async", ranks=ranks, none_outputs=True)
    asked = two.hand_over(prompt(40))
    assert len(asked.tokens) == 8
    assert asked.request.matched_tokens == 39
    two.decode.wait_empty()


def test_blocks_and_ranks_need_not_be_alike(pair: Build) -> None:
    two = pair(prefill={"block_size_tokens": 16}, decode={"block_size_tokens": 4}, ranks=(2, 1))
    asked = two.hand_over(prompt(50))
    assert len(asked.tokens) == 8
    assert asked.request.matched_tokens == 49
    assert two.decode.reports[0]["form"] == "canonical"


def unmatched(two: Pair, given: tuple[int, ...], number: int) -> None:
    """The prompt is computed, rightly."""
    asked = two.decode.ask(given, 8, number)
    assert len(asked.tokens) == 8
    assert asked.request.matched_tokens == 0
    two.decode.wait_empty()


def test_kv_of_another_prompt_is_never_used(pair: Build) -> None:
    two = pair()
    number, ticket = two.number(), two.ticket()
    two.publish(prompt(40), number, ticket)
    assert two.fetch(prompt(40), number, ticket) == (200, {})
    unmatched(two, prompt(40), number)
    assert [r["kind"] for r in two.decode.reports] == ["failed"]
    assert "another prompt" in two.decode.reports[0]["problem"]


def test_a_request_that_nobody_announced_is_computed(pair: Build) -> None:
    two = pair()
    unmatched(two, prompt(40), two.number())
    assert two.decode.reports == []


def test_a_prompt_whose_announcement_was_lost_is_not_published(pair: Build) -> None:
    two = pair()
    assert two.prefill.ask(prompt(40), 1, two.number()).tokens
    two.prefill.wait_empty()


def test_a_publisher_that_is_gone_leaves_the_prompt_to_decode(pair: Build) -> None:
    two = pair(handoff={"load_s": 2.0, "connect_s": 1.0})
    given, number, ticket = prompt(40), two.number(), two.ticket()
    two.publish(given, number, ticket)
    endpoints = two.prefill.endpoints
    two.prefill.engine.close()
    status, said = two.fetch(given, number, ticket, endpoints=endpoints)
    assert status == 409
    assert said["problem"]
    unmatched(two, given, number)
    assert [r["kind"] for r in two.decode.reports] == ["failed"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"ticket": "false"}, 403),
        ({"ticket": ""}, 400),
        ({"version": 2}, 400),
        ({"request_id": 5}, 400),
        ({"request_id": 1 << 63}, 400),
        ({"request_id": 1e12}, 400),
        ({"num_tokens": 0}, 400),
        ({"endpoints": []}, 400),
        ({"endpoints": [{}] * 300}, 400),
        ({"step": "both"}, 400),
        ({"prompt": None}, 400),
    ],
)
def test_a_false_announcement_is_refused_and_allocates_nothing(pair: Build, change, status) -> None:
    two = pair()
    given, number = prompt(20), two.number()
    said = two.announcement(given, number, two.ticket())
    assert two.decode.announce({**said, **change})[0] == status
    assert two.decode.used_bytes == 0
    unmatched(two, given, number)


def test_a_ticket_for_the_other_side_is_refused(pair: Build) -> None:
    two = pair()
    said = {"version": 1, "step": "prefill", "request_id": two.number(), "ticket": two.ticket()}
    assert two.decode.announce(said)[0] == 403


def test_one_number_is_announced_once(pair: Build) -> None:
    two = pair()
    given, number, ticket = prompt(20), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    assert two.fetch(given, number, ticket)[0] == 409
    assert two.decode.ask(given, 4, number).tokens


def test_full_staging_leaves_the_prompt_to_decode(pair: Build) -> None:
    two = pair(handoff={"staging_bytes": 1 << 20}, decode={"num_blocks": 200})
    given, number, ticket = prompt(600), two.number(), two.ticket()
    status, said = two.fetch(given * 2, number, ticket)
    assert (status, "staging" in said["problem"]) == (409, True)
    unmatched(two, given, number)


def test_what_nobody_comes_for_is_freed_by_its_lease(pair: Build) -> None:
    two = pair(handoff={"lease_s": 0.2})
    given, number, ticket = prompt(20), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    end_s = time.monotonic() + 10.0
    while two.decode.scheduler._fetcher.look(number) is not None:
        assert time.monotonic() < end_s
        time.sleep(0.005)
    unmatched(two, given, number)
    two.prefill.wait_empty()


@pytest.mark.parametrize("loads", ["sync", "async"])
def test_requests_that_are_given_up_leave_nothing(pair: Build, loads) -> None:
    two = pair(loads=loads, handoff={"lease_s": 0.5})
    for _ in range(4):
        asked = two.hand_over(prompt(60), 400)
        two.decode.engine.cancel(asked.request.request_id)
        assert len(asked.tokens) < 400
    two.prefill.wait_empty()
    two.decode.wait_empty()


@pytest.mark.parametrize("loads", ["sync", "async"])
@pytest.mark.parametrize("era", ERAS)
def test_a_request_given_up_at_its_first_token_leaves_nothing(pair: Build, era, loads) -> None:
    """The 1.2-era tells the connector nothing of it: its lease ends what is kept."""
    two = pair(era=era, loads=loads, handoff={"lease_s": 0.5})
    given, number, ticket = prompt(60), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    outputs: list[Output] = []

    def tell(output: Output) -> None:
        outputs.append(output)
        two.decode.engine.cancel(number)

    two.decode.engine.submit(Request(number, given, 400, tell=tell))
    end_s = time.monotonic() + 10.0
    while not (outputs and outputs[-1].finish_reason == "abort"):
        assert time.monotonic() < end_s
        time.sleep(0.005)
    two.prefill.wait_empty()
    end_s = time.monotonic() + 10.0
    while two.decode.used_bytes:
        assert time.monotonic() < end_s
        time.sleep(0.005)
    assert two.decode.ask(prompt(20), 2).tokens  # what is planned next forgets them
    two.decode.wait_empty()


@pytest.mark.parametrize("loads", ["sync", "async"])
def test_a_plan_is_acted_on_once(pair: Build, loads) -> None:
    """An iteration that binds nothing leaves the last one's metadata with the workers."""
    two = pair(loads=loads, ranks=(2, 2), handoff={"lease_s": 30.0})
    asked = two.hand_over(prompt(40), 1)
    assert len(asked.tokens) == 1
    for side in (two.prefill, two.decode):
        published = side.used_bytes
        for worker, pool in zip(side.workers, side.engine.pools, strict=True):
            pool.tensor.fill_(1.0)
            worker.start_load_kv(None)
            worker.wait_for_save(None)
            assert worker.get_finished([], []) == ([], [])
            assert bool((pool.tensor == 1.0).all())
        assert side.used_bytes <= published


def test_a_number_that_comes_again_hands_over_nothing_false(pair: Build) -> None:
    """The engine never forgets a number: the second prompt is told by what it has more."""
    two = pair(ranks=(2, 1), handoff={"lease_s": 5.0})
    number = two.number()
    for length in (20, 12, 20, 44):
        given, ticket = prompt(length), two.ticket()
        two.publish(given, number, ticket)
        two.fetch(given, number, ticket)
        assert len(two.decode.ask(given, 9, number).tokens) == 9


def test_a_prompt_whose_lease_ends_as_it_is_matched_is_computed(pair: Build) -> None:
    two = pair()
    given, number, ticket = prompt(30), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    fetcher = two.decode.scheduler._fetcher
    found = fetcher.look(number)
    fetcher.drop(number)
    fetcher.look = lambda _: found
    unmatched(two, given, number)


def test_an_idle_engine_publishes_with_the_step_that_reads_the_prompt(pair: Build) -> None:
    two = pair()
    given, number, ticket = prompt(40), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.prefill.engine.stats()["steps"] == 1
    assert two.fetch(given, number, ticket) == (200, {})


def test_answers_longer_than_a_block_are_right(pair: Build) -> None:
    two = pair(ranks=(2, 2))
    asked = two.hand_over(prompt(30), 60)
    assert len(asked.tokens) == 60
    assert asked.tokens == two.prefill.ask(asked.request.prompt, 60).tokens


@pytest.mark.parametrize("loads", ["sync", "async"])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_model_goes_on_as_if_it_had_read_the_prompt(pair: Build, loads, ranks) -> None:
    two = pair(loads=loads, ranks=ranks, weights=True)
    for length in (9, 40, 77):
        asked = two.hand_over(prompt(length), 20)
        assert asked.tokens == two.prefill.ask(asked.request.prompt, 20).tokens
        assert asked.request.matched_tokens == length - 1
    two.prefill.wait_empty()
    two.decode.wait_empty()


def test_an_output_that_cannot_be_read_loses_no_load(pair: Build, monkeypatch) -> None:
    two = pair()
    given, number, ticket = prompt(77), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    read, failures = compat.entries, [TypeError("new_block_ids is None")]

    def once(output):
        if failures:
            raise failures.pop()
        return read(output)

    monkeypatch.setattr(compat, "entries", once)
    asked = two.decode.ask(given, 8, number)
    assert len(asked.tokens) == 8
    assert (failures, asked.request.matched_tokens) == ([], 76)


def planned(two: Pair, blocks: list) -> LoadStep:
    """Return the load that is planned for a prompt of 20 tokens and these blocks."""
    given, number, ticket = prompt(20), two.number(), two.ticket()
    two.publish(given, number, ticket)
    assert two.fetch(given, number, ticket) == (200, {})
    side = two.decode.scheduler.side
    assert side.match(number, given, 0)[0] == 19
    side.allocated(number, blocks)
    (step,) = side.pending().load
    return step


@pytest.mark.parametrize("blocks", [[None, 1, 2], [], [0, -1, 2], [0, 1]])
def test_a_promise_without_blocks_is_a_loud_failure_and_never_silence(pair: Build, blocks) -> None:
    two = pair()
    step = planned(two, blocks)
    with pytest.raises(LocalProtocolError, match="were promised"):
        two.decode.workers[0].side._copy(step, None)


def test_what_is_copied_after_its_lease_is_not_used(pair: Build) -> None:
    two = pair()
    step = planned(two, [0, 1, 2])
    assert step.until_s > time.monotonic()
    two.decode.workers[0].side._copy(step, None)
    with pytest.raises(LocalProtocolError, match="after its lease"):
        two.decode.workers[0].side._copy(replace(step, until_s=0.0), None)
