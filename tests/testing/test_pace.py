from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.errors import ConfigError
from disagg_plugins.testing.pace import (
    PROFILES,
    Batch,
    Job,
    PrefixCache,
    Profile,
    block_hashes,
    read_profile,
)

PROFILE = Profile(
    base_s=10.0,
    per_request_s=1.0,
    per_kv_token_s=0.01,
    per_prompt_token_s=0.1,
    budget_tokens=100,
    kv_tokens=1000,
    cached_blocks=4,
)


def run(batch: Batch) -> float:
    """Return the seconds until nothing is left."""
    seconds = 0.0
    while (step := batch.step()) is not None:
        seconds += step.seconds
    return seconds


def test_a_prompt_takes_its_tokens_time_and_brings_the_first_token() -> None:
    batch, job = Batch(PROFILE), Job(50, 2)
    batch.add(job)
    step = batch.step()
    assert step is not None
    assert step.seconds == pytest.approx(10 + 50 * 0.1)
    assert step.wrote == [job]
    assert not job.over


def test_a_running_answer_takes_its_share_and_reads_its_context() -> None:
    batch, job = Batch(PROFILE), Job(50, 2)
    batch.add(job)
    batch.step()
    step = batch.step()
    assert step is not None
    assert step.seconds == pytest.approx(10 + 1 + 0.01 * 51)
    assert job.over
    assert batch.step() is None
    assert batch.held_tokens == 0


def test_a_long_prompt_is_read_in_pieces_beside_running_answers() -> None:
    batch, short, long = Batch(PROFILE), Job(10, 5), Job(250, 1)
    batch.add(short)
    batch.step()
    batch.add(long)
    reads = []
    while not long.over:
        step = batch.step()
        assert step is not None
        reads.append(long.read)
    assert reads == [99, 198, 250]
    assert short.written == 4


def test_pieces_of_a_prompt_take_as_long_together_as_the_whole() -> None:
    profile = Profile(
        base_s=0.0,
        per_request_s=0.0,
        per_kv_token_s=0.0,
        per_prompt_token_s=0.1,
        per_prompt_pair_s=0.001,
        budget_tokens=64,
    )
    batch = Batch(profile)
    batch.add(Job(500, 1))
    assert run(batch) == pytest.approx(500 * 0.1 + 0.001 * 500**2)


def test_cached_prompt_tokens_cost_nothing_but_the_last_one() -> None:
    batch, prompt = Batch(PROFILE), b"x" * 64 * 3
    for _ in range(2):
        job = Job(48, 1, block_hashes(prompt, 16))
        batch.add(job)
        step = batch.step()
    assert step is not None
    assert job.cached == 47
    assert step.seconds == pytest.approx(10 + 0.1)


def test_the_prefix_cache_forgets_the_least_recently_used_tail_first() -> None:
    cache = PrefixCache(4)
    cache.keep([1, 2, 3])
    cache.keep([4, 5])
    assert len(cache) == 4
    assert cache.hits([1, 2, 3]) == 2
    assert cache.hits([4, 5]) == 2
    assert cache.hits([9, 1]) == 0


def test_a_hash_stands_for_all_before_it() -> None:
    one = block_hashes(b"a" * 64 + b"b" * 64 + b"rest", 16)
    other = block_hashes(b"c" * 64 + b"b" * 64, 16)
    assert len(one) == len(other) == 2
    assert one[1] != other[1]
    assert block_hashes(b"a" * 64 + b"d" * 64, 16)[0] == one[0]


def test_a_loaded_prompt_costs_one_token_and_its_missing_kv_travels() -> None:
    batch = Batch(PROFILE)
    blocks = block_hashes(b"x" * 400, 16)
    job = Job(100, 1, blocks, loaded=True)
    far_s = batch.transfer_s(job)
    batch.add(job)
    step = batch.step()
    assert step is not None
    assert step.seconds == pytest.approx(10 + 0.1)
    assert batch.transfer_s(Job(100, 1, blocks, loaded=True)) <= far_s


def test_requests_wait_in_order_for_room() -> None:
    batch = Batch(PROFILE)
    first, second, third = Job(50, 850), Job(60, 50), Job(10, 1)
    for job in (first, second, third):
        batch.add(job)
    batch.step()
    assert batch.running == [first]
    batch.drop(first)
    batch.step()
    assert second.read == 60
    assert third.over


def test_a_request_larger_than_the_room_runs_alone() -> None:
    batch = Batch(PROFILE)
    batch.add(Job(5000, 1))
    assert run(batch) > 0


@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.integers(1, 20), st.booleans(), st.booleans()),
        max_size=20,
    )
)
def test_every_job_ends_and_nothing_is_held_after(
    jobs: list[tuple[int, int, bool, bool]],
) -> None:
    batch = Batch(PROFILE)
    made = []
    for prompt, output, loaded, dropped in jobs:
        job = Job(prompt, output, block_hashes(b"p" * prompt * 4, 16), loaded=loaded)
        batch.add(job)
        made.append((job, dropped))
        batch.step()
        if dropped:
            batch.drop(job)
    run(batch)
    assert all(job.over for job, _ in made)
    assert all(job.written == job.output_tokens for job, dropped in made if not dropped)
    assert batch.held_tokens == 0
    assert not batch.running
    assert not batch.waiting
    assert len(batch.cache) <= PROFILE.cached_blocks


def test_the_published_prefill_and_decode_times_come_out() -> None:
    batch = Batch(PROFILES["opt-13b-a100"])
    batch.add(Job(512, 2))
    prefill, decode = batch.step(), batch.step()
    assert prefill is not None
    assert decode is not None
    # DistServe's own fit gives 72 ms and 20.3 ms; here both share the base of decode
    assert prefill.seconds == pytest.approx(0.072, rel=0.06)
    assert decode.seconds == pytest.approx(0.0203, rel=0.02)


def test_a_profile_is_read_by_name_or_from_a_file(tmp_path: Path) -> None:
    assert read_profile("cpu-vllm") is PROFILES["cpu-vllm"]
    path = tmp_path / "profile.json"
    fields = ("base_s", "per_request_s", "per_kv_token_s", "per_prompt_token_s")
    path.write_text(json.dumps(dict.fromkeys(fields, 0.5)))
    assert read_profile(str(path)).base_s == 0.5
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a timing profile"):
        read_profile(str(path))
    with pytest.raises(ConfigError, match="opt-13b-a100"):
        read_profile("no-such")
