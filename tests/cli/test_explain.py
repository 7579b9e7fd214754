"""``disagg explain``: the gateway's answer in words."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_plugins.cli.explain import lines
from disagg_plugins.cli.main import main


def answer(**more: Any) -> dict[str, Any]:
    return {
        "request_id": "r1",
        "profile": {
            "endpoint": "/v1/completions",
            "model": "m",
            "prompt_tokens": 900,
            "tokens_by": "tokenizer",
            "max_output_tokens": None,
            "stream": True,
            "unsplittable": None,
            "slo_class": "chat",
            "priority": 0,
        },
        "route": {"prefill": "p0", "decode": "d1", "why": "900 prompt tokens, at least 256"},
        "steps": [
            {"step": "split", "said": {"threshold": {"split": True, "reason": "900 tokens"}}},
            {"step": "nominate", "role": "decode", "said": {"prefix-affinity": ["d1"]}},
            {"step": "filter", "role": "decode", "said": {"capacity": ["d0", "d1"]}},
            {"step": "score", "role": "decode", "said": {"least-loaded": {"d0": 0.5, "d1": 1.0}}},
            {"step": "combined", "role": "decode", "said": {"core": {"d0": 0.5, "d1": 1.0}}},
            {"step": "chosen", "role": "decode", "said": {"core": "d1"}},
            {"step": "select", "role": "prefill", "said": {"mine": "p0"}},
            {"step": "chosen", "role": "prefill", "said": {"core": "p0"}},
        ],
        **more,
    }


def test_every_plugin_is_named_with_what_it_said() -> None:
    assert list(lines(answer())) == [
        "request r1",
        "  /v1/completions, 900 prompt tokens (tokenizer), output bound none, SLO class chat",
        "threshold says split: 900 tokens",
        "worker for decode",
        "  prefix-affinity nominates d1",
        "  capacity leaves d0, d1",
        "  least-loaded         d0 0.500  d1 1.000",
        "  combined             d0 0.500  d1 1.000",
        "  chosen: d1",
        "worker for prefill",
        "  mine takes p0",
        "  chosen: p0",
        "route: prefill on p0, decode on d1: 900 prompt tokens, at least 256",
    ]


def test_a_refusal_names_who_refused_and_for_how_long() -> None:
    refusal = {"capacity": {"refused": "all are full", "retry_after_s": 1.0}}
    steps = [{"step": "admission", "said": refusal}]
    told = list(lines(answer(route={"refused": "all are full"}, steps=steps)))
    assert told[2:] == [
        "  capacity refuses: all are full (retry after 1 s)",
        "refused: all are full",
    ]


def test_the_end_and_the_handoff_are_told() -> None:
    record = {
        "outcome": "ok", "status": 200, "ttft_s": 0.25, "tpot_s": None, "e2e_s": 1.0,
        "split": "yes",
        "handoff": {"outcome": "consumed", "tokens_loaded": 899, "transport": "shm"},
        "failures": [{"worker": "p0", "side": "prefill", "kind": "timeout", "detail": "slow"}],
    }  # fmt: skip
    assert list(lines(answer(record=record)))[-3:] == [
        "ended: ok (200), TTFT 0.250 s, in all 1.000 s",
        "handoff: consumed, 899 tokens loaded by shm; split happened: yes",
        "failed: p0, prefill, timeout: slow",
    ]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"split": "unobserved"}, "handoff: carried by the engine's own transport, which nobody"),
        ({"ended_by_prefill": True}, "handoff: none was needed, prefill ended the answer"),
    ],
)
def test_a_handoff_that_nobody_reports_of_is_told_in_words(told: dict[str, Any], said: str) -> None:
    handoff = {"outcome": "unobserved", "tokens_loaded": 0, "transport": None}
    record = {"outcome": "ok", "status": 200, "split": "no", "handoff": handoff, **told}
    assert list(lines(answer(record=record)))[-1].startswith(said)


def test_a_gateway_that_does_not_answer_is_an_error(capsys: Any) -> None:
    assert main(["explain", "r1", "--gateway", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err
