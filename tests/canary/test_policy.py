"""The section ``canary`` of the policy file."""

from __future__ import annotations

from datetime import datetime

import pytest

from disagg_plugins.canary.assignment import Match
from disagg_plugins.canary.freeze import DateFreeze, WeeklyFreeze, zone_named
from disagg_plugins.canary.metrics import METRICS
from disagg_plugins.canary.policy import CanaryPolicy
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy_file import read_policy

HEAD = """\
version: 1
fleet:
  workers:
    - {name: w, url: "http://127.0.0.1:9001", role: both}
canary:
  candidate: candidate.yaml
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef")

    def read(more=""):
        path = tmp_path / "disagg.yaml"
        path.write_text(HEAD + "".join(f"  {line}\n" for line in more.splitlines()))
        return read_policy(path)

    return read


def test_without_the_section_there_is_no_canary(tmp_path):
    path = tmp_path / "disagg.yaml"
    path.write_text(HEAD.partition("canary:")[0])
    assert read_policy(path).policy.canary is None


def test_a_candidate_is_enough(read):
    canary = read().policy.canary
    assert canary is not None
    assert canary.steps == (1, 5, 25, 50, 100)
    assert canary.plan(b"").steps == canary.steps
    assert not canary.plan(b"").approval
    assert any(g.required for g in canary.guardrails)
    assert any(g.limit is not None for g in canary.guardrails)


def test_everything_can_be_said(read):
    canary = read(
        """\
steps: [10, 100]
bake_s: 30
approval: manual
freeze:
  - {days: [fri, sat], begin: 18:00, end: "08:00", zone: Europe/Berlin}
  - {first: 2026-12-20, last: 2027-01-02}
horizon_s: 120
level: 0.01
guardrails:
  - {metric: ttft, quantile: 0.9, ratio: 1.5, slack: 0.1, min_samples: 10}
  - {metric: split_share, better: higher, required: false}
  - {metric: error_rate, limit: 0.02}
store: {path: memory.sqlite, name: prod, lease_s: 30, busy_s: 2}
sticky: prefix
rules:
  - {header: {name: X-Canary, value: "1"}, arm: candidate}
  - {model: big, tenant: bank, arm: baseline}
