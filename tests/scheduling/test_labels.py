"""Tenants that need certain workers."""

from __future__ import annotations

from disagg_plugins.scheduling.labels import Labels
from disagg_plugins.types import RequestProfile, Role, Worker

EU = Worker("eu", "http://127.0.0.1:1", "vllm", Role.BOTH, labels={"zone": "eu", "gpu": "h100"})
US = Worker("us", "http://127.0.0.1:2", "vllm", Role.BOTH, labels={"zone": "us"})
BARE = Worker("bare", "http://127.0.0.1:3", "vllm", Role.BOTH)


def kept(required, tenant):
    plugin = Labels()
    plugin.required = required
    profile = RequestProfile("r", "/v1/completions", "m", 400, tenant=tenant)
    left = plugin.disagg_filter_workers(profile, [EU, US, BARE])
    return None if left is None else [w.name for w in left]


def test_a_tenants_workers_carry_all_its_labels():
    required = {"bank": {"zone": "eu", "gpu": "h100"}, "*": {"zone": "us"}}
    assert kept(required, "bank") == ["eu"]
    assert kept(required, "shop") == ["us"]
    assert kept(required, None) == ["us"]


def test_a_tenant_that_needs_nothing_goes_anywhere():
    assert kept({"bank": {}, "*": {"zone": "us"}}, "bank") is None
    assert kept({"bank": {"zone": "eu"}}, "shop") is None
    assert kept({}, "bank") is None
