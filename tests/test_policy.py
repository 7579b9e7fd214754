"""The policy's model, its schema, and its defaults."""

from __future__ import annotations

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from disagg_plugins.policy import MIB, Policy, load_policy, policy_schema
from disagg_plugins.types import Role

WORKERS = [
    {"name": "p", "url": "http://127.0.0.1:9001", "role": "prefill"},
    {"name": "d", "url": "http://127.0.0.1:9002", "role": "decode"},
]
SMALLEST = {"fleet": {"workers": WORKERS}}


def test_the_smallest_policy_names_only_workers():
    policy = Policy.model_validate(SMALLEST)
    worker = policy.fleet.workers[0].worker()
    assert (worker.name, worker.role, worker.engine) == ("p", Role.PREFILL, "vllm")
    assert policy.handoff.listen_host == policy.gateway.host == "127.0.0.1"
    assert policy.secret.env == "DISAGG_SECRET"


@pytest.mark.parametrize(
    ("written", "staging_bytes"),
    [
        ("512MiB", 512 * MIB),
        ("2 GiB", 2048 * MIB),
        ("2gib", 2048 * MIB),
        (MIB, MIB),
        ("1048576", MIB),
    ],
)
def test_sizes_may_have_a_unit(written, staging_bytes):
    policy = Policy.model_validate({**SMALLEST, "handoff": {"staging_bytes": written}})
    assert policy.handoff.staging_bytes == staging_bytes


@pytest.mark.parametrize("written", ["512MB", "half", "-1MiB", "1KiB", "9" * 40, 1.5, True])
def test_other_sizes_are_refused(written):
    with pytest.raises(ValidationError):
        Policy.model_validate({**SMALLEST, "handoff": {"staging_bytes": written}})


def with_events(address):
    return {"fleet": {"workers": [{**WORKERS[0], "kv_events": address}, WORKERS[1]]}}


@pytest.mark.parametrize("address", ["tcp://h:5557", "tcp://[::1]:5557", "ipc:///run/kv/p0"])
def test_an_engines_events_come_from_one_address(address):
    assert Policy.model_validate(with_events(address)).fleet.workers[0].kv_events == address


@pytest.mark.parametrize(
    "address",
    ["tcp://*:5557", "tcp://h", "http://h:1", "tcp://h:1/x", "tcp://u:p@h:1", "ipc://x", "ipc:///"],
)
def test_other_addresses_of_events_are_refused(address):
    with pytest.raises(ValidationError, match=r"kv_events"):
        Policy.model_validate(with_events(address))


def test_a_policy_does_not_change_once_read():
    policy = Policy.model_validate(SMALLEST)
    with pytest.raises(ValidationError):
        policy.handoff.lease_s = 5.0


class TestSchema:
    def test_is_valid_and_takes_what_the_model_takes(self):
        schema = policy_schema()
        jsonschema.Draft202012Validator.check_schema(schema)
        for handoff in ({}, {"staging_bytes": "512MiB"}, {"staging_bytes": MIB}):
            jsonschema.validate({**SMALLEST, "handoff": handoff}, schema)

    @pytest.mark.parametrize(
        "wrong",
        [
            {},
            {**SMALLEST, "gatway": {}},
            {**SMALLEST, "handoff": {"staging_bytes": "512MB"}},
            {**SMALLEST, "handoff": {"lease_s": 0}},
            {"fleet": {"workers": [{**WORKERS[0], "role": "prefil"}]}},
        ],
    )
    def test_refuses_what_the_model_refuses(self, wrong):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, policy_schema())

    def test_every_section_of_times_and_sizes_says_what_it_bounds(self):
        sections = policy_schema()["$defs"]
        for section in ("HandoffPolicy", "PluginPolicy"):
            for name, field in sections[section]["properties"].items():
                assert field.get("description"), f"{section}.{name}"


def test_load_policy_reads_a_file(tmp_path):
    path = tmp_path / "disagg.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    assert load_policy(path) == load_policy(str(path)) == Policy.model_validate(SMALLEST)


WORKER = {"name": "w", "url": "http://127.0.0.1:1", "role": "decode"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"fleet": {"workers": []}}, "name a file with watch"),
        ({"fleet": {"workers": [{**WORKER, "role": "prefill"}]}}, "nothing could answer"),
        ({"fleet": {"workers": [{**WORKER, "role_switch": True}]}}, "needs the role both"),
        ({"scheduler": {"rebalance": {"high": 0.4, "low": 0.4}}}, "low must be below high"),
    ],
)
def test_what_contradicts_itself_is_refused(wrong, words):
    with pytest.raises(ValidationError, match=words):
        Policy.model_validate({"fleet": {"workers": [WORKER]}, **wrong})


def test_the_workers_of_a_fleet_may_all_stand_in_a_watched_file():
    assert Policy.model_validate({"fleet": {"watch": "workers.yaml"}}).fleet.workers == []
