"""Workers that answer right and far slower than their peers: which ones (sans-IO).

Envoy's outlier detection (``envoy.config.cluster.v3.OutlierDetection``) and Finagle's failure
accrual take out hosts by their errors; the bounds on who may be out at once are Envoy's
(``slow_workers.py``). What is judged here is time.

Rules:

- A worker's median of its last answers is compared with each peer's: workers of the same role and
  kind. Of these ratios the median counts, so that neither one quick peer nor one slow one decides.
- What its load explains is allowed for. A time is a sum of what is always there and of what each
  part of the load costs (see ``scheduling.prediction``), all of it positive; and a ratio of such
  sums is never above the largest ratio of their parts (the mediant inequality). So a worker may be
  slower than a peer by the largest ratio of the parts of their loads, whatever the coefficients.
- There is no verdict without enough answers of the worker and of two peers, within a minute.
- Whoever was taken out for slowness is judged anew, by fewer answers until one verdict finds it as
  quick as its peers; what it began before does not count.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import NamedTuple

MOST_ANSWERS = 32
"""Answers of a worker that are looked at, the last ones: after 17 slow ones the median is slow."""

ENOUGH_ANSWERS = 16
"""Fewer say nothing: with 16, nine have to be slow by chance."""

ANSWERS_ANEW = 8
"""Enough from a worker that was slow before: each of them is a user who waits."""

YOUNG_S = 60.0
"""Older answers were given under another load, or before whatever made the worker slow."""

ENOUGH_PEERS = 2
"""With one peer nobody knows which of the two is odd."""

MOST_PEERS = 32
"""Compared with, those heard of last: a verdict costs the same in a fleet of thousands."""

JUDGED_EVERY = 4
"""Answers between two verdicts on a worker: one costs some 30 microseconds."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A kind of time that workers are judged by.

    Attributes:
        name: In words.
        least_s: A peer counts as no quicker than this: below it the network and the gateway are
            measured.
        idle: For each part of the load, how much of it costs no more than its share of what a
            worker takes without any load. Smaller numbers are the careful ones.
    """

    name: str
    least_s: float
    idle: tuple[float, ...]


TPOT = Measure("TPOT", 0.001, (16.0, 4096.0, 48.0))
"""Its loads: requests, KV tokens, and prompt tokens read for each token written. The measured
engines of ``testing.pace`` take for an empty step what 45 and 500 requests cost, 22,000 and 32,000
KV tokens, 196 prompt tokens; a part of each is taken, as the parts share that time."""

PIECES = Measure("time for a piece of an answer", TPOT.least_s, TPOT.idle)
"""The same of streams whose clients do not ask for usage: how many tokens a piece has is unknown,
so these times are compared with each other only."""

READING = Measure("time to read prompts", 0.01, (64.0, float(1 << 20), 16.0))
"""Its loads: tokens read and queued before, pairs of tokens (attention), requests in flight. With
OPT-13B on an A100 (``testing.pace``), what is always there costs as much as 178 tokens or 2.5
million pairs."""


class Answer(NamedTuple):
    """One time that was measured, when, and under which load."""

    at_s: float
    seconds: float
    loads: tuple[float, ...]


class Verdict(NamedTuple):
    """How a worker compares with its peers.

    Attributes:
        ratio: How many times slower it is than its load explains.
        answers: How many it was judged by.
        seconds: Their median.
        peers: How many it was compared with.
        peers_s: The median of their medians.
        slow: Whether it is an outlier.
        quick: Whether it is well within what is usual, by enough answers.
    """

    ratio: float
    answers: int
    seconds: float
    peers: int
    peers_s: float
    slow: bool
    quick: bool


class _Usual(NamedTuple):
    """The medians of one worker, good as a peer's until ``until_s``."""

    seconds: float
    loads: tuple[float, ...]
    until_s: float


@dataclass(slots=True)
class _Worker:
    group: Hashable
    since_s: float = float("-inf")
    anew: bool = False
    unjudged: int = 0
    answers: deque[Answer] = field(default_factory=lambda: deque(maxlen=MOST_ANSWERS))


