from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SECRET = {"DISAGG_SECRET": "0123456789abcdef-for-tests"}


def test_right_policy_is_said_to_be_right(disagg: Any, write_policy: Callable[..., Path]) -> None:
    done = disagg("policy", "check", write_policy(), env=SECRET)
    assert done.returncode == 0
    assert "right; 2 workers: p0 (prefill), d0 (decode)" in done.stdout
    assert done.stderr == ""


def test_typo_is_an_error_with_file_line_and_key(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = write_policy(handof={"lease_s": 3})
    done = disagg("policy", "check", path, env=SECRET)
    assert done.returncode == 2
    assert f"disagg: error: {path}:" in done.stderr
    assert "handof: unknown key" in done.stderr
    assert "did you mean handoff?" in done.stderr
    assert "Traceback" not in done.stderr


def test_file_that_is_not_there_is_an_error(disagg: Any, tmp_path: Path) -> None:
    done = disagg("policy", "check", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "none.yaml" in done.stderr


def test_warning_is_told_and_fails_a_strict_check(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = write_policy(gateway={"host": "0.0.0.0", "port": 18999})
    relaxed = disagg("policy", "check", path, env=SECRET)
    strict = disagg("policy", "check", "--strict", path, env=SECRET)
    assert (relaxed.returncode, strict.returncode) == (0, 1)
    assert "warning: gateway.host is 0.0.0.0" in relaxed.stderr


def test_policy_is_explained_in_words(disagg: Any, write_policy: Callable[..., Path]) -> None:
    done = disagg("policy", "explain", write_policy(), env=SECRET)
    assert done.returncode == 0
    assert "reads prompts" in done.stdout


def engines(path: Path, *named: str) -> Path:
    """Give the workers of a policy engines."""
    said = yaml.safe_load(path.read_text())
    for worker, engine in zip(said["fleet"]["workers"], named, strict=True):
        worker["engine"] = engine
    path.write_text(yaml.safe_dump(said))
    return path


def test_a_pair_that_the_gateway_would_refuse_is_refused(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = engines(write_policy(), "vllm", "trtllm-native")
    done = disagg("policy", "check", path, env=SECRET)
    assert done.returncode == 2
    assert (
        "trtllm-native hands over by its own means, to trtllm-native only: p0 is vllm, d0 is "
        "trtllm-native"
    ) in done.stderr
    assert f"{path}: fleet.workers: " in done.stderr
    assert "right;" not in done.stdout


def with_candidate(path: Path, *named: str) -> Path:
    """Return a baseline whose candidate is the policy at ``path``, with these engines."""
    candidate = engines(path, *named).rename(path.with_name("candidate.yaml"))
    said = yaml.safe_load(candidate.read_text())
    for worker in said["fleet"]["workers"]:
        del worker["engine"]
        worker["name"] = f"today-{worker['name']}"
    path.write_text(yaml.safe_dump({**said, "canary": {"candidate": candidate.name}}))
    return path


def test_pairs_of_the_candidate_that_its_gateway_would_refuse_are_refused(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = with_candidate(write_policy(), "vllm", "trtllm-native")
    done = disagg("policy", "check", path, env=SECRET)
    assert done.returncode == 2
    assert f"{path.with_name('candidate.yaml')}: fleet.workers: " in done.stderr
    assert "p0 is vllm, d0 is trtllm-native" in done.stderr
    assert "right;" not in done.stdout


def test_a_candidate_that_does_not_go_with_the_baseline_is_refused(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = with_candidate(write_policy(), "vllm", "vllm")
    said = yaml.safe_load(path.with_name("candidate.yaml").read_text())
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "fleet": said["fleet"]}))
    done = disagg("policy", "check", path)
    assert done.returncode == 2
    assert "workers of both arms are named d0, p0" in done.stderr
    assert "right;" not in done.stdout


def test_what_is_odd_in_the_candidates_fleet_is_told_and_fails_a_strict_check(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = with_candidate(write_policy(), "vllm", "vlm")
    done = disagg("policy", "check", path, env=SECRET)
    assert done.returncode == 0
    assert "warning: the candidate: fleet.workers names the engine 'vlm'" in done.stderr
    assert disagg("policy", "check", "--strict", path, env=SECRET).returncode == 1


def test_a_candidate_that_is_right_is_not_told_of(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    done = disagg("policy", "check", with_candidate(write_policy(), "vllm", "vllm"), env=SECRET)
    assert done.returncode == 0
    assert "the candidate:" not in done.stderr


def test_a_candidate_that_is_not_there_is_a_warning(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    done = disagg("policy", "check", write_policy(canary={"candidate": "no.yaml"}), env=SECRET)
    assert done.returncode == 0
    assert "canary.candidate: there is no file" in done.stderr


def test_an_engines_own_transport_is_explained(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = engines(write_policy(), "trtllm-native", "trtllm-native")
    done = disagg("policy", "explain", path, env=SECRET)
    assert "the engine's own transport" in done.stdout
    assert "shm" not in done.stdout


def test_schema_accepts_what_check_accepts(disagg: Any, write_policy: Callable[..., Path]) -> None:
    schema = json.loads(disagg("policy", "schema").stdout)
    jsonschema.validate(yaml.safe_load(write_policy().read_text()), schema)


def test_names_that_no_plugin_offers_are_told_and_fail_a_strict_check(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = write_policy(
        handoff={"transports": ["shmm", "tcp"]}, plugins={"settings": {"keep-whle": {}}}
    )
    done = disagg("policy", "check", path, env=SECRET)
    assert done.returncode == 0
    assert "handoff.transports names the transport 'shmm'" in done.stderr
    assert "plugins.settings names the plugin 'keep-whle'" in done.stderr
    assert disagg("policy", "check", "--strict", path, env=SECRET).returncode == 1


def test_weight_of_a_scorer_that_nobody_is_is_told_and_fails_a_strict_check(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    weights = {"prefix-afinity": 2, "threshold": 1, "kv-room": 1}
    path = write_policy(scheduler={"weights": weights})
    done = disagg("policy", "check", path, env=SECRET)
    assert done.returncode == 0
    assert "scheduler.weights names the scorer 'prefix-afinity'" in done.stderr
    assert "did you mean 'prefix-affinity'?" in done.stderr
    # a plugin, but none that scores: its weight is as idle as a misspelt one
    assert "scheduler.weights names the scorer 'threshold'" in done.stderr
    assert "scorer 'kv-room'" not in done.stderr
    assert disagg("policy", "check", "--strict", path, env=SECRET).returncode == 1


def test_what_an_engine_makes_of_a_role_is_told_and_fails_a_strict_check(
    disagg: Any, write_policy: Callable[..., Path]
) -> None:
    path = write_policy()
    policy = yaml.safe_load(path.read_text())
    policy["fleet"]["workers"][0].update(role="both", role_switch=True)
    path.write_text(yaml.safe_dump(policy))
    done = disagg("policy", "check", path, env=SECRET)
    assert done.returncode == 0
    assert "role_switch of worker p0 has no effect" in done.stderr
    assert disagg("policy", "check", "--strict", path, env=SECRET).returncode == 1
