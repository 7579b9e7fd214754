"""The built-in plugins obey the same contract as everybody else's."""

from __future__ import annotations

from disagg_plugins.builtins import BUILTINS
from disagg_plugins.plugins import PluginHost


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
