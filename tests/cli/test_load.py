from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disagg_plugins.cli.load import (
    LoadError,
    LoadSettings,
    Sample,
    _has_output,
    connect,
    first_model,
    run_load,
    spread,
    summarise,
)
from disagg_plugins.errors import ConfigError
from disagg_plugins.testing.fake_engine import Behaviour, FakeEngine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as engine:
        yield engine


def settings(url: str, **more: object) -> LoadSettings:
    values: dict[str, object] = {
        "url": url,
        "model": "fake-model",
        "requests": 4,
        "concurrency": 2,
        "prompt_words": 20,
        "output_tokens": 5,
        "timeout_s": 5.0,
    }
    return LoadSettings(**{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_every_request_is_timed_and_its_tokens_counted(engine: FakeEngine, chat: bool) -> None:
    samples, wall_s = run_load(settings(engine.url, chat=chat))
    assert [s.error for s in samples] == [""] * 4
    assert [s.output_tokens for s in samples] == [5] * 4
    assert all(s.ttft_s is not None and 0 < s.ttft_s <= s.latency_s for s in samples)
    assert all(s.prompt_tokens > 0 for s in samples)
    assert wall_s > 0


def test_gaps_are_between_chunks_with_output_only(engine: FakeEngine) -> None:
    samples, _ = run_load(settings(engine.url, requests=1))
    assert len(samples[0].gaps_s) == 4


def test_progress_counts_up(engine: FakeEngine) -> None:
    told: list[int] = []
    run_load(settings(engine.url, concurrency=1), told.append)
    assert told == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (Behaviour(status=500, times=1), "status 500"),
        (Behaviour(close="stream", times=1), "without [DONE]"),
        (Behaviour(no_done=True, times=1), "without [DONE]"),
        (Behaviour(garbage="http", times=1), "BadStatusLine"),
    ],
)
def test_one_failed_request_is_told_and_the_rest_goes_on(behaviour: Behaviour, said: str) -> None:
    with FakeEngine(behaviour=behaviour) as engine:
        samples, _ = run_load(settings(engine.url, concurrency=1))
    assert sum(bool(s.error) for s in samples) == 1
    assert said in next(s.error for s in samples if s.error)


def test_silence_ends_with_the_time_out() -> None:
    with FakeEngine(behaviour=Behaviour(hang="head")) as engine:
        samples, wall_s = run_load(settings(engine.url, requests=1, timeout_s=0.2))
    assert "timed out" in samples[0].error
    assert wall_s < 5


def test_first_model_is_asked_for(engine: FakeEngine) -> None:
    assert first_model(engine.url, 5) == "fake-model"


def test_endpoint_that_does_not_answer_is_an_error(free_port: Callable[[], int]) -> None:
    with pytest.raises(LoadError, match="is the endpoint up"):
        first_model(f"http://127.0.0.1:{free_port()}", 1)


def test_url_may_have_a_path_before_v1() -> None:
    connection, path = connect("https://host:444/api/v1/", 1)
    assert (connection.host, connection.port, path) == ("host", 444, "/api")


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://"])
def test_url_of_another_form_is_an_error(url: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        connect(url, 1)


def test_key_is_not_shown() -> None:
    assert "hunter2" not in repr(settings("http://h:1", api_key="hunter2"))


def test_tpot_is_the_mean_after_the_first_token() -> None:
    assert Sample(output_tokens=5, ttft_s=1.0, latency_s=3.0).tpot_s == 0.5


def test_tpot_of_one_token_is_undefined() -> None:
    assert Sample(output_tokens=1, ttft_s=1.0, latency_s=1.0).tpot_s is None


def test_spread_is_mean_percentiles_and_population_deviation() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0])
    assert found["mean_s"] == 2.5
    assert found["p50_s"] == 2.5
    assert found["p99_s"] == pytest.approx(3.97)
    assert found["std_s"] == pytest.approx(1.118, abs=1e-3)


def test_spread_of_nothing_is_none() -> None:
    assert set(spread([]).values()) == {None}


def test_failed_requests_count_in_no_latency() -> None:
    good = Sample(output_tokens=3, prompt_tokens=7, ttft_s=1.0, latency_s=2.0, gaps_s=[0.5, 0.5])
    found = summarise([good, Sample(error="E: x", ttft_s=99.0)], wall_s=2.0)
    assert (found["requests"], found["failed"], found["errors"]) == (2, 1, ["E: x"])
    assert found["ttft"]["p99_s"] == 1.0
    assert found["output_tokens_per_s"] == 1.5
    json.dumps(found)


@pytest.mark.parametrize(
    ("choices", "output"),
    [
        ([], False),
        (None, False),
        ([{"text": "a"}], True),
        ([{"text": ""}], True),
        ([{"delta": {"role": "assistant", "content": ""}}], False),
        ([{"delta": {"role": "assistant", "content": "a"}}], True),
        ([{"delta": {"content": "a"}}], True),
        ([{"delta": {"content": "", "role": None}}], True),
        ([{"delta": {"reasoning_content": "a"}}], True),
    ],
)
def test_chunks_count_by_what_the_engine_made_not_by_their_text(choices: Any, output: bool) -> None:
    assert _has_output(choices) is output
