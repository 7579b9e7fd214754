"""Routes, as the built-in plugins and third parties make them together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins import hookimpl
from disagg_plugins.errors import NoCapacityError
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.types import (
    Disaggregated,
    FleetView,
    Local,
    Refusal,
    RequestProfile,
    Role,
    SplitDecision,
    Worker,
    WorkerLoad,
)

LONG = RequestProfile("r1", "/v1/completions", "m", 900, prompt_tokens_exact=True)
SHORT = RequestProfile("r2", "/v1/completions", "m", 9, prompt_tokens_exact=True)


def workers(**roles):
    return tuple(
        Worker(name, f"http://127.0.0.1:{9000 + i}", "vllm", Role(role), capacity=4)
        for i, (name, role) in enumerate(roles.items())
    )


TWO_BY_TWO = workers(p1="prefill", p2="prefill", d1="decode", d2="decode")


@pytest.fixture
def scheduler():
    hosts = []

    def make(builtins=True, weights=None, **hooks):
        plugins = [
            (name, SimpleNamespace(**{hook: hookimpl(f) for hook, f in functions.items()}))
            for name, functions in hooks.items()
        ]
        policy = Policy.model_validate(
            {
                "fleet": {"workers": [{"name": "d", "url": "http://127.0.0.1:1", "role": "both"}]},
                "scheduler": {"weights": weights or {}},
                "plugins": {"deadline_s": 10},
            }
        )
        host = PluginHost.load(policy.plugins, builtins=builtins, entry_points=False, extra=plugins)
        hosts.append(host)
        return Scheduler(host, policy)

    yield make
    for host in hosts:
        host.close()
        assert host.counts == {}


def names(decision):
    route = decision.route
    if isinstance(route, Local):
        return (route.decode.name,)
    return (route.prefill.name, route.decode.name)


def test_a_long_prompt_is_split_and_a_short_one_stays(scheduler):
    decider = scheduler()
    fleet = FleetView(TWO_BY_TWO, {})
    long, short = decider.decide(LONG, fleet), decider.decide(SHORT, fleet)
    assert isinstance(long.route, Disaggregated)
    assert long.route.prefill.role is Role.PREFILL
    assert long.route.decode.role is Role.DECODE
    assert long.reason == "900 prompt tokens, at least 256"
    assert isinstance(short.route, Local)
    assert short.route.decode.role is Role.DECODE


def test_equal_workers_share_in_turn(scheduler):
    decider = scheduler()
    routes = Counter(names(decider.decide(LONG, FleetView(TWO_BY_TWO, {}))) for _ in range(100))
    assert sum(n for route, n in routes.items() if route[0] == "p1") == 50
    assert sum(n for route, n in routes.items() if route[1] == "d1") == 50


def test_the_less_loaded_worker_of_each_role_is_chosen(scheduler):
    loads = {"p1": WorkerLoad(prompt_tokens=500), "d2": WorkerLoad(requests=1)}
    for _ in range(3):
        decision = scheduler().decide(LONG, FleetView(TWO_BY_TWO, loads))
        assert names(decision) == ("p2", "d1")


def test_sick_workers_get_nothing(scheduler):
    loads = {"p1": WorkerLoad(healthy=False), "d1": WorkerLoad(healthy=False)}
    assert names(scheduler().decide(LONG, FleetView(TWO_BY_TWO, loads))) == ("p2", "d2")


def test_without_a_healthy_prefill_worker_a_request_stays_local(scheduler):
    loads = {name: WorkerLoad(healthy=False) for name in ("p1", "p2")}
    decision = scheduler().decide(LONG, FleetView(TWO_BY_TWO, loads))
    assert isinstance(decision.route, Local)
    assert "no healthy prefill worker" in decision.reason


def test_with_a_full_prefill_pool_a_request_stays_local_and_the_rule_is_named(scheduler):
    loads = {name: WorkerLoad(requests=4) for name in ("p1", "p2")}
    decision = scheduler().decide(LONG, FleetView(TWO_BY_TWO, loads))
    assert isinstance(decision.route, Local)
    assert decision.reason == "no prefill worker left by capacity"


def test_a_full_fleet_refuses_with_the_plugins_words(scheduler):
    loads = {name: WorkerLoad(requests=4) for name in ("d1", "d2")}
    with pytest.raises(NoCapacityError, match="at capacity: 8 requests") as caught:
        scheduler().decide(LONG, FleetView(TWO_BY_TWO, loads))
    assert caught.value.status == 429
    assert caught.value.retry_after_s > 0


def test_a_third_party_refuses_for_everybody(scheduler):
    decider = scheduler(
        mine={"disagg_select_admission": lambda: Refusal("closed on Sundays", 60, status=503)}
    )
    with pytest.raises(NoCapacityError, match="closed on Sundays") as caught:
        decider.decide(LONG, FleetView(TWO_BY_TWO, {}))
    assert caught.value.retry_after_s == 60


def test_what_cannot_be_split_is_not_even_when_a_plugin_wants_it(scheduler):
    decider = scheduler(mine={"disagg_select_split": lambda: SplitDecision(True, "always")})
    profile = RequestProfile("r", "/v1/completions", "m", 900, unsplittable="n is 2")
    decision = decider.decide(profile, FleetView(TWO_BY_TWO, {}))
    assert isinstance(decision.route, Local)
    assert "n is 2" in decision.reason


def test_one_worker_for_everything_never_hands_over_to_itself(scheduler):
    decision = scheduler().decide(LONG, FleetView(workers(w="both"), {}))
    assert names(decision) == ("w",)
    assert "both phases" in decision.reason


def test_two_idle_workers_for_everything_share_a_request(scheduler):
    decider = scheduler()
    for _ in range(5):
        assert len(names(decider.decide(LONG, FleetView(workers(v="both", w="both"), {})))) == 2


def test_filters_intersect_and_an_empty_rest_names_who_filtered(scheduler):
    def without(name):
        return {"disagg_filter_workers": lambda workers: [w for w in workers if w.name != name]}

    decider = scheduler(x=without("d1"), y=without("p1"))
    assert names(decider.decide(LONG, FleetView(TWO_BY_TWO, {}))) == ("p2", "d2")
    decider = scheduler(x=without("d1"), y=without("d2"))
    with pytest.raises(NoCapacityError, match="no decode worker left by x, y"):
        decider.decide(LONG, FleetView(TWO_BY_TWO, {}))


@pytest.mark.parametrize(("weight", "chosen"), [(0, "d1"), (0.1, "d1"), (100, "d2")])
def test_scores_weigh_as_the_policy_says(scheduler, weight, chosen):
    decider = scheduler(
        weights={"mine": weight},
        mine={
            "disagg_score_workers": lambda workers: {
                w.name: w.name == "d2" and 1.0 or 0.0 for w in workers
            }
        },
    )
    loads = {"d2": WorkerLoad(requests=3)}
    assert names(decider.decide(SHORT, FleetView(TWO_BY_TWO, loads))) == (chosen,)


def test_a_worker_chosen_by_a_plugin_wins_over_scores(scheduler):
    decider = scheduler(mine={"disagg_select_worker": lambda scored: max(scored)})
    for _ in range(3):
        assert names(decider.decide(LONG, FleetView(TWO_BY_TWO, {}))) == ("p2", "d2")


def test_without_any_plugin_requests_are_served_locally_in_turn(scheduler):
    decider = scheduler(builtins=False)
    decisions = [decider.decide(LONG, FleetView(TWO_BY_TWO, {})) for _ in range(4)]
    assert [names(d) for d in decisions] == [("d1",), ("d2",), ("d1",), ("d2",)]
    assert decisions[0].reason == "no plugin asked for a split"


def test_the_end_of_a_request_and_the_queue_reach_plugins(scheduler):
    seen = []
    decider = scheduler(
        mine={
            "disagg_on_request_end": lambda record: seen.append(record["request_id"]),
            "disagg_score_queue": lambda profile: 0.75,
        }
    )
    decider.request_ended({"request_id": "r1"})
    assert seen == ["r1"]
    assert decider.queue_score(LONG) == 0.75


def test_workers_that_left_are_forgotten(scheduler):
    decider = scheduler()
    for i in range(200):
        decider.decide(SHORT, FleetView(workers(**{f"d{i}": "decode"}), {}))
    assert len(decider._last_turn) <= 4


LOAD = st.builds(
    WorkerLoad,
    requests=st.integers(0, 6),
    prompt_tokens=st.integers(0, 5000),
    healthy=st.booleans(),
)
FLEETS = st.lists(st.tuples(st.sampled_from(list(Role)), LOAD), max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(FLEETS, st.sampled_from([LONG, SHORT]))
def test_every_route_is_possible_and_every_refusal_has_a_reason(fleet, profile):
    members = tuple(
        Worker(f"w{i}", f"http://127.0.0.1:{i + 1}", "vllm", role, 4)
        for i, (role, _) in enumerate(fleet)
    )
    loads = {f"w{i}": load for i, (_, load) in enumerate(fleet)}
    view = FleetView(members, loads)
    policy = Policy.model_validate(
        {"fleet": {"workers": [{"name": "d", "url": "http://127.0.0.1:1", "role": "both"}]}}
    )
    with PluginHost.load(policy.plugins, entry_points=False) as host:
        decider = Scheduler(host, policy)
        room = [w for w in view.serving(Role.DECODE) if loads[w.name].requests < 4]
        if not room:
            with pytest.raises(NoCapacityError, match="decode worker"):
                decider.decide(profile, view)
            return
        decision = decider.decide(profile, view)
        assert decision.reason
        assert decision.route.decode in room
        if isinstance(decision.route, Disaggregated):
            prefill = decision.route.prefill
            assert profile is LONG
            assert prefill in view.serving(Role.PREFILL)
            assert prefill.name != decision.route.decode.name
        assert host.counts == {}


def dependent(fleet):
    """Return the fleet of an engine whose decode workers take handed-over requests only."""
    return tuple(
        replace(w, handoffs=False) if w.role is Role.BOTH else replace(w, whole=False)
        for w in fleet
    )


UNSPLITTABLE = replace(LONG, unsplittable="n > 1")


def test_dependent_decode_workers_get_short_prompts_split_too(scheduler):
    decision = scheduler().decide(SHORT, FleetView(dependent(TWO_BY_TWO), {}))
    assert isinstance(decision.route, Disaggregated)
    assert decision.reason == "d1 takes handed-over requests only"


def test_what_is_not_split_goes_to_a_worker_that_serves_whole_requests(scheduler):
    fleet = FleetView(dependent(workers(p="prefill", d="decode", b="both")), {})
    made = scheduler()
    for profile in (SHORT, UNSPLITTABLE):
        assert made.decide(profile, fleet).route == Local(fleet.workers[2])


def test_what_is_split_never_goes_to_a_worker_that_takes_no_handoffs(scheduler):
    fleet = FleetView(dependent(workers(b="both", p="prefill", d="decode")), {})
    made = scheduler()
    for _ in range(4):
        assert made.decide(LONG, fleet).route == Disaggregated(*fleet.workers[1:])


def test_an_unsplittable_request_without_such_a_worker_is_the_clients_error(scheduler):
    with pytest.raises(NoCapacityError, match="n > 1.*serves whole requests") as caught:
        scheduler().decide(UNSPLITTABLE, FleetView(dependent(TWO_BY_TWO), {}))
    assert caught.value.status == 400


def test_dependent_decode_workers_without_prefill_fall_back_or_refuse(scheduler):
    fleet = dependent(workers(d="decode", b="both"))
    made = scheduler()
    decision = made.decide(LONG, FleetView(fleet, {}))
    assert decision.route == Local(fleet[1])
    assert decision.reason == "no healthy prefill worker"
    with pytest.raises(NoCapacityError, match="no healthy prefill worker") as caught:
        made.decide(LONG, FleetView(fleet[:1], {}))
    assert caught.value.status == 503


def test_workers_that_cannot_share_a_handoff_are_never_paired(scheduler):
    problems = {("p1", "d1"): "other model", ("p2", "d2"): "other model"}
    fleet, made = FleetView(TWO_BY_TWO, {}, problems), scheduler()
    pairs = {names(made.decide(LONG, fleet)) for _ in range(8)}
    assert pairs == {("p1", "d2"), ("p2", "d1")}


def test_a_decode_worker_without_a_fitting_prefill_worker_is_passed_over(scheduler):
    fleet = FleetView(TWO_BY_TWO, {}, {(p, "d1"): "other model" for p in ("p1", "p2")})
    made = scheduler()
    assert {names(made.decide(LONG, fleet))[1] for _ in range(4)} == {"d2"}


def test_the_reason_is_told_when_no_pair_fits(scheduler):
    problems = {(p, d): f"{p} is not {d}" for p in ("p1", "p2") for d in ("d1", "d2")}
    decision = scheduler().decide(LONG, FleetView(TWO_BY_TWO, {}, problems))
    assert isinstance(decision.route, Local)
    assert decision.reason.startswith("split is off: p")
    assert decision.problem in problems.values()
    with pytest.raises(NoCapacityError, match="split is off: p"):
        scheduler().decide(LONG, FleetView(dependent(TWO_BY_TWO), {}, problems))


def many(prefills, decodes):
    return workers(
        **{f"p{i}": "prefill" for i in range(prefills)},
        **{f"d{i}": "decode" for i in range(decodes)},
    )


def test_in_a_large_fleet_only_a_sample_is_scored(scheduler):
    seen = []

    def disagg_score_workers(workers):
        seen.append(len(workers))

    decider = scheduler(watcher={"disagg_score_workers": disagg_score_workers})
    decider.decide(LONG, FleetView(many(100, 200), {}))
    assert len(seen) == 2
    assert all(2 <= count <= 4 for count in seen)


def test_samples_level_the_load_of_a_large_fleet(scheduler):
    """After m requests on n workers the fullest holds little more than m / n."""
    decider, members = scheduler(), many(0, 100)
    members = tuple(replace(w, capacity=64) for w in members)
    loads = {}
    for _ in range(1000):
        name = names(decider.decide(SHORT, FleetView(members, loads)))[0]
        loads[name] = WorkerLoad(requests=loads.get(name, WorkerLoad()).requests + 1)
    assert max(load.requests for load in loads.values()) <= 12


def test_a_nominated_worker_is_looked_at_in_a_large_fleet(scheduler):
    decider = scheduler(
        mine={
            "disagg_nominate_workers": lambda role: ["d150", "no-such-worker", "p3"],
            "disagg_score_workers": lambda workers: {
                w.name: float(w.name == "d150") for w in workers
            },
        },
        weights={"mine": 1000},
    )
    for _ in range(5):
        assert names(decider.decide(SHORT, FleetView(many(10, 200), {}))) == ("d150",)


def test_a_nominated_worker_that_rests_is_passed_over(scheduler):
    decider = scheduler(mine={"disagg_nominate_workers": lambda: ["d150"]})
    loads = {"d150": WorkerLoad(healthy=False)}
    for _ in range(5):
        assert names(decider.decide(SHORT, FleetView(many(0, 200), loads))) != ("d150",)


def test_where_the_whole_sample_is_full_the_one_worker_with_room_is_found(scheduler):
    loads = {f"d{i}": WorkerLoad(requests=4) for i in range(200) if i != 77}
    assert names(scheduler().decide(SHORT, FleetView(many(0, 200), loads))) == ("d77",)


def test_a_worker_that_came_back_is_given_one_request_at_a_time(scheduler):
    members = workers(d1="decode", d2="decode")
    loads = {"d1": WorkerLoad(requests=1, trial=True), "d2": WorkerLoad(requests=3)}
    assert names(scheduler().decide(SHORT, FleetView(members, loads))) == ("d2",)
    loads["d1"] = WorkerLoad(trial=True)
    assert names(scheduler().decide(SHORT, FleetView(members, loads))) == ("d1",)


def test_admission_is_asked_once_a_request(scheduler):
    def refuse(profile, fleet):
        return Refusal("no", status=429)

    decider = scheduler(mine={"disagg_select_admission": refuse})
    fleet = FleetView(TWO_BY_TWO, {})
    with pytest.raises(NoCapacityError):
        decider.decide(LONG, fleet)
    assert isinstance(decider.decide(replace(LONG, admitted=True), fleet).route, Disaggregated)
