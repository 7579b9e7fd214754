"""Who is computed next, with how many tokens, and who waits."""

from __future__ import annotations

import pytest

from disagg_reference.blocks import Blocks
from disagg_reference.hosting import Batch
from disagg_reference.request import Request, State
from disagg_reference.scheduler import Scheduler


def nothing(request: Request, computed_tokens: int) -> tuple[int, bool]:
    return 0, False


def told(request: Request, block_ids: list[int]) -> None:
    assert block_ids == request.blocks


def scheduler(blocks: int = 16, budget: int = 16, running: int = 8) -> Scheduler:
    return Scheduler(Blocks(blocks, 4), budget_tokens=budget, most_running=running)


def request(number: int, length: int, max_tokens: int = 4) -> Request:
    return Request(number, tuple(number * 100 + i for i in range(length)), max_tokens)


def step(scheduler: Scheduler, match=nothing) -> Batch:
    """Plan one iteration, and do what the engine does with it."""
    batch = scheduler.plan(match, told)
    for each in batch.scheduled:
        each.request.computed_tokens = end = each.start + each.count
        if end >= each.request.num_tokens:
            each.request.output.append(7)
    return batch


def counts(batch: Batch) -> dict[int, int]:
    return {each.request.request_id: each.count for each in batch.scheduled}


def test_prompts_are_read_in_chunks_in_the_order_of_arrival() -> None:
    plan = scheduler(budget=10)
    plan.waiting.extend([request(1, 12), request(2, 6), request(3, 20)])
    assert [counts(step(plan)) for _ in range(3)] == [
        {1: 10},
        {1: 2, 2: 6, 3: 2},
        {1: 1, 2: 1, 3: 8},
    ]


def test_answers_go_before_prompts() -> None:
    plan = scheduler(budget=4)
    plan.waiting.append(request(1, 3))
    step(plan)
    plan.waiting.append(request(2, 9))
    assert counts(step(plan)) == {1: 1, 2: 3}


def test_each_batch_tells_only_the_new_blocks() -> None:
    plan = scheduler(budget=6)
    plan.waiting.append(request(1, 8, max_tokens=3))
    first, second, third = (step(plan).scheduled[0] for _ in range(3))
    assert (first.first, len(first.new_blocks)) == (True, 2)  # those of the whole prompt
    assert (second.first, second.new_blocks) == (False, ())
    assert len(third.new_blocks) == 1
    assert [each.completes_prompt for each in (first, second, third)] == [False, True, False]


def test_a_request_waits_until_all_that_it_may_need_is_free() -> None:
    plan = scheduler(blocks=4)
    big, small = request(1, 8, max_tokens=5), request(2, 8, max_tokens=1)
    plan.waiting.extend([big, small])
    assert counts(step(plan)) == {1: 8}  # one block is free, and it needs two
    assert small.state is State.WAITING
    plan.over(big)
    plan.free(big)
    assert counts(step(plan)) == {2: 8}


def test_whoever_cannot_be_admitted_is_not_overtaken() -> None:
    plan = scheduler(blocks=4)
    plan.waiting.extend([request(1, 8), request(2, 8), request(3, 1, max_tokens=1)])
    step(plan)
    assert [waiting.request_id for waiting in plan.waiting] == [2, 3]


def test_no_more_run_than_may() -> None:
    plan = scheduler(running=2)
    plan.waiting.extend(request(number, 1) for number in (1, 2, 3))
    assert counts(step(plan)) == {1: 1, 2: 1}


def test_what_is_brought_is_not_computed() -> None:
    plan = scheduler()
    one = request(1, 10)
    plan.waiting.append(one)
    (scheduled,) = step(plan, lambda request, computed: (6, False)).scheduled
    assert (scheduled.start, scheduled.count, one.matched_tokens) == (6, 4, 6)


def test_a_request_that_loads_is_parked_until_its_kv_is_there() -> None:
    plan = scheduler()
    one = request(1, 10)
    plan.waiting.append(one)
    batch = step(plan, lambda request, computed: (9, True))
    assert (batch.scheduled, batch.parked, one.state) == ((), (one,), State.LOADING)
    assert step(plan) == Batch(())
    one.matched_tokens = 5  # no more came
    assert plan.loaded(1) is one
    (scheduled,) = step(plan).scheduled
    assert (scheduled.first, scheduled.start, scheduled.count) == (True, 5, 5)
    assert len(scheduled.new_blocks) == 3


@pytest.mark.parametrize("matched", [(-1, False), (10, False), (0, True)])
def test_a_match_that_cannot_be_is_refused(matched: tuple[int, bool]) -> None:
    plan = scheduler()
    one = request(1, 10)
    plan.waiting.append(one)
    with pytest.raises(ValueError, match="of 10 tokens matched"):
        plan.plan(lambda request, computed: matched, told)
    assert one in plan.waiting


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_whoever_is_over_leaves_nothing(steps: int) -> None:
    plan = scheduler(budget=4)
    one = request(1, 6)
    plan.waiting.append(one)
    for _ in range(steps):
        step(plan)
    plan.over(one)
    plan.free(one)
    assert (len(plan), plan.blocks.used, plan.blocks.free) == (0, 0, 16)
    assert one.state is State.OVER
    assert step(plan) == Batch(())
