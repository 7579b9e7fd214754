"""What is read of an answer of the OpenAI API, so that two can be compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.answer import MOST_TOKENS, Answer, compare
from disagg_plugins.canary.answer_reader import MOST_CHARS, AnswerReader


def read(*choices, ended=True):
    reader = AnswerReader()
    for choice in choices:
        reader.add(choice)
    return reader.answer(ended=ended)


PIECES = (
    {
        "text": "Par",
        "token_ids": [5],
        "logprobs": {
            "tokens": ["Par"],
            "token_logprobs": [-0.1],
            "top_logprobs": [{"Par": -0.1, "Lon": -3.0}],
        },
    },
    {
        "text": "is.",
        "token_ids": [6, 7],
        "logprobs": {
            "tokens": ["is", "."],
            "token_logprobs": [-0.2, -0.3],
            "top_logprobs": [{"is": -0.2}, {"!": -1.0}],
        },
    },
)


def test_a_streamed_completion_is_put_together():
    assert read(*PIECES) == Answer(
        "Paris.",
        (5, 6, 7),
        ("Par", "is", "."),
        ({"Par": -0.1, "Lon": -3.0}, {"is": -0.2}, {"!": -1.0, ".": -0.3}),
    )


def test_a_chat_is_read_whole_or_in_pieces():
    told = {
        "content": [
            {"token": "Hi", "logprob": -0.1, "top_logprobs": [{"token": "Yo", "logprob": -2}]}
        ]
    }
    for key in ("message", "delta"):
        found = read({key: {"role": "assistant", "content": "Hi"}, "logprobs": told})
        assert found == Answer("Hi", (), ("Hi",), ({"Yo": -2.0, "Hi": -0.1},))


def test_an_answer_that_broke_off_is_known_as_cut():
    assert read(PIECES[0], ended=False).cut
    assert compare(read(PIECES[0], ended=False), read(*PIECES), tie_gap=0).likeness == "identical"


def test_log_probabilities_that_do_not_fit_the_ids_are_left_out():
    bare = {key: value for key, value in PIECES[1].items() if key != "logprobs"}
    found = read(PIECES[0], bare)
    assert (found.ids, found.tokens, found.top) == ((5, 6, 7), (), ())


def test_ids_that_are_not_told_for_every_piece_have_no_places():
    assert read({"text": "a"}, {"text": "b", "token_ids": [2]}).ids == ()
    assert read({"text": "a", "token_ids": [1]}, {"text": "b", "token_ids": ["x"]}).ids == ()
    last = {"text": "", "finish_reason": "stop"}
    assert read({"text": "a", "token_ids": [1]}, last).ids == (1,)


def test_no_more_is_kept_than_can_tell_anything():
    found = read(*[{"text": "x" * 100, "token_ids": [1] * 10}] * 2_000)
    assert (len(found.ids), len(found.text)) == (1_640, MOST_CHARS)
    assert found.cut
    found = read({"token_ids": [1] * 100_000})
    assert (len(found.ids), found.cut) == (MOST_TOKENS, True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["token", "logprob", "top_logprobs", "content", "tokens", "a"]), inner
        )
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(["text", "delta", "message", "token_ids", "logprobs"])


@given(st.lists(st.dictionaries(FIELDS, JSON), max_size=4), st.booleans())
def test_whatever_a_worker_says_is_read_without_harm(choices, ended):
    found = read(*choices, ended=ended)
    assert len(found.tokens) == len(found.top)
    assert not found.ids or not found.tokens or len(found.ids) == len(found.tokens)
    compare(found, read(*PIECES), tie_gap=0.1)


@pytest.mark.parametrize("ids", [[-1], [1 << 32], ["1"], [True], [1.0]])
def test_what_is_no_token_id_is_none(ids):
    assert read({"text": "x", "token_ids": ids}).ids == ()
