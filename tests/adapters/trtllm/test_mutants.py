"""Connectors with one thing wrong each: every one of them is caught, by the rule that it breaks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from disagg_plugins.errors import AuthenticationError, DisaggError
from disagg_plugins.handoff.prompts import prompt_digest
from tests.adapters.trtllm.conftest import Build, Pair, prompt

Change = Callable[[Any], None]


def rule(name: str, holds: bool) -> None:
    """Fail with the name of a rule that does not hold."""
    assert holds, f"the connector broke the rule {name!r}"


def whole_check(two: Pair) -> None:
    """All that is asked of a connector in one go: what the mutants are run against."""
    for length, tokens in ((41, 20), (24, 1)):
        number, ticket, given = two.number(), two.ticket(), prompt(length)
        assert two.decode.ask(given[:16], 1).tokens
        beside = two.decode.ask(prompt(20), 30)
        two.publish(given, number, ticket)
        rule(
            "a prompt is published with the step that reads it",
            _fetched(two, given, number, ticket),
        )
        asked = two.decode.ask(given, tokens, number)
        assert len(asked.tokens) == tokens
        assert len(beside.tokens) == 30
        rule("what was fetched is matched", asked.request.matched_tokens == length - 17)
    _first_token(two)
    _other_prompt(two)
    _false_ticket(two)
    _never_claimed(two)
    for side in (two.prefill, two.decode):
        rule("nothing is left behind", _emptied(side))


def _fetched(two: Pair, given: tuple[int, ...], number: int, ticket: str) -> bool:
    return two.fetch(given, number, ticket)[0] == 200


def _first_token(two: Pair) -> None:
    """Decode goes on from the token that prefill wrote."""
    number, ticket, given = two.number(), two.ticket(), prompt(24)
    said = {"version": 1, "step": "prefill", "request_id": number, "ticket": ticket}
    assert two.prefill.announce({**said, "opening": True})[0] == 200
    (token,) = two.prefill.ask(given, 1, number).tokens
    told = two.prefill.announce({**said, "step": "opening"})
    rule(
        "the first token is told as it was written",
        told == (200, {"prompt": list(given), "token": token}),
    )
    assert _fetched(two, given, number, ticket)
    asked = two.decode.ask((*given, token), 4, number)
    assert len(asked.tokens) == 4
    rule("all of the prompt is loaded", asked.request.matched_tokens == len(given))


def _other_prompt(two: Pair) -> None:
    """Two prompts of one length: the KV of one is never used for the other."""
    number, ticket = two.number(), two.ticket()
    two.publish(prompt(40), number, ticket)
    assert _fetched(two, prompt(40), number, ticket)
    assert len(two.decode.ask(prompt(40), 8, number).tokens) == 8


def _false_ticket(two: Pair) -> None:
    number, ticket, given = two.number(), two.ticket(), prompt(20)
    two.publish(given, number, ticket)
    said = two.announcement(given, number, ticket[:-6] + "AAAAAA")
    rule("false tickets are refused", two.decode.announce(said)[0] == 403)


def _never_claimed(two: Pair) -> None:
    number, ticket, given = two.number(), two.ticket(), prompt(20)
    two.publish(given, number, ticket)
    assert _fetched(two, given, number, ticket)


def _emptied(side: Any, within_s: float = 3.0) -> bool:
    end_s = time.monotonic() + within_s
    while side.used_bytes or side.scheduler.side.jobs:
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


@dataclass(frozen=True)
class Mutant:
    """One wrong connector.

    Attributes:
        breaks: The rule that must be named.
        change: Makes it of the connector's module.
        how: Of the engines.
    """

    breaks: str
    change: Change
    how: dict[str, Any] = field(default_factory=dict)


def scheduler(**methods: Callable[..., Any]) -> Change:
    """Return a change of the scheduler half's decisions; each method is given the right one."""

    def change(module: Any) -> None:
        module.SchedulerSide = _subclass(module.SchedulerSide, methods)

    return change


def worker(**methods: Callable[..., Any]) -> Change:
    """The same for the worker half."""

    def change(module: Any) -> None:
        module.WorkerSide = _subclass(module.WorkerSide, methods)

    return change