class Outliers:
    """Judges workers by one measure.

    Args:
        measure: What they are judged by.
        factor: How many times slower than usual is slow; above 1.
    """

    def __init__(self, measure: Measure, factor: float) -> None:
        self.measure = measure
        self._factor = factor
        self._quick = (1.0 + factor) / 2  # not on the edge: whoever is, would come and go
        self._workers: dict[str, _Worker] = {}
        self._groups: dict[Hashable, OrderedDict[str, _Usual]] = {}

    def hear(self, group: Hashable, name: str, answer: Answer, *, began_s: float) -> Verdict | None:
        """Take one answer; return what it says of the worker, where enough is known.

        Args:
            group: Stands for the worker's role and kind; peers have the same.
            name: The worker.
            answer: What was measured.
            began_s: When the request began, on the clock of ``answer.at_s``.
        """
        worker = self._workers.get(name)
        if worker is None:
            worker = self._workers[name] = _Worker(group)
        elif worker.group != group:  # another role: its times are of other work
            self._out_of_group(name, worker)
            worker.answers.clear()
            worker.group = group
        if began_s < worker.since_s:
            return None
        worker.answers.append(answer)
        worker.unjudged += 1
        if worker.unjudged < JUDGED_EVERY:
            return None
        worker.unjudged = 0
        return self._judged(name, worker, answer.at_s)

    def rests(self, name: str, now_s: float) -> None:
        """A worker was taken out for slowness: forget its answers, judge it anew."""
        worker = self._workers.get(name)
        if worker is not None:
            self._out_of_group(name, worker)
            worker.answers.clear()
            worker.unjudged = 0
            worker.since_s, worker.anew = now_s, True

    def gone(self, name: str) -> None:
        """A worker left: nothing is kept of it."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            self._out_of_group(name, worker)

    def _out_of_group(self, name: str, worker: _Worker) -> None:
        group = self._groups.get(worker.group)
        if group is not None:
            group.pop(name, None)
            if not group:
                del self._groups[worker.group]

    def _judged(self, name: str, worker: _Worker, now_s: float) -> Verdict | None:
        answers = worker.answers
        while answers[0].at_s < now_s - YOUNG_S:  # the newest is of now
            answers.popleft()
        self._out_of_group(name, worker)
        count = len(answers)
        if count < (ANSWERS_ANEW if worker.anew else ENOUGH_ANSWERS):
            return None
        usual = _usual(answers)
        peers = self._peers(worker.group, now_s)
        if count >= ENOUGH_ANSWERS:
            self._groups.setdefault(worker.group, OrderedDict())[name] = usual
        if len(peers) < ENOUGH_PEERS:
            return None
        ratios = sorted(self._ratio(usual, peer) for peer in peers)
        ratio = ratios[(len(ratios) - 1) // 2]  # of two the smaller one
        quick = ratio <= self._quick and count >= ENOUGH_ANSWERS
        worker.anew = worker.anew and not quick
        peers_s = median(peer.seconds for peer in peers)
        slow = ratio > self._factor
        return Verdict(ratio, count, usual.seconds, len(peers), peers_s, slow, quick)

    def _peers(self, group: Hashable, now_s: float) -> list[_Usual]:
        known = self._groups.get(group) or OrderedDict[str, _Usual]()
        fresh = (usual for usual in reversed(known.values()) if usual.until_s >= now_s)
        return list(islice(fresh, MOST_PEERS))

    def _ratio(self, usual: _Usual, peer: _Usual) -> float:
        """Return how many times slower a worker is than a peer, beyond what its load explains."""
        parts = zip(usual.loads, peer.loads, self.measure.idle, strict=True)
        explained = max(1.0, *((own + idle) / (other + idle) for own, other, idle in parts))
        return usual.seconds / max(peer.seconds, self.measure.least_s) / explained


def _usual(answers: Sequence[Answer]) -> _Usual:
    loads = tuple(map(median, zip(*(answer.loads for answer in answers), strict=True)))
    until_s = 0.0
    if len(answers) >= ENOUGH_ANSWERS:
        until_s = answers[-ENOUGH_ANSWERS].at_s + YOUNG_S
    return _Usual(median(answer.seconds for answer in answers), loads, until_s)
