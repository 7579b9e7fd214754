"""Two answers to one request: where they part, whether at a tie, how far they drift."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.canary.answer import Answer, Difference, compare, not_comparable

GAP = 0.01


def told(*steps, ids=None, cut=False):
    """An answer of which each step is the token written and what the engine told of others."""
    tokens = [token for token, _ in steps]
    return Answer("".join(tokens), ids or (), tokens, [top for _, top in steps], cut)


def test_equal_answers_are_identical():
    one = Answer(ids=(1, 2, 3))
    assert compare(one, one, tie_gap=GAP) == Difference("identical", None, None, None, "ids")


def test_the_first_token_that_differs_is_where_they_part():
    found = compare(Answer(ids=(1, 2, 3, 4)), Answer(ids=(1, 2, 9, 4)), tie_gap=GAP)
    assert (found.likeness, found.position) == ("different", 2)


def test_ids_are_compared_before_names_and_names_before_texts():
    one = Answer("a b", (1, 2), ("a", " b"))
    assert compare(one, Answer("a c", (1, 2), ("a", " c")), tie_gap=GAP).position is None
    assert compare(one, Answer("a b", (), ("a", " c")), tie_gap=GAP).position == 1
    assert compare(one, Answer("a b"), tie_gap=GAP).compared_by == "text"


def test_names_of_unlike_kinds_are_not_compared():
    one = Answer("a b", tokens=("token_id:1", "token_id:2"))
    found = compare(one, Answer("a b", tokens=("a", " b")), tie_gap=GAP)
    assert (found.likeness, found.compared_by) == ("identical", "text")


def test_a_place_in_a_text_is_told_in_tokens():
    found = compare(Answer("0123456789"), Answer("01234567x9"), tie_gap=GAP)
    assert (found.likeness, found.position) == ("different", 2)


def test_one_that_ends_where_the_other_goes_on_is_different():
    found = compare(Answer(ids=(1, 2)), Answer(ids=(1, 2, 3)), tie_gap=GAP)
    assert (found.likeness, found.position) == ("different", 2)


def test_of_one_that_was_cut_nobody_knows_how_it_goes_on():
    cut = Answer(ids=(1, 2), cut=True)
    assert compare(cut, Answer(ids=(1, 2, 3)), tie_gap=GAP).likeness == "identical"
    assert compare(cut, Answer(ids=(1,)), tie_gap=GAP).likeness == "different"


TIED = {"x": -0.7, "y": -0.705}


def test_they_part_at_a_tie_where_both_held_both_for_nearly_as_good():
    one = told(("a", {"a": -0.1}), ("x", TIED))
    other = told(("a", {"a": -0.1}), ("y", {"x": -0.702, "y": -0.7}))
    found = compare(one, other, tie_gap=GAP)
    assert (found.likeness, found.position) == ("tie", 1)
    assert found.gap == pytest.approx(0.005)


@pytest.mark.parametrize("top", [{"x": -1.0, "y": -0.6}, {"y": -0.7}, {}])
def test_it_is_no_tie_where_one_side_saw_a_difference_or_did_not_tell(top):
    one, other = told(("x", TIED)), told(("y", top))
    assert compare(one, other, tie_gap=GAP).likeness == "different"


def test_without_log_probabilities_nothing_is_a_tie():
    found = compare(Answer(ids=(1,)), Answer(ids=(2,)), tie_gap=GAP)
    assert (found.likeness, found.gap, found.drift) == ("different", None, None)


def test_drift_is_the_mean_over_the_common_beginning():
    one = told(("a", {"a": -0.1}), ("b", {"b": -0.5}))
    other = told(("a", {"a": -0.2}), ("b", {"b": -0.8}))
    assert compare(one, other, tie_gap=GAP).drift == pytest.approx(0.2)


def test_drift_counts_where_they_part_and_nothing_behind():
    one = told(("x", {"x": -0.5, "y": -1.0}), ("z", {"z": -9.0}))
    other = told(("y", {"x": -0.9, "y": -0.6}), ("z", {"z": -1.0}))
    assert compare(one, other, tie_gap=GAP).drift == pytest.approx(0.4)


def test_what_is_no_number_is_no_drift():
    one, other = told(("x", {"x": -math.inf})), told(("x", {"x": -math.inf}))
    assert compare(one, other, tie_gap=GAP).drift is None
    assert compare(one, told(("x", {"x": math.nan})), tie_gap=GAP).drift is None


STEPS = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.dictionaries(st.sampled_from("abc"), st.floats(), max_size=3)
    ),
    max_size=6,
)


@given(STEPS, STEPS, st.booleans(), st.booleans())
def test_the_order_of_the_two_is_nothing_to_the_result(one, other, cut, other_cut):
    ours, theirs = told(*one, cut=cut), told(*other, cut=other_cut)
    found = compare(ours, theirs, tie_gap=GAP)
    back = compare(theirs, ours, tie_gap=GAP)
    assert (found.likeness, found.position) == (back.likeness, back.position)
    assert found.drift == (None if back.drift is None else pytest.approx(back.drift))
    assert (found.position is None) == (found.likeness == "identical")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"temperature": 0}, None),
        ({"temperature": 0.0, "n": 1, "prompt": [1, 2]}, None),
        ({"top_k": 1}, None),
        ({}, "it is sampled"),
        ({"temperature": 0.7}, "it is sampled"),
        ({"temperature": False}, "it is sampled"),
        ({"temperature": 1, "seed": 3}, "it is sampled"),
        ({"temperature": 0, "n": 2}, "n > 1"),
        ({"temperature": 0, "best_of": 3}, "best_of > 1"),
        ({"temperature": 0, "use_beam_search": True}, "beam search"),
        ({"temperature": 0, "prompt": ["a", "b"]}, "a batch of prompts"),
    ],
)
def test_only_what_must_be_answered_alike_is_compared(body, why):
    assert not_comparable(body) == why


def test_a_seed_makes_it_comparable_where_both_arms_draw_alike():
    assert not_comparable({"temperature": 1, "seed": 3}, seeds=True) is None
    assert not_comparable({"temperature": 1}, seeds=True) == "it is sampled"