def fetcher(**methods: Callable[..., Any]) -> Change:
    """The same for what fetches."""

    def change(module: Any) -> None:
        module.Fetcher = _subclass(module.Fetcher, methods)

    return change


def hooks(kind: str, **methods: Callable[..., Any]) -> Change:
    """The same for a class of the pair itself."""

    def change(module: Any) -> None:
        setattr(module, kind, _subclass(getattr(module, kind), methods))

    return change


def _subclass(base: type, methods: dict[str, Callable[..., Any]]) -> type:
    def bound(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **more: Any) -> Any:
            right = getattr(super(made, self), name)
            return method(self, right, *args, **more)

        return call

    made: type = type(base.__name__, (base,), {n: bound(m, n) for n, m in methods.items()})
    return made


SCHEDULER, WORKER = "DisaggKvConnectorScheduler", "DisaggKvConnectorWorker"


# Matches


def no_clamp(self, right, request_id, tokens, computed):
    matched, parks = right(request_id, tokens, computed)
    return (matched + 1 if matched else 0), parks


def matched_though_nothing_is_here(self, right, request_id, tokens, computed):
    matched, parks = right(request_id, tokens, computed)
    return matched or max(0, len(tokens) - 1 - computed), parks


def parks_without_tokens(self, right, request_id, tokens, computed):
    return right(request_id, tokens, computed)[0], True


def waits(self, right, request_id, tokens, computed):
    time.sleep(1.1)
    return right(request_id, tokens, computed)


def whatever_prompt(self, right, request_id, tokens, computed):
    found = self._fetcher._here.get(request_id)
    if found is not None:
        digest = prompt_digest(tokens[: found.num_tokens])
        self._fetcher._here[request_id] = replace(found, prompt=digest)
    return right(request_id, tokens, computed)


def asks_the_python_request(self, right, request, computed):
    try:
        return self.side.match(request.py_request_id, request.get_tokens(0), computed)
    except AttributeError:
        return 0, False


def answers_a_list(self, right, request, computed):
    return [right(request, computed)]


# Plans


def loads_an_iteration_later(self, right, new, known):
    plan = right(new, known)
    late, self._late = plan.load, getattr(self, "_late", [])
    plan.load = self._late
    self._late = late
    return plan


def loads_up_to_the_computed_position(self, right, new, known):
    plan = right(new, known)
    positions = {entry.request_id: entry.position for entry in new}
    plan.load = [
        replace(step, end_token=max(step.first_token + 1, positions[step.request_id]))
        for step in plan.load
    ]
    return plan


def saves_when_the_request_is_over(self, right, new, known):
    plan = right(new, known)
    self._kept = [*getattr(self, "_kept", []), *plan.publish]
    plan.publish = []
    return plan


def repeats_its_plan(self, right, new, known):
    plan = right(new, known)
    self._before = [*getattr(self, "_before", []), *plan.load]
    plan.load = list(self._before)
    return plan


def cannot_be_pickled(self, right, output):
    plan = right(output)
    plan.load = [*plan.load, lambda: None]
    return plan


def raises_on_rank_0(self, right, request, block_ids):
    right(request, block_ids)
    raise KeyError(request.request_id)


def publishes_a_block_too_few(self, right, new, known):
    plan = right(new, known)
    plan.publish = [replace(step, blocks=step.blocks[:-1]) for step in plan.publish]
    return plan


def forgets_nothing(self, right, request_id, tokens):
    self._openings.finished(request_id, tokens)
    self._keeps = [*getattr(self, "_keeps", []), request_id]


def loads_what_is_new(self, right, output):
    for data in output.new_requests:
        self.side.allocated(data.request_id, data.new_block_ids)
    return right(output)


def is_told_of_no_blocks(self, right, request, block_ids):
    pass


def publishes_with_the_first_chunk(self, right, new, known):
    return right([replace(entry, scheduled=len(entry.tokens)) for entry in new], known)


# Copies


def k_and_v_swapped(self, right, kv):
    return right(kv)[:, :, ::-1]


def heads_reversed(self, right, kv):
    return right(kv)[:, :, :, ::-1]


def heads_of_the_first_rank(self, right, kv):
    layout = self._layout
    self._layout = replace(layout, head_start=0)
    try:
        return right(kv)
    finally:
        self._layout = layout


def layers_reversed(self, right, kv):
    return right(kv)[:, ::-1]


