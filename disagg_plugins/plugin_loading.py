"""Where plugins come from, and what a plugin must be to be taken.

Everything here raises ``PluginLoadError`` for one plugin; the host keeps it and goes on.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pluggy

from disagg_plugins.errors import PluginLoadError
from disagg_plugins.hookspecs import HOOKSPEC_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

ENTRY_POINT_GROUP = "disagg_plugins"
DISTRIBUTION = "disagg-plugins"
"""Entry points of this distribution are trusted: they run inline, without a deadline."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plugin that may be loaded.

    Attributes:
        name: The entry point's name.
        distribution: The distribution it came with, or ``built-in`` or ``given``.
        version: That distribution's version.
        trusted: Whether it runs inline.
        load: Imports it.
    """

    name: str
    distribution: str
    version: str
    trusted: bool
    load: Callable[[], object]


def entry_point_candidates() -> list[Candidate]:
    """Return the plugins that installed distributions name, sorted by name and distribution."""
    candidates = []
    whose: dict[importlib.metadata.Distribution | None, tuple[str, str]] = {
        None: ("unknown", "unknown")
    }
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.dist not in whose and point.dist is not None:  # each question reads its file anew
            whose[point.dist] = point.dist.name, point.dist.version
        distribution, version = whose[point.dist]
        normalised = re.sub(r"[-_.]+", "-", distribution).lower()
        candidates.append(
            Candidate(point.name, distribution, version, normalised == DISTRIBUTION, point.load)
        )
    return sorted(candidates, key=lambda c: (c.name, c.distribution))


def given_candidates(plugins: Iterable[tuple[str, object]]) -> list[Candidate]:
    """Return candidates for plugin objects handed over in the program; not trusted."""
    return [
        Candidate(name, "given", "-", False, partial(_itself, plugin)) for name, plugin in plugins
    ]


def split_duplicates(
    candidates: Sequence[Candidate],
) -> tuple[list[Candidate], list[PluginLoadError]]:
    """Return the candidates whose names are their own, and an error for each other one.

    The first to claim a name keeps it; trusted candidates claim first. Errors are in the order
    of ``candidates``.
    """
    owners: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: not c.trusted):
        owners.setdefault(candidate.name, candidate)
    errors = []
    for candidate in candidates:
        owner = owners[candidate.name]
        if owner is not candidate:
            errors.append(
                PluginLoadError(
                    candidate.name,
                    f"the name is taken: both {owner.distribution} and {candidate.distribution} "
                    f"have a plugin {candidate.name!r}; {owner.distribution}'s is used. Rename "
                    "the entry point or uninstall one",
                )
            )
    return [c for c in candidates if owners[c.name] is c], errors


def instantiate(name: str, loaded: object) -> object:
    """Return the plugin object: a module as it is, a class called without arguments."""
    if not inspect.isclass(loaded):
        return loaded
    try:
        return loaded()
    except Exception as exc:
        raise PluginLoadError(
            name, f"{loaded.__qualname__}() raised {type(exc).__name__}: {exc}"
        ) from exc


class HookManager(pluggy.PluginManager):
    """Looks for hooks in what a plugin defines, and not in what every object has."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        """Return the marker's options of an attribute, or None where it is no hook."""
        everybodys = name.startswith("__") and name.endswith("__")
        return None if everybodys else super().parse_hookimpl_opts(plugin, name)


def register(manager: pluggy.PluginManager, name: str, plugin: object) -> tuple[str, ...]:
    """Register ``plugin`` and return the names of its hooks.

    Raises:
        PluginLoadError: It needs a newer contract, has no hooks, misspells one, forgets the
            marker, or has a wrapper, an ``async`` hook or arguments that the hook does not have.
            Nothing of it stays registered.
    """
    known_as = manager.get_name(plugin)
    if known_as is not None:
        raise PluginLoadError(name, f"it is the same object as plugin {known_as!r}; drop one")
    _check_version(name, plugin)
    _check_marked(manager, name, plugin)
    try:
        manager.register(plugin, name)
    except (pluggy.PluginValidationError, ValueError, TypeError) as exc:
        raise PluginLoadError(name, _one_line(exc)) from exc
    try:
        hooks = _check_hooks(manager, name, plugin)
    except PluginLoadError:
        manager.unregister(plugin, name)
        raise
    return hooks


def known_hooks(manager: pluggy.PluginManager) -> list[str]:
    """Return the names of all specified hooks."""
    return [
        hook
        for hook in vars(manager.hook)
        if hook.startswith("disagg_") and getattr(manager.hook, hook).has_spec()
    ]


def _itself(plugin: object) -> object:
    return plugin


def _check_version(name: str, plugin: object) -> None:
    needed = getattr(plugin, "requires_hookspec", HOOKSPEC_VERSION)
    if not isinstance(needed, int) or needed > HOOKSPEC_VERSION:
        raise PluginLoadError(
            name,
            f"needs version {needed!r} of the hook contract, this release has {HOOKSPEC_VERSION}; "
            f"upgrade {DISTRIBUTION}",
        )


def _check_marked(manager: pluggy.PluginManager, name: str, plugin: object) -> None:
    names = set(dir(plugin))
    for hook in known_hooks(manager):
        if hook not in names:
            continue
        found = inspect.getattr_static(plugin, hook, None)
        function = getattr(found, "__func__", found)
        if inspect.isfunction(function) and not hasattr(function, "disagg_plugins_impl"):
            raise PluginLoadError(
                name, f"{hook} is not marked as a hook; put @disagg_plugins.hookimpl above it"
            )


def _check_hooks(manager: pluggy.PluginManager, name: str, plugin: object) -> tuple[str, ...]:
    callers = manager.get_hookcallers(plugin) or []
    names = known_hooks(manager)
    hooks = []
    for caller in callers:
        for implementation in caller.get_hookimpls():
            if implementation.plugin is not plugin:
                continue
            if not caller.has_spec():
                if implementation.optionalhook:
                    continue
                close = difflib.get_close_matches(caller.name, names, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise PluginLoadError(name, f"there is no hook {caller.name}{hint}")
            if implementation.hookwrapper or implementation.wrapper:
                raise PluginLoadError(
                    name, f"{caller.name} is a wrapper; wrappers are refused, answer instead"
                )
            _check_function(name, caller, implementation)
            hooks.append(caller.name)
    if not hooks:
        raise PluginLoadError(name, "it has no hooks; mark functions with @disagg_plugins.hookimpl")
    return tuple(sorted(hooks))


def _check_function(name: str, caller: pluggy.HookCaller, implementation: pluggy.HookImpl) -> None:
    function = inspect.unwrap(implementation.function)
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
    ):
        raise PluginLoadError(
            name,
            f"{caller.name} is async or a generator; hooks are plain functions that answer at "
            "once: do I/O outside and answer from what you know",
        )
    defaults = set(implementation.kwargnames)
    if caller.spec is not None and defaults.intersection(caller.spec.argnames):
        raise PluginLoadError(
            name,
            f"{caller.name} gives defaults to {', '.join(sorted(defaults))}; the host always "
            "passes these arguments: drop the defaults",
        )


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())
