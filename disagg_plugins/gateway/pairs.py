"""Which two workers cannot share a handoff, and why (sans-IO).

A fleet of n workers has n squared pairs, so none is kept: a problem is worked out when it is asked
for. What two workers say of themselves decides, so workers that say the same form a class, and
whether there is any problem at all is found by comparing the few classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from disagg_plugins.gateway.dialect import crosses

if TYPE_CHECKING:
    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.types import Worker

Pair = tuple[str, str]
"""Names of a prefill and a decode worker."""

Problem = Callable[["Worker", "Worker"], str | None]


def own_transport(dialect: Dialect | None) -> bool:
    """Return whether an engine carries its handoffs itself; it says ``own_transport = True``.

    No adapter of ours runs in it then, so nobody reports what became of the KV.
    """
    return bool(getattr(dialect, "own_transport", False))


def own_means(prefill: Worker, decode: Worker, dialects: Mapping[str, Dialect]) -> str | None:
    """Return why the engines of two workers keep them from sharing a handoff, or None."""
    if prefill.engine == decode.engine:
        return None
    for worker in (prefill, decode):
        dialect = dialects.get(worker.engine)
        if dialect is not None and not crosses(dialect):
            return (
                f"{worker.engine} hands over by its own means, to {worker.engine} only: "
                f"{prefill.name} is {prefill.engine}, {decode.name} is {decode.engine}"
            )
    return None


class PairProblems(Mapping[Pair, str]):
    """Why two workers cannot share a handoff; pairs that can are absent.

    Looking a pair up is cheap, and so is asking whether there is any problem. Iterating looks at
    every pair.

    Args:
        workers: Of the fleet, by name, in the policy's order.
        problem: Returns what keeps a prefill and a decode worker apart, or None.
        kind: Returns what decides about a worker; workers of equal kind are alike.
    """

    def __init__(
        self,
        workers: Mapping[str, Worker],
        problem: Problem,
        kind: Callable[[Worker], object],
    ) -> None:
        self._workers = workers
        self._problem = problem
        self._kind = kind
        self._kinds: dict[str, object] = {}
        self._of_kind: dict[object, dict[str, Worker]] = {}
        self._found: tuple[str, ...] | None = None

    def changed(self, worker: Worker) -> None:
        """Look anew at a worker that joined or has said something of itself."""
        self.gone(worker.name)
        kind = self._kinds[worker.name] = self._kind(worker)
        self._of_kind.setdefault(kind, {})[worker.name] = worker

    def gone(self, name: str) -> None:
        """Forget a worker."""
        self._found = None
        if name in self._kinds:
            kind = self._kinds.pop(name)
            alike = self._of_kind[kind]
            del alike[name]
            if not alike:
                del self._of_kind[kind]

    def texts(self) -> tuple[str, ...]:
        """Return the problems, one for each two kinds of workers that have one."""
        if self._found is None:
            firsts = [next(iter(alike.values())) for alike in self._of_kind.values()]
            problems = [self._problem(p, d) for p in firsts for d in firsts]
            for alike in self._of_kind.values():  # two workers of one kind may not fit either
                problems += [self._problem(p, d) for p, d in _two_of(alike)]
            self._found = tuple(dict.fromkeys(text for text in problems if text is not None))
        return self._found

    def __bool__(self) -> bool:
        return bool(self.texts())

    def __getitem__(self, pair: Pair) -> str:
        prefill, decode = (self._workers.get(name) for name in pair)
        text = self._problem(prefill, decode) if prefill and decode else None
        if text is None:
            raise KeyError(pair)
        return text

    def get(self, pair: Pair, default: object = None) -> str | None:  # type: ignore[override]
        """Return the problem of a pair, or None: what the scheduler asks most, without raising."""
        prefill, decode = self._workers.get(pair[0]), self._workers.get(pair[1])
        return self._problem(prefill, decode) if prefill and decode else None

    def __iter__(self) -> Iterator[Pair]:
        names = list(self._workers)
        return (pair for p in names for d in names if self.get(pair := (p, d)) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Across(Mapping[Pair, str]):
    """The problems of a fleet, and one more for every pair of two engines.

    Args:
        known: The problems of the fleet.
        workers: By name.
        why: What keeps workers of unlike engines apart.
    """

    def __init__(self, known: Mapping[Pair, str], workers: Mapping[str, Worker], why: str) -> None:
        self._known = known
        self._workers = workers
        self._why = why

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, pair: Pair) -> str:
        known = self._known.get(pair)
        if known is not None:
            return known
        prefill, decode = (self._workers.get(name) for name in pair)
        if prefill is None or decode is None or prefill.engine == decode.engine:
            raise KeyError(pair)
        return self._why

    def __iter__(self) -> Iterator[Pair]:
        names = list(self._workers)
        return (pair for p in names for d in names if (pair := (p, d)) in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _two_of(alike: Mapping[str, Worker]) -> list[tuple[Worker, Worker]]:
    workers = iter(alike.values())
    first, second = next(workers, None), next(workers, None)
    return [] if first is None or second is None else [(first, second)]