shadow: {share: 0.1, max_in_flight: 2, timeout_s: 20, max_per_s: 1}"""
    ).policy.canary
    assert canary is not None
    plan = canary.plan(b"")
    assert (plan.steps, plan.bake_s, plan.approval) == ((10, 100), 30.0, True)
    weekly, dates = plan.freezes
    assert isinstance(weekly, WeeklyFreeze)
    assert isinstance(dates, DateFreeze)
    evening = datetime(2026, 11, 27, 18, 30, tzinfo=zone_named("Europe/Berlin"))
    assert plan.frozen(evening.timestamp()) == "fri, sat from 18:00 to 08:00 (Europe/Berlin)"
    assert canary.guardrails[0].guardrail().name == "ttft p90"
    assert canary.rules[0].header is not None
    assert canary.rules[0].header.name == "x-canary"


@pytest.mark.parametrize(
    ("more", "key", "words"),
    [
        ("steps: [5, 5, 100]", "canary.steps", "grow"),
        ("steps: [1, 50]", "canary.steps", "last step must be 100"),
        ("steps: [0, 100]", "canary.steps", "from 1"),
        ("steps: []", "canary.steps", "between 1 and 100"),
        ("bake_s: -1", "canary.bake_s", "greater than or equal"),
        ("level: 0.6", "canary.level", "less than"),
        ("approval: maybe", "canary.approval", "automatic"),
        ("sticky: cookie", "canary.sticky", "session"),
        ("look_s: 20", "canary", "lease_s"),
        ("guardrails: [{metric: latency}]", "guardrails[0]", "known: abandonment"),
        ("guardrails: [{metric: ttft}]", "guardrails[0]", "name a quantile"),
        ("guardrails: [{metric: error_rate, quantile: 0.5}]", "guardrails[0]", "mean only"),
        ("guardrails: [{metric: split_share}]", "guardrails[0]", "lower or higher"),
        ("guardrails: [{metric: error_rate, limit: 1, slack: 1}]", "guardrails[0]", "limit"),
        ("guardrails: []", "canary", "no guardrail is required"),
        ("guardrails: [{metric: error_rate}, {metric: error_rate}]", "canary", "named twice"),
        ("freeze: [{days: [mon], zone: Mars/Olympus}]", "freeze[0]", "Europe/Berlin"),
        ("freeze: [{zone: UTC}]", "freeze[0]", "either days"),
        ("freeze: [{days: [mon], first: 2026-01-01, last: 2026-01-02}]", "freeze[0]", "either"),
        ("freeze: [{first: 2026-01-01}]", "freeze[0]", "either days"),
        ("freeze: [{first: 2026-01-02, last: 2026-01-01}]", "freeze[0]", "before"),
        ("freeze: [{first: 2026-01-01, last: 2026-01-02, begin: 08:00}]", "freeze[0]", "whole"),
        ("freeze: [{days: [mon], begin: 25:00}]", "begin", "18:00"),
        ("freeze: [{days: [monday]}]", "days[0]", "mon"),
        ("rules: [{arm: candidate}]", "rules[0]", "at least one"),
        ("rules: [{tenant: t, arm: shadow}]", "rules[0].arm", "candidate"),
        ("rules: [{header: {name: 'a b', value: v}, arm: candidate}]", "header.name", "pattern"),
        ("shadow: {}", "canary.shadow.share", "missing"),
        ("shadow: {share: 2}", "canary.shadow.share", "less than"),
        ("shadow: {share: 1, headers: [Cookie]}", "canary.shadow.headers", "carries secrets"),
        ("shadow: {share: 1, headers: [host]}", "canary.shadow.headers", "gateway itself"),
        ("shadow: {share: 1, control: 2}", "canary.shadow.control", "less than"),
        ("shadow: {share: 1, parity: {margin: 0}}", "canary.shadow.parity.margin", "greater"),
        (
            "shadow: {share: 1, parity: {prompt_tokens: [9, 9]}}",
            "canary.shadow.parity.prompt_tokens",
            "must grow",
        ),
        ("store: {path: a, postgres: {env: DSN}}", "canary.store", "one of path and postgres"),
        ("store: {lease_s: 0}", "canary.store.lease_s", "greater"),
        ("stepz: [100]", "canary.stepz", "did you mean steps"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(read, more, key, words):
    with pytest.raises(ConfigError) as caught:
        read(more)
    assert key in str(caught.value)
    assert words in str(caught.value)


def test_an_unknown_metric_lists_all_there_are(read):
    with pytest.raises(ConfigError) as caught:
        read("guardrails: [{metric: latency}]")
    assert all(name in str(caught.value) for name in METRICS)


@pytest.mark.parametrize(
    "more",
    [
        "store: postgresql://u:hunter2hunter2@db/x",
        "store: {path: 'postgresql://u:hunter2hunter2@db/x'}",
        "store: {path: 'host=db password=hunter2hunter2'}",
        "store: {postgres: 'postgresql://u:hunter2hunter2@db/x'}",
        "store: {postgres: {env: 'postgresql://u:hunter2hunter2@db/x'}}",
        "rules: [{header: {name: Authorization, value: hunter2hunter2}, arm: candidate}]",
        "rules: [{header: {name: x-api-key, value: hunter2hunter2}, arm: candidate}]",
    ],
)
def test_a_secret_in_plain_sight_is_an_error_that_does_not_repeat_it(read, more):
    with pytest.raises(ConfigError) as caught:
        read(more)
    assert "hunter2" not in f"{caught.value} {caught.value!r}"


def test_other_evidence_is_needed_for_another_candidate_or_other_guardrails():
    one = CanaryPolicy.model_validate({"candidate": "c.yaml"})
    same = CanaryPolicy.model_validate({"candidate": "d.yaml", "bake_s": 5, "approval": "manual"})
    other = CanaryPolicy.model_validate({"candidate": "c.yaml", "level": 0.04})
    assert one.plan(b"a").fingerprint == same.plan(b"a").fingerprint
    assert len({one.plan(b"a").fingerprint, one.plan(b"b").fingerprint}) == 2
    assert one.plan(b"a").fingerprint != other.plan(b"a").fingerprint


def test_rules_and_copies_are_told_to_those_who_decide(read):
    canary = read(
        """\
rules:
  - {model: m, tenant: t, header: {name: X-Team, value: core}, arm: candidate}
shadow: {share: 0.1, headers: [X-Team], parity: {prompt_tokens: [1024]}}"""
    ).policy.canary
    assert canary.rules[0].match() == Match("candidate", "m", "t", ("x-team", "core"))
    assert canary.shadow.headers == ["x-team"]
    budget = canary.shadow.budget()
    assert (budget.share, budget.control, budget.max_in_flight) == (0.1, 0.5, 8)
    assert canary.shadow.parity.allowed().buckets == (
        "prompts below 1024 tokens",
        "prompts of 1024 and more tokens",
    )
