"""The profile is checked like the policy, and what was written can be read."""

from __future__ import annotations

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy_file import read_policy
from disagg_plugins.scheduling.prediction import Predictor
from disagg_plugins.scheduling.profile_file import Profile, profile_text, read_profile, seed
from disagg_plugins.types import IDLE, Role, Worker

TEXT = """\
version: 1
measured:
- engine: vllm
  hardware: a100
  prefill: {base_s: 0.016, per_token_s: 9.0e-5, per_token_squared_s: 6.5e-9}
  decode: {base_s: 0.02, per_request_s: 4.0e-5, per_kv_token_s: 6.0e-7}
- worker: p1
  prefill: {base_s: 1.0}
  fit: null
"""
GOOD = TEXT.replace("  fit: null\n", "")


def worker(name):
    return Worker(name, "http://127.0.0.1:1", "vllm", Role.PREFILL, labels={"hardware": "a100"})


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "profile.yaml"
        path.write_text(text)
        return path

    return write


def test_what_is_written_can_be_read(write):
    profile = read_profile(write(GOOD))
    assert read_profile(write(profile_text(profile))) == profile


def test_a_worker_goes_before_its_kind(write):
    predictor = Predictor()
    seed(predictor, read_profile(write(GOOD)))
    assert predictor.prefill_s(worker("p0"), IDLE, 1000) == pytest.approx(0.1125)
    assert predictor.prefill_s(worker("p1"), IDLE, 1000) == pytest.approx(1.0)
    assert predictor.step_s(worker("p0"), IDLE, 0) == pytest.approx(0.02004)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (TEXT, 9, "measured[1].fit"),
        (GOOD.replace("base_s: 0.016", "base_s: -1"), 5, "measured[0].prefill.base_s"),
        (GOOD.replace("base_s: 0.016", "base_s: .nan"), 5, "measured[0].prefill.base_s"),
        (GOOD.replace("- worker: p1", "- hardware: p1"), 7, "exactly one of worker and engine"),
        ("measured: []", 1, "measured"),
        ("- 1", 1, "valid dictionary"),
        (GOOD.replace("version: 1", "version: 2"), 1, "version"),
    ],
)
def test_errors_name_file_line_and_key(write, text, line, words):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        read_profile(path)
    assert f"{path}:{line}" in str(caught.value)
    assert words in str(caught.value)


def test_everything_that_is_wrong_is_told_at_once(write):
    with pytest.raises(ConfigError, match="2 things are wrong"):
        read_profile(write(GOOD.replace("0.016", "-1").replace("0.02,", "-2,")))


def test_a_large_file_or_a_missing_one_is_an_error(write, tmp_path):
    with pytest.raises(ConfigError, match="larger than"):
        read_profile(write("#" * (2 << 20)))
    with pytest.raises(ConfigError, match="no such profile"):
        read_profile(tmp_path / "none.yaml")


POLICY = """\
fleet:
  workers: [{name: d0, url: "http://127.0.0.1:9001", role: both, labels: {hardware: a100}}]
scheduler: {profile: profile.yaml}
"""


def test_a_policy_names_it_relative_to_itself_and_the_predictor_starts_from_it(write, tmp_path):
    write(GOOD)
    (tmp_path / "disagg.yaml").write_text(POLICY)
    policy = read_policy(tmp_path / "disagg.yaml").policy
    with PluginHost.load(entry_points=False) as host:
        host.start(policy)
        assert host.failures == ()
        predictor = host._manager.get_plugin("slo").predictor
        assert predictor.prefill_s(policy.fleet.workers[0].worker(), IDLE, 0) > 0


def test_a_wrong_profile_stops_the_reading_of_the_policy(write, tmp_path):
    path = write(GOOD.replace("0.016", "much"))
    (tmp_path / "disagg.yaml").write_text(POLICY)
    with pytest.raises(ConfigError, match="profile.yaml:5"):
        read_policy(tmp_path / "disagg.yaml")
    path.unlink()
    with pytest.raises(ConfigError, match="no such profile"):
        read_policy(tmp_path / "disagg.yaml")


def test_at_least_one_thing_was_measured():
    with pytest.raises(ValueError, match="measured"):
        Profile.model_validate({})
