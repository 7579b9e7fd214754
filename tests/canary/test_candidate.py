"""Two policies that do not go together are refused at the start, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from disagg_plugins.canary.candidate import read_candidate
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy_file import read_policy

SECRET = "0123456789abcdef0123456789abcdef"


def worker(name: str, port: int) -> dict[str, object]:
    return {"name": name, "url": f"http://127.0.0.1:{port}", "role": "both"}


BASELINE = {
    "fleet": {"workers": [worker("today", 9001)]},
    "canary": {"candidate": "candidate.yaml", "store": {"path": "rollout.sqlite"}},
}
CANDIDATE = {"fleet": {"workers": [worker("split", 9002)]}}


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISAGG_SECRET", SECRET)
    monkeypatch.setenv("OTHER_SECRET", SECRET[::-1])

    def read(candidate: dict[str, object] | None, **baseline: object):
        (tmp_path / "baseline.yaml").write_text(yaml.safe_dump({**BASELINE, **baseline}))
        if candidate is not None:
            (tmp_path / "candidate.yaml").write_text(yaml.safe_dump(candidate))
        return read_candidate(read_policy(tmp_path / "baseline.yaml"))

    return read


def test_a_candidate_that_goes_with_the_baseline_is_read_with_the_plan(read) -> None:
    found = read(CANDIDATE)
    assert [w.name for w in found.loaded.policy.fleet.workers] == ["split"]
    assert found.plan.steps == (1, 5, 25, 50, 100)


def test_another_candidate_is_another_plan(read) -> None:
    changed = {**CANDIDATE, "scheduler": {"split": {"min_prompt_tokens": 512}}}
    assert read(CANDIDATE).plan.fingerprint != read(changed).plan.fingerprint


@pytest.mark.parametrize(
    ("candidate", "baseline", "problem"),
    [
        (None, {}, "there is no file"),
        ({"fleet": {"workers": [worker("today", 9002)]}}, {}, "workers of both arms are named"),
        ({**CANDIDATE, "model": "b"}, {"model": "a"}, "the arms serve different models"),
        ({**CANDIDATE, "secret": {"env": "OTHER_SECRET"}}, {}, "the arms have different secrets"),
        ({**CANDIDATE, "canary": BASELINE["canary"]}, {}, "no canary of its own"),
        ({"fleet": {"workers": []}}, {}, "no worker"),
        (
            CANDIDATE,
            {"scheduler": {"slo_classes": {"chat": {"ttft_s": 1.0}}}},
            "only one of the arms knows the SLO classes chat",
        ),
        (
            {**CANDIDATE, "telemetry": {"records": "same.jsonl"}},
            {"telemetry": {"records": "same.jsonl"}},
            "records to one file",
        ),
    ],
)
def test_what_does_not_go_together_is_told(read, candidate, baseline, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(candidate, **baseline)


CLASSES = {"slo_classes": {"chat": {"ttft_s": 1.0}}}


def with_guardrail(metric: str, **scheduler: object) -> dict[str, object]:
    canary = {**BASELINE["canary"], "guardrails": [{"metric": metric, "ratio": 0.9}]}
    return {"canary": canary, "scheduler": scheduler}


def test_a_guardrail_on_goodput_needs_an_slo_class(read) -> None:
    with pytest.raises(ConfigError, match="goodput_per_worker and no SLO class"):
        read(CANDIDATE, **with_guardrail("goodput_per_worker"))
    told = {**CANDIDATE, "scheduler": CLASSES}
    assert read(told, **with_guardrail("goodput_per_worker", **CLASSES)) is not None


@pytest.mark.parametrize("cost", [None, "cheap", "0", "-1", "nan", "inf"])
def test_goodput_per_cost_needs_the_cost_of_every_worker(read, cost: str | None) -> None:
    fleet = {"workers": [{**worker("today", 9001), "labels": {"cost": "2.5"}}]}
    labels = {} if cost is None else {"labels": {"cost": cost}}
    told = {"fleet": {"workers": [{**worker("split", 9002), **labels}]}, "scheduler": CLASSES}
    with pytest.raises(ConfigError, match=r"worker 'split' has the label cost.*what it costs an"):
        read(told, **with_guardrail("goodput_per_cost", **CLASSES), fleet=fleet)
