"""The plugin host: loads plugins one by one and is the typed way to everything they offer.

A plugin that cannot be loaded is kept in ``failures`` and never stops the host. What plugins
decide goes through the typed facades: ``scheduler`` and ``connector``.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from disagg_plugins import hookspecs
from disagg_plugins.builtins import builtin_candidates
from disagg_plugins.errors import HookContractError, PluginLoadError
from disagg_plugins.handoff.choice import ConnectorHooks
from disagg_plugins.hook_calls import FailureKind, HookCalls, Implementation, NonsenseError
from disagg_plugins.placement.hooks import PlacementHooks
from disagg_plugins.plugin_loading import (
    Candidate,
    HookManager,
    entry_point_candidates,
    given_candidates,
    instantiate,
    known_hooks,
    register,
    split_duplicates,
)
from disagg_plugins.plugin_threads import (
    BusyError,
    OverranError,
    PluginThread,
    RaisedError,
)
from disagg_plugins.policy import PluginPolicy, Policy
from disagg_plugins.scheduling.hooks import SchedulerHooks
from disagg_plugins.types import TransportCapabilities

if TYPE_CHECKING:
    from types import TracebackType

    import pluggy

    from disagg_plugins.cli.checks import Check
    from disagg_plugins.cli.command import Command
    from disagg_plugins.gateway.dialect import Dialect
    from disagg_plugins.handoff.interfaces import Transport
    from disagg_plugins.launch.interfaces import Launcher

LOG = logging.getLogger(__name__)

TRACE_VARIABLE = "DISAGG_TRACE_HOOKS"
"""Set to 1 to have every hook call printed to standard error."""

T = TypeVar("T")

PluginState = Literal["on", "off", "failed", "disabled"]
"""``off``: switched off while running. ``failed``: never loaded. ``disabled``: by the policy."""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """What is known of one plugin.

    Attributes:
        name: The entry point's name.
        version: Version of its distribution.
        distribution: The distribution it came with, ``built-in`` or ``given``.
        trusted: Whether it runs inline.
        hooks: The hooks it implements.
        state: See ``PluginState``.
        problem: Why it is not on, or an empty string.
    """

    name: str
    version: str
    distribution: str
    trusted: bool
    hooks: tuple[str, ...]
    state: PluginState
    problem: str = ""


class PluginHost:
    """The plugins of one process. Thread-safe once loaded.

    Attributes:
        scheduler: The scheduler hooks.
        connector: The KV connector hooks.
        placement: The placement hooks that have a caller.

    Use ``load``; close it, or use it as a context manager, to end the plugins' threads.
    """

    def __init__(self, policy: PluginPolicy, *, trace: Callable[[str], None] | None) -> None:
        self._policy = policy
        self._manager = HookManager("disagg_plugins")
        self._manager.add_hookspecs(hookspecs)
        self._failures: list[PluginLoadError] = []
        self._infos: dict[Candidate, PluginInfo] = {}
        self._trusted: set[str] = set()
        self._threads: dict[str, PluginThread] = {}
        self._offers: dict[str, dict[str, object]] = {}
        self._names: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self._told: Policy | None = None
        self._implementations: dict[str, tuple[Implementation, ...]] = {}
        self._calls = HookCalls(
            self._implementations,
            deadline_s=policy.deadline_s,
            strikes=policy.strikes,
            trace=trace,
        )
        self.scheduler = SchedulerHooks(self._calls)
        self.connector = ConnectorHooks(self._calls)
        self.placement = PlacementHooks(self._calls)

    @classmethod
    def load(
        cls,
        policy: PluginPolicy | None = None,
        *,
        builtins: bool = True,
        entry_points: bool = True,
        extra: Iterable[tuple[str, object]] = (),
    ) -> PluginHost:
        """Return a host with every plugin that can be loaded.

        Args:
            policy: The plugin section of the policy; None: its defaults.
            builtins: Whether to load the built-in plugins.
            entry_points: Whether to load installed plugins.
            extra: Names and plugin objects, treated like third-party plugins.
        """
        trace = _print_trace if os.environ.get(TRACE_VARIABLE) == "1" else None
        host = cls(policy or PluginPolicy(), trace=trace)
        third = given_candidates(extra)
        own: list[Candidate] = []
        for candidate in entry_point_candidates() if entry_points else []:
            (own if candidate.trusted else third).append(candidate)
        if builtins:
            own.extend(builtin_candidates())
        third.sort(key=lambda c: c.name)
        host._load_all([*third, *own])
        return host

    def __enter__(self) -> PluginHost:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the plugins' threads, each within the deadline of a hook call; idempotent."""
        with self._lock:
            threads = dict(self._threads)
            self._threads.clear()
        for name, thread in threads.items():
            if not thread.close(self._policy.deadline_s):
                LOG.warning("plugin %r still runs a call that overran; it is left behind", name)

    @property
    def failures(self) -> tuple[PluginLoadError, ...]:
        """Return what could not be loaded, and names that were taken."""
        with self._lock:
            return tuple(self._failures)

    @property
    def counts(self) -> dict[tuple[str, str, FailureKind], int]:
        """Return how often each (plugin, hook, kind) failed."""
        return self._calls.counts

    @property
    def errors(self) -> tuple[HookContractError, ...]:
        """Return the latest failures of hook calls, oldest first."""
        return self._calls.errors

    def start(self, policy: Policy) -> None:
        """Tell every plugin the policy, unless it is the one they know already.

        A plugin that raises or overruns is switched off and added to ``failures``.
        """
        with self._lock:
            if self._told == policy:
                return
            self._told = policy
        self._warn_unknown("plugins.settings", policy.plugins.settings)
        arguments = {"policy": policy}
        for error in self._calls.tell(
            "disagg_on_start", arguments, deadline_s=self._policy.start_s
        ):
            self._calls.switch_off(error.plugin, error.problem)
            self._fail(PluginLoadError(error.plugin, f"did not start: {error.problem}"))

    def describe(self) -> tuple[PluginInfo, ...]:
        """Return every plugin found, loaded or not, in the order in which they are asked."""
        off = self._calls.switched_off
        with self._lock:
            infos = list(self._infos.values())
        return tuple(
            PluginInfo(i.name, i.version, i.distribution, i.trusted, i.hooks, "off", off[i.name])
            if i.state == "on" and i.name in off
            else i
            for i in infos
        )

    def transports(self) -> dict[str, Transport]:
        """Return the transports by name."""
        return self._offered("disagg_register_transports", _check_transport)

    def dialects(self) -> dict[str, Dialect]:
        """Return the dialects by engine name."""
        return self._offered("disagg_register_dialects", _named("dialect", "engine"))

    def launchers(self) -> dict[str, Launcher]:
        """Return the launchers by engine name."""
        return self._offered("disagg_register_launchers", _named("launcher", "engine"))

    def checks(self) -> dict[str, Check]:
        """Return the doctor's checks by name."""
        return self._offered("disagg_register_checks", _named("check", "name"))

    def commands(self) -> dict[str, Command]:
        """Return the subcommands by name."""
        return self._offered("disagg_register_commands", _named("command", "name"))

    def _load_all(self, candidates: Sequence[Candidate]) -> None:
        unique, duplicates = split_duplicates(candidates)
        self._names = tuple(c.name for c in candidates)
        self._warn_unknown("plugins.disabled", self._policy.disabled)
        for candidate in candidates:
            if candidate not in unique:
                error = duplicates.pop(0)
                self._note(candidate, (), "failed", error.problem)
                self._fail(error)
        loaded = [(c, self._load_one(c)) for c in unique if not self._disabled(c)]
        # pluggy asks the plugin registered last first.
        for candidate, plugin in reversed(loaded):
            if plugin is None:
                continue
            try:
                hooks = register(self._manager, candidate.name, plugin)
            except PluginLoadError as exc:
                self._note(candidate, (), "failed", exc.problem)
                self._fail(exc)
                self._drop_thread(candidate.name)
                continue
            self._note(candidate, hooks, "on")
            if candidate.trusted:
                self._trusted.add(candidate.name)
        for hook in known_hooks(self._manager):
            caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
            self._implementations[hook] = tuple(
                Implementation(
                    i.plugin_name, hook, i.function, i.argnames, self._threads.get(i.plugin_name)
                )
                for i in reversed(caller.get_hookimpls())
            )
        self._infos = {c: self._infos[c] for c in candidates}

    def _load_one(self, candidate: Candidate) -> object | None:
        """Return the plugin object, or None after noting why there is none."""
        name = candidate.name
        try:
            if candidate.trusted:
                return instantiate(name, candidate.load())
            thread = self._threads.setdefault(name, PluginThread(name))
            return thread.call(lambda: instantiate(name, candidate.load()), self._policy.start_s)
        except PluginLoadError as exc:
            error = exc
        except RaisedError as exc:
            error = _import_error(name, exc.cause)
        except (OverranError, BusyError) as exc:
            error = PluginLoadError(name, f"did not load: {exc} (policy key plugins.start_s)")
        except Exception as exc:  # whatever an import may raise
            error = _import_error(name, exc)
        self._note(candidate, (), "failed", error.problem)
        self._fail(error)
        self._drop_thread(name)
        return None

    def _drop_thread(self, plugin: str) -> None:
        thread = self._threads.pop(plugin, None)
        if thread is not None:
            thread.close(0.0)  # it ends by itself, once the import that overran returns

    def _disabled(self, candidate: Candidate) -> bool:
        if candidate.name not in self._policy.disabled:
            return False
        self._note(candidate, (), "disabled", "disabled by the policy (plugins.disabled)")
        return True

    def _warn_unknown(self, key: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._names:
                close = difflib.get_close_matches(name, self._names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                LOG.warning("%s names plugin %r, which is not installed%s", key, name, hint)

    def _note(
        self, candidate: Candidate, hooks: tuple[str, ...], state: PluginState, problem: str = ""
    ) -> None:
        self._infos[candidate] = PluginInfo(
            candidate.name,
            candidate.version,
            candidate.distribution,
            candidate.trusted,
            hooks,
            state,
            problem,
        )

    def _fail(self, error: PluginLoadError) -> None:
        with self._lock:
            self._failures.append(error)
        LOG.error("%s", error)

    def _offered(self, hook: str, check_item: Callable[[object], str]) -> dict[str, T]:
        """Return what plugins register with ``hook`` by name; asks them once."""
        with self._lock:
            if hook not in self._offers:
                self._offers[hook] = self._collect(hook, check_item)
            return cast("dict[str, T]", dict(self._offers[hook]))

    def _collect(self, hook: str, check_item: Callable[[object], str]) -> dict[str, object]:
        def check(answer: object) -> list[tuple[str, object]]:
            if not isinstance(answer, Sequence) or isinstance(answer, (str, bytes)):
                raise NonsenseError(f"answered {type(answer).__name__}, not a list")
            return [(check_item(item), item) for item in answer]

        offers: dict[str, object] = {}
        owners: dict[str, str] = {}
        answers = self._calls.every(hook, check, {}, deadline_s=self._policy.start_s)
        # What the project itself offers cannot be replaced silently: trusted plugins first.
        for plugin, items in sorted(answers, key=lambda answer: answer[0] not in self._trusted):
            for name, item in items:
                if name in offers:
                    self._fail(
                        PluginLoadError(
                            plugin,
                            f"{hook}: the name {name!r} is taken by plugin {owners[name]!r}, "
                            "whose offer is used",
                        )
                    )
                    continue
                offers[name], owners[name] = item, plugin
        return offers


def _import_error(name: str, cause: BaseException) -> PluginLoadError:
    error = PluginLoadError(name, f"import raised {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _item_name(what: str, attribute: str, item: object) -> str:
    name = getattr(item, attribute, None)
    if not isinstance(name, str) or not name:
        raise NonsenseError(f"offered a {what} ({type(item).__name__}) without a {attribute!r}")
    return name


def _named(what: str, attribute: str) -> Callable[[object], str]:
    return lambda item: _item_name(what, attribute, item)


def _check_transport(item: object) -> str:
    name = _item_name("transport", "name", item)
    if not isinstance(getattr(item, "capabilities", None), TransportCapabilities):
        raise NonsenseError(f"transport {name!r} states no TransportCapabilities")
    for method in ("listen", "connect"):
        if not callable(getattr(item, method, None)):
            raise NonsenseError(f"transport {name!r} has no method {method}")
    return name


def _print_trace(line: str) -> None:
    print(f"disagg hook: {line}", file=sys.stderr, flush=True)
