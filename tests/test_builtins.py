"""The built-in plugins obey the same contract as everybody else's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg_plugins.builtins import BUILTINS
from disagg_plugins.plugins import PluginHost
from disagg_plugins.scheduling.hooks import _score
from disagg_plugins.types import FleetView, RequestProfile, Role, Worker, WorkerLoad


def test_every_built_in_loads_and_is_trusted():
    with PluginHost.load(entry_points=False) as host:
        infos = host.describe()
        assert host.failures == ()
    assert [info.name for info in infos] == list(BUILTINS)
    assert all(info.trusted and info.state == "on" for info in infos)


def test_every_hook_with_a_caller_that_decides_has_a_built_in():
    with PluginHost.load(entry_points=False) as host:
        hooks = {hook for info in host.describe() for hook in info.hooks}
    assert {
        "disagg_select_admission",
        "disagg_select_split",
        "disagg_filter_workers",
        "disagg_score_workers",
        "disagg_select_transport",
        "disagg_register_commands",
        "disagg_register_checks",
    } <= hooks


def test_two_hosts_share_no_plugin_objects():
    with PluginHost.load(entry_points=False) as one, PluginHost.load(entry_points=False) as two:
        first, second = (h._manager.get_plugin("threshold") for h in (one, two))
    assert first is not second


COUNTS = st.integers(0, 10**9)
WORKERS = st.builds(
    Worker,
    name=st.sampled_from("abcdef"),
    url=st.sampled_from(["http://127.0.0.1:1", "http://127.0.0.1:2", "http://[::1]:1"]),
    engine=st.sampled_from(["vllm", "sglang"]),
    role=st.sampled_from(Role),
    capacity=st.integers(1, 10**6),
    labels=st.dictionaries(st.sampled_from(["host", "zone"]), st.sampled_from(["a", "b"])),
    kv_tokens=st.none() | COUNTS,
)
LOADS = st.builds(
    WorkerLoad,
    requests=COUNTS,
    prompt_tokens=COUNTS,
    output_tokens=COUNTS,
    kv_tokens=COUNTS,
    kv_usage=st.none() | st.floats(),
)
PROFILES = st.builds(
    RequestProfile,
    st.just("r"),
    st.just("/v1/completions"),
    st.just("m"),
    COUNTS,
    max_output_tokens=st.none() | COUNTS,
    session=st.none() | st.sampled_from(["s", "t"]),
    cached_tokens=st.dictionaries(st.sampled_from("abcdef"), COUNTS),
)


@given(
    PROFILES,
    st.sampled_from([Role.PREFILL, Role.DECODE]),
    st.lists(WORKERS, min_size=1, unique_by=lambda each: each.name),
    st.dictionaries(st.sampled_from("abcdef"), LOADS),
    st.none() | WORKERS,
)
def test_every_score_of_a_built_in_is_from_0_to_1(profile, role, workers, loads, other):
    """The core does not look at each of them again."""
    about = {
        "profile": profile,
        "role": role,
        "workers": workers,
        "fleet": FleetView(workers, loads),
        "other": other,
    }
    with PluginHost.load(entry_points=False) as host:
        answers = host._calls.every("disagg_score_workers", lambda answer: answer, about)
        assert not host.counts
    for _, scores in answers:
        assert type(scores) is dict
        assert scores.keys() <= {worker.name for worker in workers}
        for score in scores.values():
            _score(score)
