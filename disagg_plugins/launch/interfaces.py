"""What an engine's adapter tells the core about starting a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from disagg_plugins.policy import Policy, WorkerPolicy


@dataclass(frozen=True, slots=True)
class LaunchCommand:
    """How one worker is started.

    Attributes:
        argv: The program and its arguments. Never holds a secret: everyone on the machine can
            read it.
        env: Environment variables added to those of the launching process, over which they win.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


class Launcher(Protocol):
    """Knows how one engine's server is started; offered by ``disagg_register_launchers``."""

    engine: str
    """The engine it starts, as ``engine`` of a policy's workers names it."""

    def command(self, worker: WorkerPolicy, policy: Policy, policy_path: Path) -> LaunchCommand:
        """Return how ``worker`` is started; does no I/O beyond looking at paths.

        Args:
            worker: A worker whose ``launch`` is set.
            policy: The whole policy.
            policy_path: The absolute path of its file; relative paths in ``launch`` start at its
                folder.

        Raises:
            ConfigError: The policy asks for what the engine cannot do.
        """
        ...
