"""Prefer a worker from which KV travels cheaply."""

from __future__ import annotations

from disagg_plugins.scheduling.transfer_cost import TransferCost
from disagg_plugins.types import Role, Worker


def worker(url="http://10.0.0.1:1", engine="vllm", **labels):
    return Worker("w", url, engine, Role.BOTH, labels=labels)


def score(one, other):
    return TransferCost().disagg_score_workers([one], other)["w"]


HERE = worker(host="h1", zone="a")


def test_nearer_is_better():
    places = [
        worker(host="h1", zone="a"),
        worker(host="h2", zone="a"),
        worker(host="h2"),
        worker(host="h2", zone="b"),
    ]
    scores = [score(place, HERE) for place in places]
    assert scores == sorted(set(scores), reverse=True)


def test_hosts_without_labels_are_told_by_their_urls():
    assert score(worker("http://10.0.0.1:7"), worker("http://10.0.0.1:8")) == 1.0
    assert score(worker("http://10.0.0.1:7"), worker("http://10.0.0.2:7")) < 1.0


def test_unlike_engines_cost_more():
    assert score(worker(engine="sglang", host="h1"), HERE) < score(worker(host="h1"), HERE)


def test_the_part_that_is_chosen_first_gets_no_opinion():
    assert TransferCost().disagg_score_workers([HERE], None) is None
