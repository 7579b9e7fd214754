"""The index of who holds which prompts, against a model that keeps plain lists."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_plugins.scheduling.prefix_index import MOST_HOLDERS, PrefixIndex

BOUND, ALL, TTL_S = 5, 11, 10.0
names = st.sampled_from(["w0", "w1", "w2", "w3"])
prompts = st.text("ab", max_size=7)


def hashes(prompt: str) -> list[str]:
    return [prompt[: n + 1] for n in range(len(prompt))]


class Against(RuleBasedStateMachine):
    """Every piece with its worker and time, in the order of use."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(BOUND, ttl_s=TTL_S, max_entries=ALL)
        self.model: OrderedDict[tuple[str, str], float] = OrderedDict()
        self.now_s = 0.0

    @rule(worker=names, prompt=prompts)
    def put(self, worker, prompt):
        self.index.put(worker, hashes(prompt), self.now_s)
        for piece in reversed(hashes(prompt)[:BOUND]):
            self.model.pop((worker, piece), None)
            self.model[worker, piece] = self.now_s + TTL_S
        own = [key for key in self.model if key[0] == worker]
        for key in own[: max(0, len(own) - BOUND)]:
            del self.model[key]
        while len(self.model) > ALL:
            self.model.popitem(last=False)

    @rule(worker=names)
    def forget(self, worker):
        self.index.forget(worker)
        self.model = OrderedDict((k, v) for k, v in self.model.items() if k[0] != worker)

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.index.expire(self.now_s)
        self.model = OrderedDict((k, v) for k, v in self.model.items() if v > self.now_s)

    @rule(prompt=prompts, among=st.none() | st.sets(names))
    def asks(self, prompt, among):
        counts = {}
        for worker in ("w0", "w1", "w2", "w3") if among is None else among:
            held = 0
            for piece in hashes(prompt):
                if (worker, piece) not in self.model:
                    break
                held += 1
            if held:
                counts[worker] = held
        found = self.index.longest(hashes(prompt), among)
        assert dict(found) == counts
        assert [n for _, n in found] == sorted(counts.values(), reverse=True)

    @invariant()
    def holds_as_much(self):
        assert len(self.index) == len(self.model)

    @invariant()
    def holds_what_a_piece_builds_on(self):
        assert all(len(p) == 1 or (w, p[:-1]) in self.model for w, p in self.model)


TestAgainstAModel = Against.TestCase


@given(st.integers(1, 300))
def test_names_the_best_holders_of_a_large_fleet_only(workers):
    index = PrefixIndex(100)
    prompt = hashes("abcdefgh")
    for number in range(workers):
        index.put(f"w{number}", prompt[: 1 + number % 8], 0.0)
    found = index.longest(prompt)
    counts = sorted((1 + number % 8 for number in range(workers)), reverse=True)
    assert [count for _, count in found] == counts[:MOST_HOLDERS]


def test_refuses_what_is_held_beyond_the_bound_but_not_what_is_held_already():
    index = PrefixIndex(1)
    assert index.hold("w", "a")
    assert not index.hold("w", "ab")
    assert index.hold("w", "a")
    index.drop("w", "a")
    assert len(index) == 0
    assert index.longest(["a"]) == []


def test_holds_no_more_of_a_worker_than_its_own_room():
    index = PrefixIndex(100)
    index.put("w", hashes("abcd"), 0.0, bound=2)
    assert index.longest(hashes("abcd")) == [("w", 2)]
