"""What ``disagg demo`` starts, as policies, and whether it could be started."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.cli.checks import CheckContext, Level
from disagg_plugins.cli.doctor import run_check
from disagg_plugins.errors import ConfigError
from disagg_plugins.plugins import PluginHost
from disagg_plugins.policy import Policy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from disagg_plugins.cli.checks import Finding
    from disagg_plugins.launch.interfaces import Launcher

GENERATED = "tiny"
"""The model that the reference engine makes itself."""

MODEL = "demo"
"""As clients name it."""

MODEL_FIX = "name the folder of a model"
PYTHON_FIX = "name the python of the environment that has the engine"

START_S = 300.0
"""Longest start of the workers: engines on CPUs take a minute, their first compilation longer."""

LEAST_WORDS = 40
"""Of a prompt that is split."""


def _absolute(path: str) -> str:
    with contextlib.suppress(RuntimeError):  # of a user who is not known here
        return str(Path(path).expanduser().absolute())
    return str(Path(path).absolute())


def launch_python(python: str) -> str:
    """Return an interpreter as a policy anywhere names it; a name is looked up on PATH."""
    if "/" not in python:
        return python
    # Not resolved: a virtual environment is found by the link's own place.
    return _absolute(python)


def policy(args: argparse.Namespace, ports: Sequence[int], gateway: int) -> dict[str, object]:
    """Return the policy of two workers behind a gateway, or of one."""
    roles = ("prefill", "decode") if len(ports) == 2 else ("both",)
    model = args.model if args.model == GENERATED else _absolute(args.model)
    return {
        "model": MODEL,
        "fleet": {
            "workers": [
                {
                    "name": role if len(ports) == 2 else "whole",
                    "engine": args.engine,
                    "role": role,
                    "url": f"http://127.0.0.1:{port}",
                    "launch": {
                        "python": launch_python(args.python),
                        "model": model,
                        "start_s": START_S,
                    },
                }
                for role, port in zip(roles, ports, strict=True)
            ]
        },
        "scheduler": {"split": {"rule": "threshold", "min_prompt_tokens": LEAST_WORDS}},
        "gateway": {"port": gateway, "probe_s": 0.2},
        "telemetry": {"records": "records.jsonl"},
    }


def refuse_unready(args: argparse.Namespace) -> None:
    """Refuse what would not start, before anything starts.

    Raises:
        ConfigError: Nobody starts the engine, or not by what the demo gives; there is no such
            interpreter; or what the doctor's check of the engine calls a problem.
    """
    said = Policy.model_validate(policy(args, (1, 2), 3))
    with PluginHost.load(said.plugins) as host:
        launchers, checks = host.launchers(), host.checks()
        if args.engine not in launchers:
            raise ConfigError(
                f"no plugin installed here starts the engine {args.engine!r}",
                key="--engine",
                fix=f"install its adapter, or choose one of {', '.join(sorted(launchers))}",
            )
        if shutil.which(launch_python(args.python)) is None:
            raise ConfigError(
                f"{args.python!r} is no interpreter that can be run",
                key="--python",
                fix=PYTHON_FIX,
            )
        refuse_unstartable(launchers[args.engine], args)
        if args.model == GENERATED and args.engine != "reference":
            raise ConfigError(f"no model for {args.engine}", key="--model", fix=MODEL_FIX)
        if args.engine not in checks:
            return
        path = (args.run_dir / "split.yaml").absolute()
        context = CheckContext(said, path, frozenset(launchers))
        found = run_check(checks[args.engine], context)
    problems = [finding for finding in found if finding.level is Level.PROBLEM]
    if problems:
        raise refusal(problems)


def refuse_unstartable(launcher: Launcher, args: argparse.Namespace) -> None:
    """Refuse an engine whose launcher needs more than the demo can give.

    Raises:
        ConfigError: In the launcher's words.
    """
    try:
        for name, ports in (("split", (1, 2)), ("whole", (1,))):
            said = Policy.model_validate(policy(args, ports, 3))
            for worker in said.fleet.workers:
                launcher.command(worker, said, (args.run_dir / f"{name}.yaml").absolute())
    except ConfigError as problem:
        raise ConfigError(
            f"the demo cannot start {launcher.engine}: {problem.problem}",
            key="--engine",
            fix="choose another engine, or write a policy of your own and start it with "
            "`disagg up`",
        ) from problem


def refusal(problems: Sequence[Finding]) -> ConfigError:
    """Return what a check of the engine found, told by the options of the demo."""
    said = []
    for finding in problems:
        option, fix = "--python", finding.fix
        if finding.subject.startswith("model of "):
            option, fix = "--model", MODEL_FIX
        elif finding.subject.startswith("interpreter of "):
            fix = PYTHON_FIX
        said.append(f"{option}: {finding.detail} ({fix})")
    return ConfigError("; ".join(dict.fromkeys(said)))
