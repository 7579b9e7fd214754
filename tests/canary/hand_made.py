"""A canary's document made by hand, with every part filled."""

from __future__ import annotations

from typing import Any

NOW_S = 1_790_000_000.0


def figure(estimate: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    return {"estimate": estimate, "low": low, "high": high, "count": 120, "worth": 90.5}


def made_document(text: str = "plain") -> dict[str, Any]:
    """Return a document of a rollout that runs at 1 %; ``text`` stands for others' words."""
    ours, theirs = figure(0.2, 0.1875, 0.23), figure(0.21, 0.125, None)
    return {
        "now_s": NOW_S,
        "canary": "default",
        "candidate": text,
        "gateway": text,
        "may_act": True,
        "plan": {
            "steps": [1, 25, 100],
            "bake_s": 600.0,
            "approval": "manual",
            "level": 0.05,
            "frozen": None,
        },
        "progress": {
            "rollout": 1,
            "phase": "running",
            "step": 0,
            "weight": 1,
            "baked_s": 12.0,
            "why": "",
        },
        "weight_here": 1,
        "leads": True,
        "lacks": [text],
        "trouble": text,
        "arms": {
            arm: {
                "model": text,
                "requests": 1000,
                "in_flight": 2,
                "workers": [
                    {"name": f"{arm}-0 {text}", "role": "decode", "healthy": False, "reason": text}
                ],
                "split": {"routed": 40, "happened": 39, "ended_by_prefill": 1},
            }
            for arm in ("baseline", "candidate")
        },
        "counted": {"baseline": 1000, "candidate": 12, "skipped": 3},
        "guardrails": [
            {
                "name": name,
                "metric": "ttft",
                "unit": "s",
                "answer": "open",
                "required": True,
                "baseline": ours,
                "candidate": theirs,
                "allowed": 0.25,
                "reason": text,
            }
            for name in ("ttft p50", "ttft p95")
        ],
        "parity": {
            "answer": "open",
            "pairs": {"baseline": 10, "candidate": 12},
            "lost": {"baseline": 0, "candidate": 7},
            "findings": [
                {
                    "aspect": "different",
                    "bucket": text,
                    "answer": "open",
                    "required": True,
                    "baseline": figure(0.0625, 0.0, 0.5),
                    "candidate": figure(0.09375, 0.0, 0.75),
                    "allowed": text,
                    "reason": text,
                }
            ],
        },
        "history": [
            {
                "at_s": NOW_S - 60 + 30 * i,
                "rollout": 1,
                "weight": 1,
                "figures": {
                    name: {
                        "baseline": [0.2, 0.1, 0.3],
                        "candidate": [0.21, 0.05, None],
                        "allowed": 0.25,
                    }
                    for name in ("ttft p50", "ttft p95")
                },
            }
            for i in range(3)
        ],
        "distributions": {
            "ttft": {
                "unit": "s",
                "edges": [0.1, 0.2, 0.4],
                "baseline": [900, 100],
                "candidate": [5, 7],
            }
        },
        "shadow": {
            "in_flight": 1,
            "copied": {"baseline": 5, "candidate": 6},
            "skipped": {text: 100},
            "pairs": 10,
            "ttft_ratio_p50": 1.0234,
            "e2e_ratio_p50": None,
        },
        "decisions": [
            {
                "number": 1,
                "rollout": 1,
                "at_s": NOW_S - 90,
                "kind": "start",
                "by": text,
                "from_phase": "pending",
                "to_phase": "running",
                "from_weight": 0,
                "to_weight": 1,
                "step": 0,
                "baked_s": 0.0,
                "why": [text],
            }
        ],
    }
