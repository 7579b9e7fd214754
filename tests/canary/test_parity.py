"""Whether both arms say the same, measured against how often one contradicts itself."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.canary.answer import Difference
from disagg_plugins.canary.parity import Parity
from disagg_plugins.errors import DamagedState
from tests.canary.parity_runs import ALLOWED, LEVEL, SOUND, Candidate, Pairs, ends, run

SAME = Difference("identical", None, None, None, "ids")
TIE = Difference("tie", 3, 0.001, None, "tokens")
EXACT = Pairs(rate=0.0, drift=None)


def parted(position):
    return Difference("different", position, None, None, "ids")


def filled(pairs):
    parity = Parity(ALLOWED, LEVEL)
    for arm, tokens, difference, count in pairs:
        for _ in range(count):
            parity.observe(arm, tokens, difference)
    return parity


def aspects(parity):
    return {(f.aspect, f.bucket): f.answer for f in parity.judge().findings if f.answer != "open"}


def test_nothing_is_known_of_nothing():
    found = Parity(ALLOWED, LEVEL).judge()
    assert (found.answer, found.reasons) == ("open", ())


def test_noise_of_the_baseline_itself_condemns_nobody():
    noisy = Pairs(rate=0.01, drift=0.2)
    assert "worse" not in {answer for answer, _ in ends(Candidate(), 12, 2_000, baseline=noisy)}


def test_arms_that_are_alike_are_found_so():
    answer, count, _ = run(np.random.default_rng(1), Candidate(), 8_000, baseline=EXACT)
    assert answer == "ok"
    assert count < 8_000


@pytest.mark.parametrize(
    ("pairs", "aspect"),
    [
        (Pairs(0.01, None), "different"),
        (Pairs(0.5, None), "within 1"),
        (Pairs(0.0003, 0.1), "drift p50"),
    ],
)
def test_damage_of_long_prompts_alone_is_found_and_its_bucket_named(pairs, aspect):
    sound = replace(SOUND, drift=pairs.drift and SOUND.drift)
    answer, _, parity = run(
        np.random.default_rng(2), Candidate({4_000: pairs}), 3_000, baseline=sound
    )
    assert answer == "worse"
    assert {bucket for (_, bucket), found in aspects(parity).items() if found == "worse"} == {
        "prompts of 2048 to 8191 tokens"
    }
    # another aspect may be proven before this one, which follows
    rng = np.random.default_rng(3)
    for _ in range(300):
        parity.observe("baseline", 4_000, sound.draw(rng))
        parity.observe("candidate", 4_000, pairs.draw(rng))
    assert aspects(parity)[aspect, "prompts of 2048 to 8191 tokens"] == "worse"


def test_damage_in_few_prompts_would_be_thinned_out_by_the_others():
    damaged = Candidate({4_000: Pairs(0.002, None)})
    sound = replace(SOUND, drift=None)
    one = replace(ALLOWED, edges=())
    assert [a for a, _ in ends(damaged, 4, 4_000, baseline=sound, allowed=one)] != ["worse"] * 4
    assert [a for a, _ in ends(damaged, 4, 4_000, baseline=sound)] == ["worse"] * 4


def test_early_partings_condemn_where_the_share_of_different_answers_does_not():
    late, early = parted(150), parted(0)
    parity = filled(
        [
            ("baseline", 100, SAME, 4),
            ("baseline", 100, late, 1),
            ("candidate", 100, SAME, 12),
            ("candidate", 100, late, 1),
            ("candidate", 100, early, 2),
        ]
        * 40
    )
    found = aspects(parity)
    assert ("different", "prompts below 512 tokens") not in found
    assert found["within 1", "prompts below 512 tokens"] == "worse"
    assert parity.decide() == "worse"


def test_partings_at_a_tie_are_explained():
    pairs = [("baseline", 100, SAME, 300), ("candidate", 100, TIE, 300)]
    assert filled(pairs).decide() == "ok"


@pytest.mark.parametrize(("drift", "answer"), [(0.02, "ok"), (0.05, "worse")])
def test_drift_below_the_floor_condemns_nobody_however_steady_the_baseline(drift, answer):
    far = replace(SAME, drift=drift)
    none = replace(SAME, drift=0.0)
    parity = filled([("baseline", 100, none, 1), ("candidate", 100, far, 1)] * 200)
    assert aspects(parity)["drift p50", "prompts below 512 tokens"] == answer


def test_a_candidate_that_agrees_more_than_the_baseline_with_itself_is_fine():
    pairs = [("baseline", 100, parted(0), 300), ("candidate", 100, SAME, 300)]
    assert filled(pairs).decide() == "ok"


def test_a_bucket_without_its_fair_share_holds_nothing_up_but_condemns():
    good = [("baseline", 100, SAME, 1_500), ("candidate", 100, SAME, 1_500)]
    few = [("baseline", 9_000, SAME, 60), ("candidate", 9_000, SAME, 10)]
    assert filled(good + few).decide() == "ok"
    bad = [("baseline", 9_000, SAME, 60), ("candidate", 9_000, parted(0), 60)]
    assert filled(good + bad).decide() == "worse"


def test_a_bucket_with_its_fair_share_is_waited_for():
    good = [("baseline", 100, SAME, 500), ("candidate", 100, SAME, 500)]
    few = [("baseline", 9_000, SAME, 60), ("candidate", 9_000, SAME, 20)]
    assert filled(good + few).decide() == "open"


def test_before_the_least_number_of_pairs_there_is_no_verdict():
    for count, answer in ((ALLOWED.min_pairs - 1, "open"), (ALLOWED.min_pairs, "worse")):
        pairs = [("baseline", 100, SAME, 200), ("candidate", 100, parted(0), count)]
        assert filled(pairs).decide() == answer


def test_without_pairs_of_the_baseline_with_itself_there_is_no_verdict():
    assert filled([("candidate", 100, parted(0), 500)]).decide() == "open"


def test_the_reason_has_the_numbers():
    pairs = [("baseline", 5_000, SAME, 100), ("candidate", 5_000, parted(2), 100)]
    parity = filled(pairs)
    parity.lose("candidate")
    found = parity.judge()
    assert found.lost == {"baseline": 0, "candidate": 1}
    assert len(found.reasons) == 4  # different, and within 4, 16 and 64 tokens
    assert found.reasons[0].startswith(
        "parity, different, prompts of 2048 to 8191 tokens: worse than allowed: the candidate's "
        "answers 1 ("
    )
    assert found.reasons[0].endswith("100 pairs); allowed 0.03 more of the pairs")


PAIRS = st.lists(
    st.tuples(
        st.sampled_from(["baseline", "candidate"]),
        st.sampled_from([10, 600, 3_000, 10_000]),
        st.builds(
            Difference,
            st.sampled_from(["identical", "tie", "different"]),
            st.integers(0, 100),
            st.none(),
            st.none() | st.floats(0, 10),
            st.just("ids"),
        ),
        st.integers(1, 40),
    ),
    max_size=8,
)


@given(PAIRS, PAIRS)
@settings(max_examples=25, deadline=None)
def test_evidence_of_two_gateways_adds_up(one, other):
    together, ours, theirs = filled(one + other), filled(one), filled(other)
    ours.merge(theirs)
    for arm in ("baseline", "candidate"):
        assert ours.pairs(arm) == together.pairs(arm)


@given(PAIRS)
@settings(max_examples=25, deadline=None)
def test_evidence_survives_a_restart(pairs):
    parity = filled(pairs)
    parity.lose("baseline")
    stored = json.loads(json.dumps(parity.as_dict()))
    again = Parity.from_dict(stored, ALLOWED, LEVEL)
    assert again.as_dict() == parity.as_dict()
    assert again.decide() == parity.decide()


STATE = filled([("baseline", 100, SAME, 3), ("candidate", 9_000, parted(1), 3)]).as_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("version", True),
        ("level", 0.1),
        ("allowed", {}),
        ("lost", {"baseline": -1, "candidate": 0}),
        ("baseline", []),
        ("candidate", [{}, {}, {}, {}]),
    ],
)
def test_what_was_not_written_so_is_refused(key, value):
    with pytest.raises(DamagedState):
        Parity.from_dict({**copy.deepcopy(STATE), key: value}, ALLOWED, LEVEL)


def test_evidence_for_other_margins_is_refused():
    other = replace(ALLOWED, margin=0.1)
    with pytest.raises(DamagedState, match="other margins"):
        Parity.from_dict(copy.deepcopy(STATE), other, LEVEL)
    with pytest.raises(ValueError, match="other margins"):
        Parity(ALLOWED, LEVEL).merge(Parity(other, LEVEL))


@pytest.mark.parametrize(
    "change",
    [
        {"margin": 0.0},
        {"early_margin": 1.0},
        {"drift_ratio": 0.5},
        {"drift_floor": 0.0},
        {"edges": (512, 512)},
        {"edges": (0,)},
        {"min_pairs": 0},
        {"fair_share": 0.0},
    ],
)
def test_margins_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match=".+"):
        replace(ALLOWED, **change)


def test_buckets_are_told_in_words():
    assert replace(ALLOWED, edges=()).buckets == ("all prompts",)
    assert replace(ALLOWED, edges=(512, 2048)).buckets == (
        "prompts below 512 tokens",
        "prompts of 512 to 2047 tokens",
        "prompts of 2048 and more tokens",
    )
