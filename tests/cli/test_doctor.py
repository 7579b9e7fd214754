from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.cli.doctor import run_check
from disagg_plugins.cli.main import main
from disagg_plugins.testing.fake_engine import FakeEngine

SECRET = {"DISAGG_SECRET": "0123456789abcdef-for-tests"}


def test_every_group_is_reported_and_a_ready_fleet_exits_with_zero(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    with FakeEngine() as p0, FakeEngine() as d0:
        done = disagg("doctor", write_policy((p0.url, d0.url)), env=SECRET)
    assert done.returncode == 0, done.stdout
    assert "environment\n" in done.stdout
    assert "workers\n  ok       p0: runs at" in done.stdout


def test_problem_exits_with_one_and_tells_the_fix(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = write_policy(launch={"model": "m", "python": "no/python"})
    done = disagg("doctor", path, "--json", env=SECRET)
    assert done.returncode == 1
    problems = [f for f in json.loads(done.stdout)["vllm"] if f["level"] == "problem"]
    assert {f["subject"] for f in problems} == {"interpreter of p0", "interpreter of d0"}
    assert all(f["fix"] for f in problems)


def test_workers_whose_engine_carries_its_handoffs_stage_nothing(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = write_policy(handoff={"staging_bytes": 1 << 50})
    path.write_text(path.read_text().replace("name: p0", "name: p0\n    engine: trtllm-native"))
    done = disagg("doctor", path, "--json", env=SECRET)
    (memory,) = [f for f in json.loads(done.stdout)["environment"] if f["subject"] == "memory"]
    assert memory["level"] == "ok"
    assert "no worker here stages KV" in memory["detail"]


@pytest.mark.parametrize(
    ("engines", "rule", "levels"),
    [
        (("vllm", "trtllm-native"), "threshold", ["problem"]),
        (("vllm", "trtllm-native"), "never", []),
        (("trtllm-native", "trtllm-native"), "threshold", []),
        (("vllm", "vllm", "trtllm-native"), "threshold", ["warning"]),
    ],
)
def test_pairs_of_engines_that_cannot_hand_over_to_each_other_are_named(
    disagg: Any,
    write_policy: Callable[..., Path],
    engines: tuple[str, ...],
    rule: str,
    levels: list[str],
) -> None:
    path = write_policy(scheduler={"split": {"rule": rule}})
    said = yaml.safe_load(path.read_text())
    p0, d0 = said["fleet"]["workers"]
    d1 = {**d0, "name": "d1", "url": "http://127.0.0.1:9"}
    workers = [{**w, "engine": e} for w, e in zip((p0, d0, d1), engines, strict=False)]
    path.write_text(yaml.safe_dump({**said, "fleet": {"workers": workers}}))
    done = disagg("doctor", path, "--json", env=SECRET)
    found = [f for f in json.loads(done.stdout)["workers"] if f["subject"] == "pairs"]
    assert [f["level"] for f in found] == levels
    assert all("trtllm-native hands over by its own means" in f["detail"] for f in found)
    assert all(f["fix"] for f in found)


def test_live_alone_asks_only_the_gateway(disagg: Any, free_port: Callable[[], int]) -> None:
    done = disagg("doctor", "--live", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert done.stdout.startswith("gateway\n  PROBLEM  gateway: ")


def test_live_without_a_url_asks_the_gateway_of_the_policy(
    write_policy: Callable[..., Path], free_port: Callable[[], int], capsys: Any
) -> None:
    port = free_port()
    path = write_policy(gateway={"port": port})
    assert main(["doctor", str(path), "--live", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["gateway"]
    assert finding["detail"].startswith(f"http://127.0.0.1:{port} does not answer")


@pytest.mark.parametrize("given", [["--live"], ["--live", "disagg.yaml"]])
def test_live_of_no_gateway_is_an_error_that_names_both_ways(given: list[str], capsys: Any) -> None:
    assert main(["doctor", *given]) == 2
    assert "disagg doctor disagg.yaml --live" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["baseline", "candidate"])
@pytest.mark.parametrize("policy", [[], ["disagg.yaml"]])
def test_an_arm_without_live_is_refused(policy: list[str], arm: str, capsys: Any) -> None:
    assert main(["doctor", *policy, "--arm", arm]) == 2
    told = capsys.readouterr()
    assert "--arm: without --live no gateway is asked" in told.err
    assert told.out == ""


def test_check_that_raises_is_a_problem_and_stops_nothing() -> None:
    class Raising:
        name = "raising"

        def run(self, context: CheckContext) -> Sequence[Finding]:
            raise RuntimeError("oops")

    (finding,) = run_check(Raising(), CheckContext())
    assert finding.level is Level.PROBLEM
    assert "raised RuntimeError: oops" in finding.detail
