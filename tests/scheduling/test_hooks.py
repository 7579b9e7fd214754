"""How answers of several plugins combine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import PluginPolicy
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker

PROFILE = RequestProfile("r", "/v1/completions", "m", 1)
WORKERS = tuple(Worker(n, "http://127.0.0.1:1", "vllm", Role.DECODE) for n in ("a", "b"))


@pytest.fixture
def score():
    hosts = []

    def score(weights, **answers):
        extra = [
            (name, SimpleNamespace(disagg_score_workers=hookimpl(lambda answer=answer: answer)))
            for name, answer in answers.items()
        ]
        host = PluginHost.load(
            PluginPolicy(deadline_s=10), builtins=False, entry_points=False, extra=extra
        )
        hosts.append(host)
        fleet = FleetView(WORKERS, {})
        return host.scheduler.score_workers(PROFILE, Role.DECODE, WORKERS, fleet, weights)

    yield score
    for host in hosts:
        host.close()


def test_scores_are_averaged_by_weight(score):
    assert score({"x": 3.0}, x={"a": 1.0, "b": 0.0}, y={"a": 0.0, "b": 1.0}) == {
        "a": 0.75,
        "b": 0.25,
    }


def test_a_worker_left_out_gets_no_opinion_from_that_plugin(score):
    assert score({}, x={"a": 1.0}, y={"a": 0.5, "b": 0.25}) == {"a": 0.75, "b": 0.25}


def test_without_opinions_every_worker_is_neutral(score):
    assert score({}, x={}) == score({"x": 0.0}, x={"a": 1.0}) == {"a": 0.5, "b": 0.5}
