"""What a copy must not do to its original, nor to anybody else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.answer import compare
from disagg_plugins.canary.answer_reader import AnswerReader
from tests.gateway.harness import eventually

SHADOW = {"share": 1.0, "control": 0.0, "max_per_s": 1000, "timeout_s": 5}


def shadowed(arms, **more):
    shadow = {**SHADOW, **more.pop("shadow", {})}
    return arms(canary={"shadow": shadow}, **more)


def test_what_the_baseline_takes_unread_is_answered_where_copies_are_made(arms) -> None:
    """A prompt with many brackets, text included, goes to its worker without being decoded."""
    site = shadowed(arms)
    status, answer = site.complete("a:[" * 70_000, temperature=0)
    assert status == 200, answer
    eventually(lambda: not site.front.copies._sent, "nothing in flight")


def test_a_copy_takes_nothing_of_what_its_tenant_may_have(arms) -> None:
    rules = {"tenants": {"ann": {"prompt_tokens_per_s": 0.001, "burst_tokens": 100}}}
    site = shadowed(arms, shadow={"control": 1.0}, baseline={"scheduler": rules})
    prompt = "x" * 32  # 8 tokens
    statuses = [site.complete(prompt, temperature=0, user="ann")[0] for _ in range(12)]
    assert statuses == [200] * 12
    eventually(lambda: site.front.copies.pairs == 12, "12 pairs")
    assert site.complete("x" * 400, user="ann")[0] == 429  # what is left is the client's own


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "a", "logprob": -1, "top_logprobs": [{"token": ["a"]}]}]},
        {"content": [{"token": "a", "logprob": 10**400}]},
        {"tokens": ["a"], "token_logprobs": [-(10**400)], "top_logprobs": [{"a": 10**400}]},
    ],
    ids=["token is a list", "huge", "huge in lists"],
)
def test_odd_log_probabilities_are_taken_for_missing(logprobs) -> None:
    reader = AnswerReader()
    reader.add({"text": "a", "logprobs": logprobs})
    assert reader.answer(ended=True).text == "a"


KEYS = ("text", "delta", "message", "content", "logprobs", "tokens", "token_logprobs")
MORE = ("top_logprobs", "token", "logprob", "token_ids", "a")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS + MORE), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(*[st.lists(st.dictionaries(st.sampled_from(KEYS + MORE), PLAIN), max_size=4)] * 2)
def test_whatever_workers_write_can_be_read_and_compared(ours, theirs) -> None:
    answers = []
    for choices in (ours, theirs):
        reader = AnswerReader()
        for choice in choices:
            reader.add(choice)
        answers.append(reader.answer(ended=True))
    compare(*answers, tie_gap=0.5)
