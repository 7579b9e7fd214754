"""Every error this project raises on purpose.

    DisaggError
    ├── ConfigError               the operator's file, flag or environment
    ├── PluginError
    │   ├── PluginLoadError       a plugin could not be imported or registered
    │   └── HookContractError     a hook raised, overran or answered nonsense
    ├── ProtocolError
    │   ├── LocalProtocolError    our bug: we tried to send what the rules forbid
    │   ├── RemoteProtocolError   their bug: the peer sent what the rules forbid
    │   ├── AuthenticationError   the peer does not hold the secret, or its ticket is false or stale
    │   └── IncompatiblePeerError the two sides cannot share KV; names both
    ├── HandoffError
    │   ├── HandoffTimeout        a named wait ended without the thing waited for
    │   ├── HandoffAborted        one side gave the handoff up
    │   └── StagingFull           the staging bound would be exceeded; wait or stay local
    ├── TransportError            the bytes could not be moved
    ├── PlacementError
    │   └── NoCapacityError       no worker can take the request now
    ├── UnsupportedEngineError    the engine, its version or its model shape is not supported
    ├── DamagedState              what was stored of a canary cannot be what was written
    ├── RolloutRefused            a rollout does not allow this command now
    └── StoreError                the memory of a canary
        ├── StoreUnavailable      it is locked, full or cannot be reached
        └── StoreConflict         another gateway wrote meanwhile, or leads now

Errors carry data as attributes and build their text in ``__str__``: what happened, the values,
what to do. ``retryable`` says whether the same call may succeed later without a change.
"""

from __future__ import annotations


class DisaggError(Exception):
    """The base of every error raised on purpose."""

    retryable: bool = False


