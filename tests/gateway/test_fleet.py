"""Which workers a request may go to: those that serve its model, and pairs that can share it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from disagg_plugins.gateway.explanations import Explanation
from disagg_plugins.gateway.fleet import FleetState, Work
from disagg_plugins.gateway.server import Gateway
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy
from disagg_plugins.scheduling.decision import Scheduler
from disagg_plugins.types import (
    Decision,
    Disaggregated,
    FleetView,
    Local,
    RequestProfile,
    Role,
    Worker,
)
from disagg_sglang.dialect import SglangDialect
from disagg_vllm.dialect import VllmDialect

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Body, Dialect

DIALECTS: dict[str, Dialect] = {"vllm": VllmDialect(), "sglang": SglangDialect()}
PROFILE = RequestProfile("r", "/v1/completions", "base", 1000, True, 8, False)


def fleet(*workers: tuple[str, str, str], models: dict[str, tuple[str, ...]] | None = None) -> Any:
    """Return a fleet of (name, engine, role); every worker is healthy and has said hello."""
    made = tuple(
        Worker(name, f"http://127.0.0.1:{8000 + i}", engine, Role(role))
        for i, (name, engine, role) in enumerate(workers)
    )
    state = FleetState(made, DIALECTS, model=None, unhealthy_after=3)
    for worker in made:
        state.probe_ok(worker.name, (models or {}).get(worker.name, ("base",)))
        state.greet(worker.name, {"tp_rank": 0, "tp_size": 1, "endpoint": {"tp_rank": 0}})
    return state


def decide(state: FleetState, body: Body, profile: RequestProfile = PROFILE) -> Decision:
    with PluginHost.load((), entry_points=False) as host:
        policy = Policy.model_validate(
            {
                "fleet": {
                    "workers": [
                        {"name": w.name, "url": w.url, "engine": w.engine, "role": str(w.role)}
                        for w in state.workers
                    ]
                },
                "scheduler": {"split": {"min_prompt_tokens": 50}},
            }
        )
        gateway = SimpleNamespace(fleet=state, _scheduler=Scheduler(host, policy))
        gateway._decide_alike = lambda *a: Gateway._decide_alike(cast("Any", gateway), *a)
        return Gateway.decide(cast("Any", gateway), Explanation(profile), body)


@pytest.mark.parametrize("turn", range(2))
def test_what_two_engines_cannot_share_goes_to_a_pair_of_one_engine(turn: int) -> None:
    state = fleet(("v", "vllm", "prefill"), ("s", "sglang", "prefill"), ("d", "sglang", "decode"))
    state.begin("vs"[turn], Work(100))
    route = decide(state, {"logprobs": 1}).route
    assert isinstance(route, Disaggregated)
    assert route.prefill.name == "s"


def test_what_two_engines_cannot_share_goes_whole_where_there_is_no_pair_of_one_engine() -> None:
    state = fleet(("v", "vllm", "prefill"), ("d", "sglang", "decode"), ("b", "sglang", "both"))
    state.begin("b", Work(100))
    assert decide(state, {"logprobs": 1}).route == Local(state.workers[2])


def test_an_adapter_is_asked_only_of_workers_that_have_it() -> None:
    adapted = {"p": ("base", "adapter"), "v": ("base", "adapter")}
    state = fleet(
        ("p", "vllm", "prefill"), ("d", "sglang", "decode"), ("v", "vllm", "decode"), models=adapted
    )
    state.begin("v", Work(100))
    base = decide(state, {}).route
    assert base.decode.name == "d"
    asked = replace(PROFILE, model="adapter")
    assert decide(state, {}, asked).route.decode.name == "v"
    view = state.view_for("adapter", without=["v"])
    assert [w.name for w in view.workers if view.load(w).healthy] == ["p"]


WORKS = st.builds(Work, *[st.integers(0, 500)] * 3)
STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "end", "sick", "well"]), st.integers(0, 3), WORKS),
    max_size=40,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(STEPS)
@example(
    [("begin", 0, Work()), ("begin", 2, Work()), ("sick", 0, Work()), ("sick", 3, Work())]
    + [("well", 0, Work())]
)  # the only one with room is on trial, and had a request before
def test_what_the_keeper_counts_is_what_looking_at_each_worker_finds(
    steps: list[tuple[str, int, Work]],
) -> None:
    state = fleet(
        ("p", "vllm", "prefill"),
        ("d", "vllm", "decode"),
        ("b", "vllm", "both"),
        ("e", "vllm", "both"),
    )
    state.states["b"].worker = replace(state.states["b"].worker, capacity=1)
    running: dict[str, list[Work]] = {name: [] for name in "pdbe"}
    for step, which, work in steps:
        name = "pdbe"[which]
        if step == "begin":
            running[name].append(work)
            state.begin(name, work)
        elif step == "end" and running[name]:
            state.end(name, running[name].pop())
        elif step == "sick":
            state.probe_failed(name, "refused", "nobody listens")
        elif step == "well":
            state.probe_ok(name, ("base",))
        view = state.view()
        plain = FleetView(tuple(s.worker for s in state.states.values()), view.loads)
        for role in (Role.PREFILL, Role.DECODE):
            assert [w.name for w in view.serving(role)] == [w.name for w in plain.serving(role)]
            assert view.has_room(role) == plain.has_room(role)
        for other, works in running.items():
            load = view.loads[other]
            assert load.requests == len(works)
            assert load.prompt_tokens == sum(w.prompt_tokens for w in works)
            assert load.prefills == sum(w.prompt_tokens > 0 for w in works)
            assert load.output_tokens == sum(w.output_tokens for w in works)
            assert load.kv_tokens == sum(w.context_tokens + w.output_tokens for w in works)


def test_pairs_are_judged_alike_one_by_one_and_by_kind() -> None:
    state = fleet(
        ("p1", "vllm", "prefill"),
        ("p2", "vllm", "prefill"),
        ("d", "vllm", "decode"),
        ("b", "vllm", "both"),
    )
    problems = state.view().pair_problems
    assert not problems
    assert list(problems) == []
    state.greet("p2", {"fingerprint": "aa", "tp_rank": 0, "tp_size": 1})
    assert not problems, "the others have not said theirs"
    state.greet("d", {"fingerprint": "bb", "tp_rank": 0, "tp_size": 1})
    assert problems
    assert list(problems) == [("p2", "d")]
    assert state.problems() == [problems["p2", "d"]]
    assert problems.get(("p1", "d")) is None
    assert problems.get(("d", "p2")) is None
    state.greet("d", {"fingerprint": "aa", "tp_rank": 0, "tp_size": 1})
    assert not problems


def test_a_worker_says_how_much_kv_it_holds_unless_the_policy_does() -> None:
    state = fleet(("a", "vllm", "both"), ("b", "vllm", "both"))
    a, b = state.workers
    state.change("b", replace(b, kv_tokens=500))
    for name in ("a", "b"):
        state.greet(name, {"kv_tokens": 23_000})
    assert [state.view().worker(n).kv_tokens for n in ("a", "b")] == [23_000, 500]
    state.change("a", replace(a, capacity=7))
    assert [state.view().worker(n).kv_tokens for n in ("a", "b")] == [23_000, 500]


@pytest.mark.parametrize("said", [None, "many", -1, 0, True, 1 << 50])
def test_a_room_that_cannot_be_is_not_believed(said: object) -> None:
    state = fleet(("a", "vllm", "both"))
    state.greet("a", {"kv_tokens": said})
    assert state.view().worker("a").kv_tokens is None