def one_block_further(self, right, step, stream):
    blocks = step.blocks
    right(replace(step, blocks=(*blocks[:2], *blocks[3:], blocks[2])), stream)


def the_last_block_is_left_out(self, right, step, stream):
    size = self._layout.block_size_tokens
    right(replace(step, end_token=(step.end_token - 1) // size * size), stream)


def the_first_token_is_left_out(self, right, step, stream):
    right(replace(step, first_token=step.first_token + 1), stream)


def the_whole_last_block(self, right, step, stream):
    size = self._layout.block_size_tokens
    right(replace(step, end_token=-(-step.end_token // size) * size), stream)


def from_the_beginning_of_staging(self, right, step, stream):
    right(replace(step, staged=replace(step.staged, offset=4096)), stream)


def another_order(self, right, tp_rank=None):
    return replace(right(tp_rank), order="cthd")


def order_of_tokens_first(module: Any) -> None:
    read = module.read_geometry

    def changed(args: Any) -> Any:
        found = read(args)
        made = _subclass(type(found), {"layout": another_order})
        return made(*(getattr(found, name) for name in found.__dataclass_fields__))

    module.read_geometry = changed


# The first token


def one_prompt_token_is_computed_again(self, right, request_id, tokens, computed):
    fetched = self._fetcher.look(request_id)
    longer = fetched is not None and len(tokens) > fetched.num_tokens
    matched, parks = right(request_id, tokens, computed)
    if not longer or matched < 2:
        return matched, parks
    self._decodes[request_id].end_token -= 1
    return matched - 1, parks


def tells_the_last_token_of_the_prompt(self, right, request_id, tokens):
    right(request_id, lambda: [*tokens()[:-1], *tokens()[-2:-1]])


def tells_it_to_nobody(self, right, request_id, tokens):
    right(request_id, lambda: [])


# Ends


def says_loaded_at_once(self, right, started):
    over = right(started)
    early = [i for i in started if i not in over]
    for request_id in early:
        self._copying.pop(request_id, None)
    return over + early


def says_it_twice(self, right, finished, started):
    saved, loaded = right(finished, started)
    self._told = [*getattr(self, "_told", []), *loaded]
    return saved, list(self._told)


def says_what_nobody_asked(self, right, finished, started):
    return [12345], right(finished, started)[1]


def raises_on_rank_1(self, right, stream):
    if self._tp_rank == 1:
        raise RuntimeError("no memory")
    right(stream)


def never_sweeps(self, right):
    return []


def takes_any_ticket(self, right, said):
    try:
        return right(said)
    except AuthenticationError:
        return None


MUTANTS = {
    "no_clamp": Mutant("match is bounded", scheduler(match=no_clamp)),
    "matched_though_nothing_is_here": Mutant(
        "KV is right", scheduler(match=matched_though_nothing_is_here)
    ),
    "parks_without_tokens": Mutant(
        "asynchronous matches have tokens", scheduler(match=parks_without_tokens)
    ),
    "waits": Mutant("match is quick", scheduler(match=waits)),
    "whatever_prompt": Mutant("KV is right", scheduler(match=whatever_prompt)),
    "asks_the_python_request": Mutant(
        "what was fetched is matched",
        hooks(SCHEDULER, get_num_new_matched_tokens=asks_the_python_request),
    ),
    "answers_a_list": Mutant(
        "answers are of the right kind",
        hooks(SCHEDULER, get_num_new_matched_tokens=answers_a_list),
    ),
    "loads_an_iteration_later": Mutant("KV is right", scheduler(plan=loads_an_iteration_later)),
    "loads_up_to_the_computed_position": Mutant(
        "KV is right", scheduler(plan=loads_up_to_the_computed_position)
    ),
    "saves_when_the_request_is_over": Mutant(
        "a prompt is published with the step that reads it",
        scheduler(plan=saves_when_the_request_is_over),
    ),
    "repeats_its_plan": Mutant("nothing else is written", scheduler(plan=repeats_its_plan)),
    "cannot_be_pickled": Mutant(
        "metadata pickles",
        hooks(SCHEDULER, build_connector_meta=cannot_be_pickled),
        {"ranks": (2, 2)},
    ),
    "raises_on_rank_0": Mutant(
        "rank 0 alone never raises", hooks(SCHEDULER, update_state_after_alloc=raises_on_rank_0)
    ),
    "publishes_a_block_too_few": Mutant(
        "a prompt is published with the step that reads it",
        scheduler(plan=publishes_a_block_too_few),
    ),
    "loads_what_is_new": Mutant(
        "what is parked is loaded",
        hooks(
            SCHEDULER,
            build_connector_meta=loads_what_is_new,
            update_state_after_alloc=is_told_of_no_blocks,
        ),
        {"loads": "async", "loads_s": 1.0},
    ),
    "publishes_with_the_first_chunk": Mutant(
        "KV is right",
        scheduler(plan=publishes_with_the_first_chunk),
        {"prefill": {"budget_tokens": 16}},
    ),
    "forgets_nothing": Mutant("nothing is left behind", scheduler(finished=forgets_nothing)),
    "k_and_v_swapped": Mutant("KV is right", worker(_heads=k_and_v_swapped)),
    "heads_reversed": Mutant("KV is right", worker(_heads=heads_reversed)),
    "heads_of_the_first_rank": Mutant(
        "KV is right", worker(_heads=heads_of_the_first_rank), {"ranks": (1, 2)}
    ),
    "layers_reversed": Mutant("KV is right", worker(_heads=layers_reversed)),
    "one_block_further": Mutant("KV is right", worker(_copy=one_block_further)),
    "the_last_block_is_left_out": Mutant("KV is right", worker(_copy=the_last_block_is_left_out)),
    "the_first_token_is_left_out": Mutant("KV is right", worker(_copy=the_first_token_is_left_out)),
    "the_whole_last_block": Mutant("nothing else is written", worker(_copy=the_whole_last_block)),
    "from_another_place_of_staging": Mutant(
        "KV is right", worker(_copy=from_the_beginning_of_staging)
    ),
    "order_of_tokens_first": Mutant(
        "KV is right", order_of_tokens_first, {"prefill": {"block_size_tokens": 16}}
    ),
    "says_loaded_at_once": Mutant(
        "KV is right", worker(loaded=says_loaded_at_once, _copy=lambda self, right, *a: None),
        {"loads": "async"},
    ),
    "says_it_twice": Mutant(
        "only asked ids finish", hooks(WORKER, get_finished=says_it_twice), {"loads": "async"}
    ),
    "says_what_nobody_asked": Mutant(
        "only asked ids finish", hooks(WORKER, get_finished=says_what_nobody_asked)
    ),
    "raises_on_rank_1": Mutant(
        "hooks never raise", hooks(WORKER, start_load_kv=raises_on_rank_1), {"ranks": (2, 2)}
    ),
    "one_prompt_token_is_computed_again": Mutant(
        "all of the prompt is loaded", scheduler(match=one_prompt_token_is_computed_again)
    ),
    "tells_the_last_token_of_the_prompt": Mutant(
        "the first token is told as it was written",
        scheduler(finished=tells_the_last_token_of_the_prompt),
    ),
    "tells_it_to_nobody": Mutant(
        "the first token is told as it was written", scheduler(finished=tells_it_to_nobody)
    ),
    "never_sweeps": Mutant("nothing is left behind", fetcher(sweep=never_sweeps)),
    "takes_any_ticket": Mutant("false tickets are refused", scheduler(announced=takes_any_ticket)),
}  # fmt: skip


@pytest.mark.parametrize("loads", ["sync", "async"])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 2)])
def test_the_connector_itself_breaks_no_rule(pair: Build, loads: str, ranks) -> None:
    whole_check(pair(handoff={"lease_s": 0.5}, loads=loads, ranks=ranks))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_by_the_rule_that_it_breaks(pair: Build, name: str) -> None:
    mutant = MUTANTS[name]
    two = None
    try:
        two = pair(handoff={"lease_s": 0.5}, change=mutant.change, **mutant.how)
        whole_check(two)
    except (AssertionError, DisaggError, OSError) as exc:
        sides = () if two is None else (two.prefill, two.decode)
        said = "; ".join([str(exc), *(side.engine.problem for side in sides)])
    else:
        pytest.fail(f"nobody noticed {name}")
    assert f"broke the rule {mutant.breaks!r}" in said
