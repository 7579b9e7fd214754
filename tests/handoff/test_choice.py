"""Which transport carries a handoff."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.errors import TransportError
from disagg_plugins.handoff.choice import choose_transport
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import PluginPolicy
from disagg_plugins.types import HandoffPair, TransportCapabilities

SHM = ("shm", TransportCapabilities(same_host=True, cross_host=False))
TCP = ("tcp", TransportCapabilities(same_host=True, cross_host=True))
HERE = HandoffPair(True, "f" * 16, "f" * 16, 1 << 20)
THERE = HandoffPair(False, "f" * 16, "f" * 16, 1 << 20)


def choose(pair, offered, preference, answer=None):
    mine = SimpleNamespace(disagg_select_transport=hookimpl(lambda: answer))
    with PluginHost.load(
        PluginPolicy(deadline_s=10), entry_points=False, extra=[("mine", mine)]
    ) as host:
        return choose_transport(host, pair, offered, preference), host.counts


@pytest.mark.parametrize(
    ("pair", "preference", "chosen"),
    [
        (HERE, ["shm", "tcp"], "shm"),
        (HERE, ["tcp", "shm"], "tcp"),
        (THERE, ["shm", "tcp"], "tcp"),
        (HERE, ["nixl", "tcp"], "tcp"),
    ],
)
def test_the_first_of_the_policy_that_reaches_the_peer_is_chosen(pair, preference, chosen):
    assert choose(pair, [TCP, SHM], preference) == (chosen, {})


def test_a_plugin_chooses_among_what_is_possible():
    assert choose(HERE, [TCP, SHM], ["shm", "tcp"], answer="tcp") == ("tcp", {})


def test_a_plugin_cannot_choose_what_does_not_reach_the_peer():
    chosen, counts = choose(THERE, [TCP, SHM], ["shm", "tcp"], answer="shm")
    assert chosen == "tcp"
    assert counts == {("mine", "disagg_select_transport", "nonsense"): 1}


@pytest.mark.parametrize(("offered", "preference"), [([], ["tcp"]), ([TCP], ["shm"])])
def test_no_common_transport_is_an_error_with_both_lists(offered, preference):
    with pytest.raises(TransportError, match=f"the policy allows {preference[0]}"):
        choose(HERE, offered, preference)


def test_two_hosts_with_shared_memory_only_is_an_error():
    with pytest.raises(TransportError, match="on two hosts share shm"):
        choose(THERE, [SHM], ["shm"])
