"""Pieces of an engine's command line that every launcher needs: program, model, flags, CPUs."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError

if TYPE_CHECKING:
    from disagg_plugins.policy import Launch


def find_python(launch: Launch, base: Path, *, worker: str) -> str:
    """Return the interpreter's path: names are looked up on PATH, paths start at ``base``.

    Raises:
        ConfigError: There is no such program.
    """
    if "/" in launch.python:
        # Not resolved: a virtual environment is found by the link's own place.
        path = base / Path(launch.python).expanduser()
        found = str(path) if path.is_file() else None
    else:
        found = shutil.which(launch.python)
    if found is None:
        raise ConfigError(
            f"worker {worker}: there is no interpreter {launch.python!r}",
            key=f"fleet.workers.{worker}.launch.python",
            fix="name the python of the environment that has the engine, "
            "from the policy file's folder",
        )
    return found


def find_model(model: str, base: Path) -> str:
    """Return the absolute path of a model folder beside the policy, or the hub name unchanged."""
    path = base / Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def refuse_flags(
    args: Sequence[str], ours: Mapping[str, str], policy_path: Path, *, worker: str
) -> None:
    """Refuse flags that follow from the policy.

    Args:
        args: What the policy gives as ``launch.args``.
        ours: Flag to the key of the policy that it comes from.
        policy_path: The policy's file, for the message.
        worker: The worker's name.

    Raises:
        ConfigError: One of them is given, as ``--flag`` or as ``--flag=value``.
    """
    for arg in args:
        flag = arg.partition("=")[0]
        if flag in ours:
            raise ConfigError(
                f"worker {worker}: {flag} is set by {ours[flag]}",
                file=str(policy_path),
                key=f"fleet.workers.{worker}.launch.args",
                fix="leave the flag out",
            )


def whole_number(args: Sequence[str], flags: Collection[str]) -> int:
    """Return the number that a flag gives, by any of its names; 1 without the flag.

    Raises:
        ConfigError: What the flag gives is no whole number from 1.
    """
    for index, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag in flags:
            text = value if equals else args[index + 1] if index + 1 < len(args) else ""
            if text.isdigit() and int(text) >= 1:
                return int(text)
            raise ConfigError(f"{flag} needs a whole number, got {text!r}", key="launch.args")
    return 1


def threads_bind(cpus: Sequence[int], ranks: int) -> str:
    """Return the CPUs of each rank in turn, parted by ``|``, as vLLM and SGLang both read them.

    Raises:
        ConfigError: There are fewer CPUs than ranks.
    """
    if len(cpus) < ranks:
        raise ConfigError(
            f"{ranks} ranks cannot share {len(cpus)} CPUs",
            key="launch.cpus",
            fix="name at least one CPU a rank, or none at all",
        )
    share = len(cpus) // ranks
    pieces = [cpus[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return "|".join(",".join(map(str, piece)) for piece in pieces)
