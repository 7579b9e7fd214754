"""The plugin host: what it loads, what it refuses, and how bad plugins are kept apart."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg_plugins import hookimpl
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import PluginPolicy, Policy
from disagg_plugins.types import (
    FleetView,
    HandoffEvent,
    HandoffId,
    RequestProfile,
    Role,
    SplitDecision,
    TransportCapabilities,
    Worker,
)

ROOT = Path(__file__).resolve().parents[1]
PROFILE = RequestProfile("r1", "/v1/completions", "m", 900)
WORKERS = (
    Worker("a", "http://127.0.0.1:9001", "vllm", Role.DECODE),
    Worker("b", "http://127.0.0.1:9002", "vllm", Role.DECODE),
)
FLEET = FleetView(WORKERS, {})
YES = SplitDecision(True, "yes")
SLOW_MACHINE_S = 10.0


def plugin(**hooks):
    """Return a plugin object with each function marked as the hook it is named for."""
    return SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})


@pytest.fixture
def load():
    hosts = []

    def load(*plugins, builtins=False, **policy):
        policy = {"deadline_s": SLOW_MACHINE_S, **policy}
        named = [p if isinstance(p, tuple) else (f"p{i}", p) for i, p in enumerate(plugins)]
        host = PluginHost.load(
            PluginPolicy(**policy), builtins=builtins, entry_points=False, extra=named
        )
        hosts.append(host)
        return host

    yield load
    for host in hosts:
        host.close()


def eventually(condition, within_s=SLOW_MACHINE_S):
    end_s = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end_s, "did not happen in time"
        pause.wait(0.002)


def test_a_hook_may_stand_under_a_private_name(load) -> None:
    hidden = hookimpl(specname="disagg_register_dialects")(lambda: [])
    host = load(SimpleNamespace(__dialects=hidden))
    assert host.failures == ()
    assert [info.hooks for info in host.describe()] == [("disagg_register_dialects",)]


class Bound:
    """A class whose hook is a method; the host makes the instance."""

    @hookimpl
    def disagg_select_split(self, profile):
        return YES


class TestThirdPartyDistribution:
    @pytest.fixture(scope="class")
    @staticmethod
    def seen(tmp_path_factory):
        path = ROOT / "tests" / "plugins" / "install.py"
        spec = importlib.util.spec_from_file_location("plugin_install", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        target = tmp_path_factory.mktemp("site") / "packages"
        module.install(target)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{target}"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "plugins" / "decide.py")],
            env=environment,
            cwd=target.parent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    def test_decides(self, seen):
        decisions = seen[0]["decisions"]
        assert decisions["batch"][:2] == ["Local", "example: batch tenants stay local"]
        assert decisions["web"][0] == "Disaggregated"

    def test_scores_of_ten_lines_change_where_requests_go(self, seen):
        assert seen[0]["chosen"] == {"0": ["d2", "d3"], "10": ["d3"]}

    def test_filters_a_worker_out(self, seen):
        assert "d1" not in {d[2] for d in seen[0]["decisions"].values()}

    def test_is_listed_with_distribution_and_version(self, seen):
        assert seen[0]["plugins"]["example"] == ["disagg-example-plugin", "1.2.3", "on", ""]

    def test_with_a_broken_import_is_named_and_stops_nobody(self, seen):
        *_, state, problem = seen[0]["plugins"]["example-broken"]
        assert state == "failed"
        assert "ModuleNotFoundError" in problem
        assert "example-broken" in seen[1]

    def test_with_a_misspelt_hook_is_refused_with_the_right_name(self, seen):
        *_, state, problem = seen[0]["plugins"]["example-misspelt"]
        assert state == "failed"
        assert "did you mean disagg_select_split?" in problem


class TestLoading:
    def test_built_ins_come_through_the_same_host_and_are_asked_last(self, load):
        host = load(plugin(disagg_select_split=lambda: YES), builtins=True)
        assert host.failures == ()
        names = [info.name for info in host.describe()]
        assert names[0] == "p0"
        assert "threshold" in names
        assert host.scheduler.select_split(PROFILE, FLEET) == YES

    def test_third_parties_are_asked_in_alphabetical_order(self, load):
        asked = []
        plugins = [
            (name, plugin(disagg_select_split=lambda name=name, **_: asked.append(name)))
            for name in ("c", "a", "b")
        ]
        host = load(*plugins)
        host.scheduler.select_split(PROFILE, FLEET)
        assert asked == ["a", "b", "c"]

    def test_a_class_is_instantiated(self, load):
        assert load(Bound).scheduler.select_split(PROFILE, FLEET) == YES

    def test_a_disabled_plugin_is_not_loaded_and_a_typo_in_its_name_is_told(self, load, caplog):
        host = load(("mine", Bound), disabled=["mine", "mime"])
        assert host.scheduler.select_split(PROFILE, FLEET) is None
        assert [info.state for info in host.describe()] == ["disabled"]
        assert "did you mean 'mine'?" in caplog.text

    def test_an_import_that_hangs_is_left_behind(self, load):
        gate = threading.Event()

        class Hangs:
            def __init__(self):
                gate.wait(SLOW_MACHINE_S)

        host = load(Hangs, Bound, start_s=0.05)
        gate.set()
        assert [failure.plugin for failure in host.failures] == ["p0"]
        assert "plugins.start_s" in str(host.failures[0])
        assert host.scheduler.select_split(PROFILE, FLEET) == YES

    def test_two_plugins_of_one_name_are_a_failure_not_silence(self, load):
        host = load(("x", plugin(disagg_select_split=lambda: YES)), ("x", Bound))
        assert [str(failure) for failure in host.failures if "name is taken" in str(failure)]
        assert [info.state for info in host.describe()] == ["on", "failed"]
        assert host.scheduler.select_split(PROFILE, FLEET) == YES

    def test_one_object_under_two_names_is_a_failure(self, load):
        bound = Bound()
        host = load(("x", bound), ("y", bound))
        assert len(host.failures) == 1
        assert "the same object as plugin" in str(host.failures[0])

    def test_a_built_in_cannot_be_shadowed(self, load):
        host = load(("threshold", Bound), builtins=True)
        assert [failure.plugin for failure in host.failures] == ["threshold"]
        assert host.scheduler.select_split(PROFILE, FLEET) != YES


async def async_hook(profile):
    return YES


def generator_hook(profile):
    yield YES


def default_hook(profile=None):
    return YES


def foreign_argument_hook(profile, weather):
    return YES


class Wrapper:
    @hookimpl(wrapper=True)
    def disagg_select_split(self):
        return (yield)


class OldWrapper:
    @hookimpl(hookwrapper=True)
    def disagg_select_split(self):
        yield


class Unmarked:
    def disagg_select_split(self, profile):
        return YES


class Newer(Bound):
    requires_hookspec = 99


class Raises:
    def __init__(self):
        raise RuntimeError("no licence")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (plugin(disagg_select_split=async_hook), "async"),
        (plugin(disagg_select_split=generator_hook), "generator"),
        (plugin(disagg_select_split=default_hook), "defaults"),
        (plugin(disagg_select_split=foreign_argument_hook), "weather"),
        (plugin(disagg_select_spilt=lambda: YES), "did you mean disagg_select_split?"),
        (Wrapper, "wrapper"),
        (OldWrapper, "wrapper"),
        (Unmarked, "not marked"),
        (SimpleNamespace(), "no hooks"),
        (Newer, "upgrade"),
        (Raises, "no licence"),
    ],
)
def test_a_plugin_that_breaks_the_rules_is_refused_and_the_others_work(load, bad, words):
    host = load(("bad", bad), ("good", Bound))
    assert [failure.plugin for failure in host.failures] == ["bad"]
    assert words in str(host.failures[0])
    assert host.scheduler.select_split(PROFILE, FLEET) == YES


def raising(error):
    def hook():
        raise error

    return hook


class TestIsolation:
    @pytest.mark.parametrize(
        ("error", "words"), [(ValueError("bad luck"), "bad luck"), (SystemExit(3), "SystemExit")]
    )
    def test_a_plugin_that_raises_is_named_counted_and_skipped(self, load, caplog, error, words):
        bad = plugin(disagg_select_split=raising(error))
        host = load(("bad", bad), ("good", Bound))
        for _ in range(3):
            assert host.scheduler.select_split(PROFILE, FLEET) == YES
        assert host.counts == {("bad", "disagg_select_split", "raised"): 3}
        error = host.errors[0]
        assert (error.plugin, error.hook) == ("bad", "disagg_select_split")
        assert words in str(error)
        assert len([r for r in caplog.records if "'bad'" in r.getMessage()]) == 1

    def test_a_trusted_plugin_that_raises_is_skipped_too(self, load, monkeypatch):
        from disagg_plugins.scheduling.threshold import Threshold

        broken = staticmethod(hookimpl(raising(ValueError("bad luck"))))
        monkeypatch.setattr(Threshold, "disagg_select_split", broken)
        host = load(builtins=True)
        others = {"always", "never", "load", "slo"}
        assert host.scheduler.select_split(PROFILE, FLEET, without=others) is None
        assert ("threshold", "disagg_select_split", "raised") in host.counts

    @pytest.mark.parametrize(
        ("hook", "answer", "words"),
        [
            ("disagg_select_split", True, "not SplitDecision"),
            ("disagg_select_admission", "go away", "not Refusal"),
            ("disagg_filter_workers", 3, "not a list"),
            ("disagg_filter_workers", "ab", "not a list"),
            ("disagg_filter_workers", ["a"], "a str among"),
            ("disagg_filter_workers", [Worker("z", "u", "e", Role.DECODE)], "'z'"),
            ("disagg_score_workers", [0.5], "not a mapping"),
            ("disagg_score_workers", {"a": 1.5}, "outside 0 to 1"),
            ("disagg_score_workers", {"a": float("nan")}, "outside 0 to 1"),
            ("disagg_score_workers", {"a": True}, "not a number"),
            ("disagg_score_workers", {"a": "high"}, "not a number"),
            ("disagg_score_workers", {"z": 0.5}, "'z'"),
            ("disagg_select_worker", "z", "'z'"),
            ("disagg_score_queue", -0.1, "outside 0 to 1"),
        ],
    )
    def test_nonsense_is_named_counted_and_left_out(self, load, hook, answer, words):
        host = load(("bad", plugin(**{hook: lambda: answer})))
        calls = {
            "disagg_select_split": lambda s: s.select_split(PROFILE, FLEET) is None,
            "disagg_select_admission": lambda s: s.select_admission(PROFILE, FLEET) is None,
            "disagg_filter_workers": lambda s: (
                s.filter_workers(PROFILE, Role.DECODE, WORKERS, FLEET) == (WORKERS, ())
            ),
            "disagg_score_workers": lambda s: (
                s.score_workers(PROFILE, Role.DECODE, WORKERS, FLEET, {}) == {"a": 0.5, "b": 0.5}
            ),
            "disagg_select_worker": lambda s: (
                s.select_worker(PROFILE, Role.DECODE, {"a": 1.0}) is None
            ),
            "disagg_score_queue": lambda s: s.score_queue(PROFILE, {}) == 0.5,
        }
        assert calls[hook](host.scheduler)
        assert host.counts == {("bad", hook, "nonsense"): 1}
        assert words in str(host.errors[0])

    def test_a_coroutine_as_an_answer_is_nonsense_and_is_closed(self, load):
        host = load(("bad", plugin(disagg_select_split=lambda: async_hook(None))))
        assert host.scheduler.select_split(PROFILE, FLEET) is None
        assert "coroutine" in str(host.errors[0])

    def test_a_plugin_cannot_change_the_record(self, load):
        def on_end(record):
            record["route"] = "mine"

        host = load(("bad", plugin(disagg_on_request_end=on_end)))
        record = {"route": "local"}
        host.scheduler.on_request_end(record)
        assert record == {"route": "local"}
        assert list(host.counts.values()) == [1]

    def test_third_parties_run_on_a_thread_of_their_own_and_built_ins_inline(self, load):
        ran_on = []
        host = load(
            plugin(disagg_select_split=lambda: ran_on.append(threading.current_thread().name)),
            builtins=True,
        )
        host.scheduler.select_split(PROFILE, FLEET)
        assert ran_on == ["disagg-plugin-p0"]
        assert not any("threshold" in thread.name for thread in threading.enumerate())

    def test_handoff_steps_reach_every_plugin(self, load):
        seen = []
        host = load(plugin(disagg_on_handoff=lambda event: seen.append(event.step)))
        host.connector.on_handoff(HandoffEvent(HandoffId("0" * 32), "opened", 0.0))
        assert seen == ["opened"]


class TestDeadline:
    @pytest.fixture
    def gate(self):
        gate = threading.Event()
        yield gate
        gate.set()

    def hanging(self, gate):
        def hook():
            gate.wait(SLOW_MACHINE_S)

        return "bad", plugin(disagg_select_split=hook)

    def test_an_overrun_is_counted_and_the_next_plugin_answers(self, load, gate):
        host = load(self.hanging(gate), ("good", Bound), deadline_s=0.2)
        assert host.scheduler.select_split(PROFILE, FLEET) == YES
        assert host.counts == {("bad", "disagg_select_split", "overran"): 1}
        assert "0.2 s" in str(host.errors[0])

    def test_while_the_overrun_call_runs_the_plugin_is_not_waited_for(self, load, gate):
        host = load(self.hanging(gate), deadline_s=0.5)
        host.scheduler.select_split(PROFILE, FLEET)
        started_s = time.monotonic()
        for _ in range(10):
            host.scheduler.select_split(PROFILE, FLEET)
        assert time.monotonic() - started_s < 0.5
        assert host.counts[("bad", "disagg_select_split", "skipped")] == 10

    def test_a_plugin_that_came_back_is_asked_again(self, load, gate):
        host = load(self.hanging(gate), deadline_s=0.2)
        host.scheduler.select_split(PROFILE, FLEET)
        gate.set()

        def answered():
            before = sum(host.counts.values())
            host.scheduler.select_split(PROFILE, FLEET)
            return sum(host.counts.values()) == before

        eventually(answered)
        assert host.describe()[0].state == "on"

    def test_strikes_switch_a_plugin_off(self, load):
        release = threading.Semaphore(0)
        returned = threading.Semaphore(0)

        def hook():
            release.acquire(timeout=SLOW_MACHINE_S)
            returned.release()

        host = load(("bad", plugin(disagg_select_split=hook)), deadline_s=0.05, strikes=2)
        host.scheduler.select_split(PROFILE, FLEET)
        release.release()
        assert returned.acquire(timeout=SLOW_MACHINE_S)

        def struck_out():
            host.scheduler.select_split(PROFILE, FLEET)
            return host.describe()[0].state == "off"

        eventually(struck_out)
        release.release()
        assert host.counts[("bad", "disagg_select_split", "overran")] == 2
        assert "overran its deadline 2 times" in host.describe()[0].problem

    def test_callers_in_many_threads_get_their_own_answers(self, load):
        host = load(
            plugin(disagg_select_split=lambda profile: SplitDecision(True, profile.request_id))
        )
        wrong = []

        def ask(number):
            for i in range(50):
                mine = f"{number}-{i}"
                profile = RequestProfile(mine, "/v1/completions", "m", 1)
                answer = host.scheduler.select_split(profile, FLEET)
                if answer is None or answer.reason != mine:
                    wrong.append((mine, answer))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SLOW_MACHINE_S)
        assert wrong == []
        assert host.counts == {}

    def test_close_ends_the_threads_and_leaves_a_hung_one_behind_by_name(self, load, gate, caplog):
        host = load(self.hanging(gate), ("good", Bound), deadline_s=0.2)
        host.scheduler.select_split(PROFILE, FLEET)
        host.close()
        names = [thread.name for thread in threading.enumerate()]
        assert "disagg-plugin-good" not in names
        assert "'bad' still runs" in caplog.text
        gate.set()
        eventually(
            lambda: "disagg-plugin-bad" not in [thread.name for thread in threading.enumerate()]
        )

    def test_a_forked_child_can_still_ask(self):
        code = """
