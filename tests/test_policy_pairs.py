"""Which workers of a policy can share handoffs, by their engines, and who carries them."""

from __future__ import annotations

import pytest

from disagg_plugins.gateway.fleet import FleetState
from disagg_plugins.policy import Policy
from disagg_plugins.policy_advice import engine_advice, explain
from disagg_plugins.policy_pairs import carriers, engine_pairs
from disagg_sglang.dialect import SglangDialect
from disagg_trtllm.native import NativeTrtllmDialect
from disagg_vllm.dialect import VllmDialect

DIALECTS = {each.engine: each for each in (VllmDialect(), SglangDialect(), NativeTrtllmDialect())}


def policy(*workers: tuple[str, str], rule: str = "threshold", **fleet: object) -> Policy:
    """Return a policy of workers named by their engine and role."""
    return Policy.model_validate(
        {
            "fleet": {
                "workers": [
                    {
                        "name": f"{engine}-{role}-{number}", "engine": engine, "role": role,
                        "url": f"http://127.0.0.1:{9001 + number}",
                    }
                    for number, (engine, role) in enumerate(workers)
                ],
                **fleet,
            },
            "scheduler": {"split": {"rule": rule}},
        }
    )  # fmt: skip


VLLM_P, VLLM_D = ("vllm", "prefill"), ("vllm", "decode")
OWN_P, OWN_D, OWN_B = (("trtllm-native", role) for role in ("prefill", "decode", "both"))
SGLANG_P = ("sglang", "prefill")


@pytest.mark.parametrize("workers", [(VLLM_P, OWN_D), (OWN_P, VLLM_D), (SGLANG_P, OWN_D)])
def test_a_pair_that_the_gateway_refuses_is_refused_with_its_words(workers) -> None:
    said = policy(*workers)
    fleet = FleetState(
        tuple(w.worker() for w in said.fleet.workers), DIALECTS, model=None, unhealthy_after=3
    )
    found = engine_pairs(said, DIALECTS)
    assert not found.possible
    assert list(found.problems) == fleet.problems()
    assert "trtllm-native hands over by its own means, to trtllm-native only" in found.problems[0]


@pytest.mark.parametrize(
    ("workers", "problems"),
    [
        ((VLLM_P, VLLM_D), 0),
        ((OWN_P, OWN_D), 0),
        ((OWN_B, OWN_D), 0),
        ((VLLM_P, OWN_P, OWN_D), 1),
        ((VLLM_P, VLLM_D, OWN_P, OWN_D), 2),
        ((VLLM_P, ("unknown", "decode")), 0),
    ],
)
def test_where_some_pair_can_what_cannot_is_only_told(workers, problems: int) -> None:
    said = policy(*workers)
    found = engine_pairs(said, DIALECTS)
    assert found.possible
    assert len(found.problems) == problems
    told = "\n".join(engine_advice(said, DIALECTS))
    assert ("by its own means" in told) is bool(problems)


def test_a_fleet_that_is_not_meant_to_split_is_not_told_of_pairs() -> None:
    assert list(engine_advice(policy(VLLM_P, OWN_D, rule="never"), DIALECTS)) == []


def test_workers_of_a_watched_file_may_make_a_pair() -> None:
    assert engine_pairs(policy(VLLM_P, OWN_D, watch="more.yaml"), DIALECTS).possible


@pytest.mark.parametrize(
    ("workers", "ours", "own"),
    [
        ((VLLM_P, VLLM_D), True, ()),
        ((OWN_P, OWN_D), False, ("trtllm-native",)),
        ((OWN_B,), False, ()),
        ((OWN_B, OWN_D), False, ("trtllm-native",)),
        ((OWN_P, OWN_D, ("vllm", "both")), False, ("trtllm-native",)),
        ((OWN_P, OWN_D, VLLM_P), False, ("trtllm-native",)),
        ((VLLM_P, VLLM_D, OWN_P), True, ()),
        ((VLLM_P, OWN_D), False, ()),
        ((SGLANG_P, VLLM_D, OWN_D), True, ()),
        ((("sglang", "both"), ("sglang", "both")), False, ()),
        ((VLLM_P, VLLM_D, OWN_P, OWN_D), True, ("trtllm-native",)),
        ((), True, ()),
    ],
)
def test_who_carries_handoffs_follows_from_the_pairs_that_can_share_them(
    workers, ours: bool, own
) -> None:
    fleet = {} if workers else {"watch": "more.yaml"}
    found = carriers(policy(*workers, **fleet), DIALECTS)
    assert (found.ours, found.own) == (ours, own)


def test_workers_that_can_change_their_roles_may_make_a_pair() -> None:
    movable = [
        {
            "name": name, "engine": "sglang", "role": "both", "role_switch": True,
            "url": f"http://127.0.0.1:{port}",
        }
        for name, port in (("a", 9001), ("b", 9002))
    ]  # fmt: skip
    said = Policy.model_validate({"fleet": {"workers": movable}})
    assert engine_pairs(said, DIALECTS).possible
    assert carriers(said, DIALECTS).ours
    alone = Policy.model_validate({"fleet": {"workers": movable[:1]}})
    assert not engine_pairs(alone, DIALECTS).possible


def test_a_worker_that_no_pair_has_is_not_told_of_as_one_of_others() -> None:
    text = explain(policy(OWN_P, OWN_D, ("vllm", "both")), DIALECTS)
    assert "Between workers of trtllm-native KV travels by the engine's own transport" in text
    for word in ("other workers", "shm", "A handoff nobody claims"):
        assert word not in text, word


def test_a_fleet_with_its_own_transport_is_not_told_of_ours() -> None:
    text = explain(policy(OWN_P, OWN_D), DIALECTS)
    assert "Between workers of trtllm-native KV travels by the engine's own transport" in text
    assert "which nobody here observes" in text
    for word in ("shm", "stages", "lease", "A handoff nobody claims"):
        assert word not in text, word


def test_of_two_kinds_of_fleets_both_are_told() -> None:
    text = explain(policy(VLLM_P, VLLM_D, OWN_P, OWN_D), DIALECTS)
    assert "Between workers of trtllm-native KV travels by the engine's own transport" in text
    assert "Between other workers KV travels by shm, else tcp" in text
    assert "A handoff nobody claims is freed" in text