class ConfigError(DisaggError):
    """A configuration file, flag or environment variable is wrong.

    Args:
        problem: What is wrong, with the values.
        file: The file it stands in, if any.
        line: The 1-based line, if known.
        key: The dotted key, if known.
        fix: What to do.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.file = file
        self.line = line
        self.key = key
        self.fix = fix

    def __str__(self) -> str:
        where = ""
        if self.file is not None:
            where = self.file if self.line is None else f"{self.file}:{self.line}"
            where += ": "
        key = f"{self.key}: " if self.key else ""
        fix = f" ({self.fix})" if self.fix else ""
        return f"{where}{key}{self.problem}{fix}"


class PluginError(DisaggError):
    """Something about one plugin is wrong; ``plugin`` names it."""

    def __init__(self, plugin: str, problem: str) -> None:
        super().__init__(plugin, problem)
        self.plugin = plugin
        self.problem = problem

    def __str__(self) -> str:
        return f"plugin {self.plugin!r}: {self.problem}"


class PluginLoadError(PluginError):
    """A plugin could not be imported or registered."""


class HookContractError(PluginError):
    """A hook implementation raised, overran its deadline or answered nonsense."""

    def __init__(self, plugin: str, hook: str, problem: str) -> None:
        super().__init__(plugin, problem)
        self.hook = hook

    def __str__(self) -> str:
        return f"plugin {self.plugin!r}, hook {self.hook}: {self.problem}"


class ProtocolError(DisaggError):
    """The rules of the handoff protocol were broken."""


class LocalProtocolError(ProtocolError):
    """We tried to do what the protocol forbids: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol forbids."""


class AuthenticationError(ProtocolError):
    """The peer does not hold the secret, or a ticket is false, foreign or expired."""


class IncompatiblePeerError(ProtocolError):
    """The two sides cannot share KV.

    Args:
        mismatches: One ``(field, ours, theirs)`` triple for each thing that differs.
        ours: The name of this side.
        theirs: The name of the peer.
    """

    def __init__(self, mismatches: list[tuple[str, object, object]], *, ours: str, theirs: str):
        super().__init__(mismatches)
        self.mismatches = mismatches
        self.ours = ours
        self.theirs = theirs

    def __str__(self) -> str:
        parts = "; ".join(
            f"{field}: {self.ours} has {a!r}, {self.theirs} has {b!r}"
            for field, a, b in self.mismatches
        )
        return (
            f"{self.ours} and {self.theirs} cannot share KV: {parts}. "
            "Run both workers with the same model, revision and dtype."
        )


class HandoffError(DisaggError):
    """One handoff went wrong; ``handoff_id`` names it."""

    def __init__(self, handoff_id: str, problem: str) -> None:
        super().__init__(handoff_id, problem)
        self.handoff_id = handoff_id
        self.problem = problem

    def __str__(self) -> str:
        return f"handoff {self.handoff_id}: {self.problem}"


class HandoffTimeout(HandoffError):
    """A named wait ended without the thing waited for.

    Args:
        handoff_id: The handoff.
        waited_for: What did not come.
        setting: The policy key of the time-out.
        timeout_s: Its value in seconds.
    """

    retryable = True

    def __init__(self, handoff_id: str, waited_for: str, *, setting: str, timeout_s: float) -> None:
        super().__init__(
            handoff_id, f"no {waited_for} within {timeout_s:g} s (policy key {setting})"
        )
        self.waited_for = waited_for
        self.setting = setting
        self.timeout_s = timeout_s


class HandoffAborted(HandoffError):
    """One side gave the handoff up: cancelled, expired, unknown or already ended."""


class StagingFull(HandoffError):
    """Publishing would exceed the staging bound; wait, or keep the request local."""

    retryable = True

    def __init__(self, handoff_id: str, *, wanted_bytes: int, free_bytes: int, bound_bytes: int):
        super().__init__(
            handoff_id,
            f"needs {wanted_bytes} bytes of staging, {free_bytes} of {bound_bytes} are free; "
            "raise handoff.staging_bytes or lower the number of requests in flight",
        )
        self.wanted_bytes = wanted_bytes
        self.free_bytes = free_bytes
        self.bound_bytes = bound_bytes


class TransportError(DisaggError):
    """The bytes could not be moved: refused, reset, closed early or stalled."""

    retryable = True

    def __init__(self, transport: str, problem: str) -> None:
        super().__init__(transport, problem)
        self.transport = transport
        self.problem = problem

    def __str__(self) -> str:
        return f"transport {self.transport}: {self.problem}"


class PlacementError(DisaggError):
    """No placement satisfies what was asked."""


class NoCapacityError(PlacementError):
    """No worker can take the request now; ``status`` is the HTTP status, 429 or 503.

    ``taken`` says that a prefill worker that fits is there, with all its slots taken.
    """

    retryable = True

    def __init__(
        self, problem: str, *, retry_after_s: float, status: int = 503, taken: bool = False
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.taken = taken
        self.retry_after_s = retry_after_s
        self.status = status


class UnsupportedEngineError(DisaggError):
    """The engine, its version or the model's shape is not supported."""


class DamagedState(DisaggError):
    """Stored evidence of a canary is not what was written: going on from it could be wrong."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}; begin the canary anew, without this state"


class RolloutRefused(DisaggError):
    """A rollout does not allow a command in the state it is in."""

    def __init__(self, command: str, problem: str) -> None:
        super().__init__(command, problem)
        self.command = command
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.command} is not possible: {self.problem}"


class StoreError(DisaggError):
    """The memory of a canary did not do what was asked; ``store`` names it, never its password."""

    def __init__(self, store: str, problem: str) -> None:
        super().__init__(store, problem)
        self.store = store
        self.problem = problem

    def __str__(self) -> str:
        return f"canary store {self.store}: {self.problem}"


class StoreUnavailable(StoreError):
    """The store is locked, full or out of reach; nothing was written."""

    retryable = True


class StoreConflict(StoreError):
    """Somebody else wrote meanwhile, or leads now; nothing was written: read again."""

    retryable = True
