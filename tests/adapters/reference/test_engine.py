"""The engine answers alike however it batches, chunks, caches and shares the work out."""

from __future__ import annotations

import threading
import time

import pytest

from disagg_plugins.errors import NoCapacityError
from disagg_reference.engine import EngineDead, NoHost
from disagg_reference.request import Sampling


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * i * i + 3 * i + 31 * seed) % 256 for i in range(length))


PROMPTS = [prompt(length, seed) for seed, length in enumerate((1, 5, 8, 9, 40, 100))]


@pytest.fixture
def alone(make_engine, ask):
    """What each prompt is answered when it is alone in a plain engine."""
    engine = make_engine()
    return [ask(engine, given, 12).tokens for given in PROMPTS]


def test_a_batch_says_what_each_request_is_told_alone(make_engine, ask, alone) -> None:
    engine = make_engine(start=False)
    asked = [ask(engine, given, 12) for given in PROMPTS]
    engine.start()
    assert [each.tokens for each in asked] == alone
    assert engine.stats()["steps"] < 20


@pytest.mark.parametrize("budget", [1, 3, 16])
def test_a_prompt_read_in_chunks_is_answered_like_one_read_at_once(
    make_engine, ask, alone, budget: int
) -> None:
    engine = make_engine(budget_tokens=budget)
    assert [ask(engine, given, 12).tokens for given in PROMPTS] == alone


def test_two_ranks_say_what_one_says(make_engine, ask, alone) -> None:
    engine = make_engine(tp_size=2)
    assert [pool.shape.num_kv_heads_local for pool in engine.pools] == [1, 1]
    assert [ask(engine, given, 12).tokens for given in PROMPTS] == alone


@pytest.mark.parametrize("block", [1, 16, 64])
def test_the_size_of_blocks_changes_nothing(make_engine, ask, alone, block: int) -> None:
    engine = make_engine(block_size_tokens=block, num_blocks=256)
    assert [ask(engine, given, 12).tokens for given in PROMPTS] == alone


def test_a_cached_beginning_is_not_computed_again_and_changes_nothing(
    make_engine, ask, alone
) -> None:
    engine = make_engine()
    first = ask(engine, PROMPTS[-1], 12)
    assert first.tokens == alone[-1]
    again = ask(engine, PROMPTS[-1], 12)
    assert again.tokens == alone[-1]
    assert (first.request.local_tokens, again.request.local_tokens) == (0, 96)
    longer = ask(engine, PROMPTS[-1][:50] + prompt(20, 9), 4)
    assert len(longer.tokens) == 4
    assert longer.request.local_tokens == 48


def test_an_answer_is_cached_as_well(make_engine, ask) -> None:
    engine = make_engine()
    begun = ask(engine, PROMPTS[4], 20).tokens
    next_turn = ask(engine, PROMPTS[4] + tuple(begun) + (1, 2, 3), 4)
    assert len(next_turn.tokens) == 4
    assert next_turn.request.local_tokens == 56  # 40 + 19 tokens have KV: seven blocks of 8


def test_a_full_pool_makes_requests_wait_and_leaves_nothing_behind(make_engine, ask, alone) -> None:
    engine = make_engine(num_blocks=16)  # one request of 100 + 12 tokens at a time
    asked = [ask(engine, PROMPTS[-1], 12) for _ in range(3)]
    asked += [ask(engine, given, 12) for given in PROMPTS]
    assert [each.tokens for each in asked] == [alone[-1]] * 3 + alone
    assert engine.stats()["blocks_used"] == 0


def test_an_end_token_ends_the_answer(make_engine, ask, alone) -> None:
    engine = make_engine()
    ending = alone[4][3]
    asked = ask(engine, PROMPTS[4], 12, eos=frozenset([ending]))
    assert asked.tokens == alone[4][: alone[4].index(ending) + 1]
    assert asked.finish_reason == "stop"


def test_a_seed_draws_the_same_whatever_runs_beside_it(make_engine, ask) -> None:
    engine = make_engine()
    drawn = Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=7)
    first = ask(engine, PROMPTS[4], 12, sampling=drawn).tokens
    beside = [ask(engine, given, 12) for given in PROMPTS]
    again = ask(engine, PROMPTS[4], 12, sampling=drawn)
    other = ask(engine, PROMPTS[4], 12, sampling=Sampling(temperature=1.0, seed=8))
    assert again.tokens == first
    assert other.tokens != first
    assert all(each.tokens for each in beside)