import os
from disagg_plugins import hookimpl
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import PluginPolicy
from disagg_plugins.types import *
class P:
    @hookimpl
    def disagg_select_split(self): return SplitDecision(True, "yes")
host = PluginHost.load(PluginPolicy(deadline_s=5), entry_points=False, extra=[("p", P)])
ask = lambda: host.scheduler.select_split(RequestProfile("r", "e", "m", 1), FleetView([], {}))
assert ask().split
pid = os.fork()
if pid == 0:
    os._exit(7 if ask() is not None and not host.counts else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert (done.stdout.strip(), done.stderr) == ("7", "")


def transport(name):
    return SimpleNamespace(
        name=name,
        capabilities=TransportCapabilities(same_host=True, cross_host=True),
        listen=lambda: None,
        connect=lambda: None,
    )


class TestRegistries:
    def test_offers_are_asked_for_once_and_kept_by_name(self, load):
        asked = []

        def offers():
            asked.append(1)
            return [transport("t1"), transport("t2")]

        host = load(plugin(disagg_register_transports=offers))
        assert list(host.transports()) == ["t1", "t2"]
        assert list(host.transports()) == ["t1", "t2"]
        assert asked == [1]

    def test_a_second_offer_of_a_name_is_a_failure_that_names_both(self, load):
        first, second = transport("t"), transport("t")
        host = load(
            plugin(disagg_register_transports=lambda: [first]),
            plugin(disagg_register_transports=lambda: [second]),
        )
        assert host.transports() == {"t": first}
        assert [failure.plugin for failure in host.failures] == ["p1"]
        assert "'p0'" in str(host.failures[0])

    @pytest.mark.parametrize(
        "bad",
        [
            lambda: 3,
            lambda: [object()],
            lambda: [SimpleNamespace(name="t")],
            lambda: [SimpleNamespace(**{**vars(transport("t")), "connect": None})],
        ],
    )
    def test_an_offer_that_is_no_transport_is_left_out(self, load, bad):
        host = load(plugin(disagg_register_transports=bad))
        assert host.transports() == {}
        assert list(host.counts.values()) == [1]

    def test_the_other_registries_go_by_their_key(self, load):
        engine, named = SimpleNamespace(engine="e"), SimpleNamespace(name="n")
        host = load(
            plugin(
                disagg_register_dialects=lambda: [engine],
                disagg_register_launchers=lambda: [engine],
                disagg_register_checks=lambda: [named],
                disagg_register_commands=lambda: (named,),
            )
        )
        assert host.dialects() == host.launchers() == {"e": engine}
        assert host.checks() == host.commands() == {"n": named}


class TestStart:
    def policy(self, **settings):
        return Policy.model_validate(
            {
                "fleet": {"workers": [{"name": "d", "url": "http://127.0.0.1:1", "role": "both"}]},
                "plugins": {"settings": settings},
            }
        )

    def test_plugins_get_their_settings_once(self, load):
        got = []
        host = load(
            plugin(disagg_on_start=lambda policy: got.append(policy.plugins.settings["p0"]))
        )
        for _ in range(2):
            host.start(self.policy(p0={"limit": 3}))
        assert got == [{"limit": 3}]

    def test_a_typo_in_a_plugins_name_is_told(self, load, caplog):
        load(plugin(disagg_on_start=lambda: None)).start(self.policy(p9={}))
        assert "plugins.settings names plugin 'p9', which is not installed" in caplog.text

    def test_a_plugin_that_refuses_its_settings_is_switched_off(self, load):
        host = load(
            plugin(
                disagg_on_start=lambda policy: policy.plugins.settings["p0"],
                disagg_select_split=lambda: YES,
            )
        )
        host.start(self.policy())
        assert host.scheduler.select_split(PROFILE, FLEET) is None
        assert host.describe()[0].state == "off"
        assert "did not start" in str(host.failures[0])


def test_tracing_prints_every_call(monkeypatch, load, capsys):
    monkeypatch.setenv("DISAGG_TRACE_HOOKS", "1")
    host = load(Bound)
    host.scheduler.select_split(PROFILE, FLEET)
    line = capsys.readouterr().err
    assert "disagg_select_split(profile=RequestProfile(" in line
    assert "by p0 -> SplitDecision(split=True" in line


def test_failures_are_logged_at_powers_of_ten(load, caplog):
    caplog.set_level(logging.WARNING)
    host = load(("bad", plugin(disagg_select_split=lambda: 1)))
    for _ in range(150):
        host.scheduler.select_split(PROFILE, FLEET)
    assert len(caplog.records) == 3
