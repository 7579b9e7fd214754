"""Greedy, cut and seeded choices; none of them can fail on what a client may send."""

from __future__ import annotations

import pytest
import torch

from disagg_reference.request import Sampling
from disagg_reference.sampling import Sampler

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


def draws(how: Sampling, count: int = 200) -> list[int]:
    sampler = Sampler(how)
    return [sampler.choose(LOGITS).token for _ in range(count)]


def test_without_temperature_the_best_is_chosen() -> None:
    assert draws(Sampling(), 3) == [1, 1, 1]


def test_a_seed_says_what_is_drawn() -> None:
    one = draws(Sampling(1.0, seed=5))
    assert one == draws(Sampling(1.0, seed=5))
    assert one != draws(Sampling(1.0, seed=6))


def test_without_a_seed_each_request_draws_otherwise() -> None:
    assert draws(Sampling(1.0)) != draws(Sampling(1.0))


def test_draws_are_as_frequent_as_they_are_likely() -> None:
    found = draws(Sampling(1.0, seed=1), 4000)
    for token, share in enumerate(LOGITS.softmax(-1).tolist()):
        # four standard deviations of a binomial
        assert abs(found.count(token) / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


@pytest.mark.parametrize(
    ("cut", "tokens"),
    [
        (Sampling(1.0, top_k=1, seed=1), {1}),
        (Sampling(1.0, top_k=2, seed=1), {1, 3}),
        (Sampling(1.0, top_k=100, seed=1), {0, 1, 2, 3}),
        (Sampling(1.0, top_p=0.01, seed=1), {1}),
        (Sampling(1.0, top_p=0.7, seed=1), {1, 3}),  # 0.64 alone are too little
        (Sampling(1.0, top_p=0.9, top_k=2, seed=1), {1, 3}),
    ],
)
def test_cuts_keep_the_best(cut: Sampling, tokens: set[int]) -> None:
    assert set(draws(cut)) == tokens


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-6, 1e-3])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    assert draws(Sampling(temperature, seed=1), 3) == [1, 1, 1]


@pytest.mark.parametrize("seed", [-1, 1 << 64, -(1 << 70)])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert draws(Sampling(1.0, seed=seed), 5) == draws(Sampling(1.0, seed=seed), 5)


def test_log_probabilities_are_those_before_temperature_and_cuts() -> None:
    chosen = Sampler(Sampling(2.0, top_k=1, logprobs=2)).choose(LOGITS)
    logs = LOGITS.log_softmax(-1)
    assert chosen.logprob == pytest.approx(float(logs[1]))
    assert chosen.best == pytest.approx({1: float(logs[1]), 3: float(logs[3])})
    assert Sampler(Sampling(logprobs=0)).choose(LOGITS).best == {}
    assert len(Sampler(Sampling(logprobs=20)).choose(LOGITS).best) == 4
    assert Sampler(Sampling()).choose(LOGITS).logprob is None