def test_a_request_that_is_cancelled_frees_its_blocks(make_engine, ask) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def before_step(number: int) -> None:
        if number == 3:
            at_work.set()
            assert go_on.wait(30)

    engine = make_engine(before_step=before_step)
    asked = ask(engine, PROMPTS[4], 500)
    assert at_work.wait(30)
    engine.cancel(asked.request.request_id)
    waiting = ask(engine, PROMPTS[4], 5)
    engine.cancel(waiting.request.request_id)
    go_on.set()
    assert (asked.finish_reason, waiting.finish_reason) == ("abort", "abort")
    assert ask(engine, PROMPTS[0], 2).finish_reason == "length"
    assert engine.stats()["blocks_used"] == 0


def test_a_failed_iteration_ends_the_engine_and_everybody_hears_of_it(make_engine, ask) -> None:
    def before_step(number: int) -> None:
        if number == 2:
            raise RuntimeError("out of memory")

    engine = make_engine(start=False, before_step=before_step)
    asked = [ask(engine, given, 12) for given in PROMPTS[:3]]
    engine.start()
    assert [each.finish_reason for each in asked] == ["error"] * 3
    assert "out of memory" in asked[0].outputs[-1].problem
    with pytest.raises(EngineDead, match="out of memory"):
        ask(engine, PROMPTS[0], 1)


def test_too_many_requests_are_refused_at_once(make_engine, ask) -> None:
    engine = make_engine(start=False, most_waiting=2, most_running=1)
    for _ in range(3):
        ask(engine, PROMPTS[0], 1)
    with pytest.raises(NoCapacityError):
        ask(engine, PROMPTS[0], 1)


@pytest.mark.parametrize(
    ("given", "max_tokens", "problem"),
    [
        ((), 1, "at least one prompt token"),
        ((1,), 0, "asks for at least one"),
        ((257,), 1, "outside the 257"),
        ((1,), 5000, "more than the model's 4096"),
        ((1,), 1100, "need more KV than the 128 blocks"),
    ],
)
def test_what_can_never_be_served_is_refused(
    make_engine, ask, given: tuple[int, ...], max_tokens: int, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        ask(make_engine(start=False), given, max_tokens)


def test_closing_ends_what_is_open(make_engine, ask) -> None:
    engine = make_engine(start=False)
    asked = ask(engine, PROMPTS[0], 1)
    engine.close()
    engine.start()
    assert asked.finish_reason == "abort"


class _Raising(NoHost):
    def match(self, request, computed_tokens):
        raise RuntimeError("the connector is broken")


def test_a_request_whose_admission_fails_hears_of_it(make_engine, ask) -> None:
    engine = make_engine(host=lambda pools, config: _Raising())
    asked = ask(engine, PROMPTS[0], 1)
    assert asked.finish_reason == "error"
    assert "the connector is broken" in asked.outputs[-1].problem


def test_whatever_ends_the_engine_is_told(make_engine, ask) -> None:
    def before_step(number: int) -> None:
        raise SystemExit(3)

    engine = make_engine(start=False, before_step=before_step)
    asked = ask(engine, PROMPTS[0], 1)
    engine.start()
    assert asked.finish_reason == "error"
    assert "SystemExit" in engine.problem


class _Loading(NoHost):
    """Loads the first request until it is given up."""

    def __init__(self) -> None:
        self.polls, self._loading, self._given_up = 0, [], []

    def match(self, request, computed_tokens):
        if self._loading:
            return 0, False
        self._loading.append(request.request_id)
        return 1, True

    def cancel(self, request):
        request.matched_tokens = 0
        self._given_up.append(request.request_id)

    def poll(self):
        self.polls += 1
        given_up, self._given_up = self._given_up, []
        return (), given_up


def test_a_request_that_loads_is_given_up_at_once_and_the_next_gets_its_blocks(
    make_engine, ask
) -> None:
    host = _Loading()
    engine = make_engine(host=lambda pools, config: host, num_blocks=6)
    first = ask(engine, PROMPTS[4], 1)
    end_s = time.monotonic() + 30.0
    while not engine.stats()["loading"]:
        assert time.monotonic() < end_s, "it does not load"
        time.sleep(0.001)
    second = ask(engine, PROMPTS[4], 1)  # does not fit beside it
    engine.cancel(first.request.request_id)
    assert (first.finish_reason, second.finish_reason) == ("abort", "length")
    assert engine.stats()["blocks_used"] == 0
