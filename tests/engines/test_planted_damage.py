"""Damage in one KV head of one layer of a real model, behind token 512 of long prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from disagg_plugins.canary.answer import Answer, Difference, compare
from disagg_plugins.canary.metrics import ARMS
from disagg_plugins.canary.parity import Parity
from disagg_plugins.canary.policy import ParityPolicy
from tests.corpus import fixed_corpus, prompts
from tests.engines.planted import DAMAGES, Decoder

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

MODEL = Path(__file__).resolve().parents[2] / ".models" / "SmolLM2-135M-Instruct"
LAYER, HEAD = 13, 1
"""One in the middle of 30 layers; no head that matters more than most (a scan of nine layers)."""

OUTPUT_TOKENS = 10
LONG, SHORT = 1_024, 256
LONG_SHARE = 0.2
LEVEL = 0.05
POLICY = ParityPolicy()
ALLOWED = POLICY.allowed()

Kinds = Mapping[str, list[Difference]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What real answers differ by, by prompt tokens and by how they came about."""

    told: Mapping[int, Kinds]
    bare: Mapping[int, Kinds]


def bare(answer: Answer) -> Answer:
    return replace(answer, tokens=(), top=())


def kinds(found: list[dict[str, Answer]], *, without_log_probabilities: bool) -> Kinds:
    result: dict[str, list[Difference]] = {"sound": []}
    for answers in found:
        for name, answer in answers.items():
            one, other = answers["original"], answer
            if without_log_probabilities:
                one, other = bare(one), bare(other)
            if name != "original":
                kind = "sound" if name in ("again", "candidate") else name
                difference = compare(one, other, tie_gap=POLICY.tie_gap)
                result.setdefault(kind, []).append(difference)
    return result


@pytest.fixture(scope="module")
def measured() -> Measured:
    if not MODEL.is_dir():
        pytest.skip(f"there is no {MODEL}: make model")
    decoder = Decoder(MODEL, LAYER, HEAD, OUTPUT_TOKENS)
    text = fixed_corpus()
    found = {
        tokens: list(
            decoder.answers(list(prompts([tokens * 3 // 2] * count, seed=3, text=text)), tokens, 1)
        )
        for tokens, count in ((LONG, 24), (SHORT, 16))
    }
    for tokens, answers in found.items():
        for name, differences in kinds(answers, without_log_probabilities=False).items():
            told = [d.likeness for d in differences]
            drift = float(np.median([d.drift for d in differences if d.drift is not None]))
            print(f"{tokens} {name}: {told.count('different')} different, {told.count('tie')} ties "
                  f"of {len(told)}, drift {drift:.3f}")  # fmt: skip
    return Measured(
        {t: kinds(f, without_log_probabilities=False) for t, f in found.items()},
        {t: kinds(f, without_log_probabilities=True) for t, f in found.items()},
    )


def judge(pools: Mapping[int, Kinds], kind: str, seed: int, most: int) -> tuple[str, int, Parity]:
    """Draw measured pairs as traffic would bring them; look every ten until it is decided."""
    rng, parity = np.random.default_rng(seed), Parity(ALLOWED, LEVEL)
    long_pairs = 0
    for count in range(1, most + 1):
        tokens = LONG if rng.random() < LONG_SHARE else SHORT
        arm = ARMS[int(rng.random() < 0.5)]
        pool = pools[tokens][kind if arm == "candidate" and tokens == LONG else "sound"]
        parity.observe(arm, tokens, pool[int(rng.integers(len(pool)))])
        long_pairs += tokens == LONG
        if count % 10 == 0 and (answer := parity.decide()) != "open":
            return answer, long_pairs, parity
    return parity.decide(), long_pairs, parity


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_one_head_is_found_where_log_probabilities_are_told(measured, damage):
    # the rounding of one machine is not that of another: 600 to 1,700 pairs of long prompts
    ends = [judge(measured.told, damage, seed, 16_000) for seed in range(10)]
    print(damage, "pairs of long prompts:", [pairs for _, pairs, _ in ends])
    assert [answer for answer, _, _ in ends] == ["worse"] * 10
    for _, _, parity in ends:
        worse = {f.bucket for f in parity.judge().findings if f.answer == "worse"}
        assert worse == {"prompts of 512 to 2047 tokens"}


def test_damage_that_turns_tokens_is_found_without_log_probabilities(measured):
    ends = [judge(measured.bare, "double", seed, 8_000) for seed in range(5)]
    print("double, tokens only, pairs of long prompts:", [pairs for _, pairs, _ in ends])
    assert [answer for answer, _, _ in ends] == ["worse"] * 5


@pytest.mark.parametrize("told", [True, False])
def test_a_sound_candidate_is_not_condemned_for_rounding(measured, told):
    pools = measured.told if told else measured.bare
    assert any(d.likeness != "identical" for d in pools[LONG]["sound"])  # there is noise
    ends = [judge(pools, "sound", seed, 1_500) for seed in range(10)]
    assert "worse" not in {answer for answer, _, _ in ends}
