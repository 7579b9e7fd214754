"""How hook implementations are called: each isolated from the others and from the caller.

pluggy's own multicall lets one implementation that raises end the whole call. Here each one is
asked alone. Built-in plugins run inline; third-party ones on a thread of their own with a
deadline. What goes wrong is counted by (plugin, hook, kind), logged, and skipped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from operator import itemgetter
from types import CoroutineType
from typing import TYPE_CHECKING, Literal, TypeVar

from disagg_plugins.errors import HookContractError
from disagg_plugins.plugin_threads import BusyError, OverranError, PluginThread, RaisedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

LOG = logging.getLogger(__name__)

T = TypeVar("T")

FailureKind = Literal["raised", "overran", "nonsense", "skipped"]
"""``skipped``: not asked, because an earlier call of the plugin still ran."""

FORGIVEN_AFTER_CALLS = 1000
"""Calls in time that forgive one overrun: a pause of the machine now and then is no hang."""

KEPT_ERRORS = 64
"""Errors kept for ``disagg plugins`` and tests; older ones live on in the counts."""


class NonsenseError(Exception):
    """Raised by a check: the answer breaks the hook's contract."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One hook implementation of one plugin.

    Attributes:
        plugin: Name of the plugin.
        hook: Name of the hook.
        function: Called with ``arguments`` in this order.
        arguments: The hook's arguments that it takes.
        thread: Where it runs; None for a trusted plugin, which runs inline.
        take: Returns the values of ``arguments``, of all of the hook's.
    """

    plugin: str
    hook: str
    function: Callable[..., object]
    arguments: tuple[str, ...]
    thread: PluginThread | None
    take: Callable[[Mapping[str, object]], tuple[object, ...]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "take", _taker(self.arguments))


class HookCalls:
    """Calls implementations and keeps the books on those that fail. Thread-safe.

    Args:
        implementations: For each hook, those to ask, in order.
        deadline_s: Bound on one call of a third-party implementation.
        strikes: Overruns until a plugin is switched off.
        trace: Given one line for each call, or None.
    """

    def __init__(
        self,
        implementations: Mapping[str, Sequence[Implementation]],
        *,
        deadline_s: float,
        strikes: int,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self._implementations = implementations
        self._deadline_s = deadline_s
        self._strikes = strikes
        self._trace = trace
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str, FailureKind]] = Counter()
        self._errors: deque[HookContractError] = deque(maxlen=KEPT_ERRORS)
        self._off: dict[str, str] = {}
        self._overruns: Counter[str] = Counter()
        self._calls_in_time: Counter[str] = Counter()

    @property
    def counts(self) -> dict[tuple[str, str, FailureKind], int]:
        """Return how often each (plugin, hook, kind) failed."""
        with self._lock:
            return dict(self._counts)

    @property
    def errors(self) -> tuple[HookContractError, ...]:
        """Return the latest errors, oldest first."""
        with self._lock:
            return tuple(self._errors)

    @property
    def switched_off(self) -> dict[str, str]:
        """Return the plugins that are not asked any more, and why."""
        with self._lock:
            return dict(self._off)

    def first(
        self,
        hook: str,
        check: Callable[[object], T],
        arguments: Mapping[str, object],
        *,
        without: Collection[str] = (),
    ) -> tuple[str, T] | None:
        """Return the first answer that is not None, with the plugin's name.

        Plugins named in ``without`` are not asked.
        """
        for implementation in self._implementations.get(hook, ()):
            if implementation.plugin not in without:
                answer = self._answer(implementation, check, arguments, self._deadline_s, check)
                if answer is not None:
                    return implementation.plugin, answer
        return None

    def every(
        self,
        hook: str,
        check: Callable[[object], T],
        arguments: Mapping[str, object],
        *,
        without: Collection[str] = (),
        deadline_s: float | None = None,
        trusted: Callable[[object], T] | None = None,
    ) -> list[tuple[str, T]]:
        """Return every answer that is not None, with its plugin's name, in order of asking.

        Args:
            hook: The hook.
            check: Returns the answer in the caller's type or raises ``NonsenseError``.
            arguments: All arguments of the hook.
            without: Plugins not to ask.
            deadline_s: In place of the usual deadline.
            trusted: In place of ``check`` for plugins that run inline, where it costs too much.
        """
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        trusted, answers = trusted or check, []
        for implementation in self._implementations.get(hook, ()):
            if implementation.plugin not in without:
                answer = self._answer(implementation, check, arguments, deadline_s, trusted)
                if answer is not None:
                    answers.append((implementation.plugin, answer))
        return answers

    def _answer(
        self,
        implementation: Implementation,
        check: Callable[[object], T],
        arguments: Mapping[str, object],
        deadline_s: float,
        trusted: Callable[[object], T],
    ) -> T | None:
        inline = self._trace is None and implementation.thread is None
        if inline and implementation.plugin not in self._off:
            # as ``_ask`` does, without its books: a decision asks twenty of them
            try:
                return _checked(implementation, arguments, trusted)
            except Exception as exc:  # whatever a trusted plugin raised
                self._raised(implementation, exc)
                return None
        asked = self._ask(implementation, check, arguments, deadline_s)
        return None if isinstance(asked, HookContractError) else asked

    def asks(self, hook: str, *, without: Collection[str] = ()) -> bool:
        """Return whether anybody is asked by ``hook``: arguments nobody reads need no making."""
        return any(each.plugin not in without for each in self._implementations.get(hook, ()))

    def tell(
        self, hook: str, arguments: Mapping[str, object], *, deadline_s: float | None = None
    ) -> list[HookContractError]:
        """Call every implementation, ignore the answers, and return what went wrong."""
        failed = []
        for implementation in self._implementations.get(hook, ()):
            answer = self._ask(implementation, _ignore, arguments, deadline_s or self._deadline_s)
            if isinstance(answer, HookContractError):
                failed.append(answer)
        return failed

    def switch_off(self, plugin: str, why: str) -> None:
        """Ask ``plugin`` nothing any more."""
        with self._lock:
            if plugin in self._off:
                return
            self._off[plugin] = why
        LOG.error("plugin %r is switched off: %s", plugin, why)

    def _ask(
        self,
        implementation: Implementation,
        check: Callable[[object], T],
        arguments: Mapping[str, object],
        deadline_s: float,
    ) -> T | HookContractError | None:
        plugin, thread = implementation.plugin, implementation.thread
        if plugin in self._off:
            return None
        started_s = time.perf_counter() if self._trace is not None else 0.0
        answer: T | HookContractError | None
        try:
            if thread is None:
                answer = _checked(implementation, arguments, check)
            else:
                answer = thread.call(lambda: _checked(implementation, arguments, check), deadline_s)
                if self._overruns[plugin]:
                    self._forgive(plugin)
        except RaisedError as exc:
            answer = self._raised(implementation, exc.cause)
        except OverranError as exc:
            answer = self._failed(implementation, "overran", str(exc))
            self._strike(plugin)
        except BusyError as exc:
            answer = self._failed(implementation, "skipped", str(exc))
        except Exception as exc:  # whatever a trusted plugin raised inline
            answer = self._raised(implementation, exc)
        if self._trace is not None:
            took_us = (time.perf_counter() - started_s) * 1e6
            self._trace(_trace_line(implementation, arguments, answer, took_us))
        return answer

    def _raised(self, implementation: Implementation, cause: BaseException) -> HookContractError:
        if isinstance(cause, NonsenseError):
            return self._failed(implementation, "nonsense", str(cause))
        problem = f"raised {type(cause).__name__}: {_brief(cause)}"
        return self._failed(implementation, "raised", problem, cause)

    def _failed(
        self,
        implementation: Implementation,
        kind: FailureKind,
        problem: str,
        cause: BaseException | None = None,
    ) -> HookContractError:
        error = HookContractError(implementation.plugin, implementation.hook, problem)
        with self._lock:
            key = (implementation.plugin, implementation.hook, kind)
            self._counts[key] += 1
            count = self._counts[key]
            self._errors.append(error)
        if count == 1:
            LOG.warning("%s; its answer is left out", error, exc_info=cause)
        elif str(count).rstrip("0") == "1":
            LOG.warning("%s; %d times by now (%s)", error, count, kind)
        return error

    def _strike(self, plugin: str) -> None:
        with self._lock:
            self._overruns[plugin] += 1
            self._calls_in_time[plugin] = 0
            overruns = self._overruns[plugin]
        if overruns >= self._strikes:
            self.switch_off(plugin, f"overran its deadline {overruns} times")

    def _forgive(self, plugin: str) -> None:
        with self._lock:
            self._calls_in_time[plugin] += 1
            if self._calls_in_time[plugin] >= FORGIVEN_AFTER_CALLS:
                self._calls_in_time[plugin] = 0
                self._overruns[plugin] = max(0, self._overruns[plugin] - 1)


def _taker(names: tuple[str, ...]) -> Callable[[Mapping[str, object]], tuple[object, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda arguments: tuple(arguments[name] for name in names)


def _checked(
    implementation: Implementation,
    arguments: Mapping[str, object],
    check: Callable[[object], T],
) -> T | None:
    value = implementation.function(*implementation.take(arguments))
    if value is None:
        return None
    if type(value) is CoroutineType:
        value.close()
        raise NonsenseError("answered a coroutine; hooks are synchronous")
    return check(value)


def _ignore(_answer: object) -> None:
    return None


def _brief(value: object, limit: int = 200) -> str:
    try:
        text = str(value)
    except Exception as exc:  # a plugin's exception whose own __str__ raises
        return f"<no text: {type(exc).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _trace_line(
    implementation: Implementation,
    arguments: Mapping[str, object],
    answer: object,
    took_us: float,
) -> str:
    names = implementation.arguments
    given = ", ".join(f"{name}={_brief(arguments[name], 80)}" for name in names)
    return (
        f"{implementation.hook}({given}) by {implementation.plugin} "
        f"-> {_brief(answer)} in {took_us:.0f} us"
    )
