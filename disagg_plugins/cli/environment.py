"""Doctor's checks that no engine knows of: this machine, the policy, and its workers."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil

from disagg_plugins import __version__
from disagg_plugins.build_kind import build_kind
from disagg_plugins.cli.checks import CheckContext, Finding, Level
from disagg_plugins.credentials import read_secret
from disagg_plugins.errors import ConfigError
from disagg_plugins.launch.local import check_port_free
from disagg_plugins.policy_pairs import UNLIKE_FIX
from disagg_plugins.types import Role

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

if TYPE_CHECKING:
    from disagg_plugins.policy import Policy, WorkerPolicy
    from disagg_plugins.policy_pairs import EnginePairs

PYTHON_NEEDED = (3, 11)

OPEN_FILES_A_REQUEST = 3
"""The client's connection, and one to each of the two workers."""

ANSWER_S = 3.0
HTTP_OK = 200
ANY_ADDRESS = ("0.0.0.0", "::")
MAX_ANSWER_BYTES = 1 << 20
MIB = 1 << 20


class EnvironmentCheck:
    """This machine and what the policy asks of it."""

    name = "environment"

    def run(self, context: CheckContext) -> Sequence[Finding]:
        """Return the findings; waits for nothing."""
        return list(self._run(context))

    def _run(self, context: CheckContext) -> Iterator[Finding]:
        version = platform.python_version()
        if sys.version_info >= PYTHON_NEEDED:
            yield Finding(Level.OK, "python", f"{version} at {sys.executable}")
        else:
            needed = ".".join(map(str, PYTHON_NEEDED))
            yield Finding(Level.PROBLEM, "python", version, f"use Python {needed} or newer")
        yield Finding(Level.OK, "disagg-plugins", f"{__version__}, {build_kind()}")
        for name in context.unknown_names:
            yield Finding(Level.PROBLEM, "policy", name, "install its plugin, or correct the name")
        for failure in context.plugin_failures:
            yield Finding(
                Level.PROBLEM,
                "plugin",
                failure,
                "correct or uninstall it, or name it in plugins.disabled",
            )
        if context.policy is not None and context.policy_path is not None:
            yield self._secret(context.policy, context.policy_path.parent)
            yield self._open_files(context.policy)
            yield self._memory(context.policy, context.own_transport)
            yield from judge_gateway_port(context.policy)

    def _secret(self, policy: Policy, base: Path) -> Finding:
        try:
            read_secret(policy.secret, base)
        except ConfigError as problem:
            name, fix = policy.secret.env, problem.fix or "see the policy's secret section"
            if name is None or not all(w.launch for w in policy.fleet.workers):
                return Finding(Level.PROBLEM, "secret", problem.problem, fix)
            if name in os.environ:  # and wrong: `disagg up` makes one only where none is set
                fix += f", or unset {name}: `disagg up` then makes one for its own run"
                return Finding(Level.PROBLEM, "secret", problem.problem, fix)
            note = " (`disagg up` makes one for its own run)"
            return Finding(Level.WARNING, "secret", problem.problem + note, fix)
        return Finding(Level.OK, "secret", "can be read")

    def _open_files(self, policy: Policy) -> Finding:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = policy.gateway.max_requests * OPEN_FILES_A_REQUEST
        if soft != resource.RLIM_INFINITY and soft < needed:
            return Finding(
                Level.WARNING,
                "open files",
                f"{soft} allowed (hard limit {hard}), {policy.gateway.max_requests} requests at "
                f"once (gateway.max_requests) need {needed}",
                f"ulimit -n {needed}, or lower gateway.max_requests",
            )
        return Finding(Level.OK, "open files", f"{soft} allowed, at most {needed} needed")

    def _memory(self, policy: Policy, own_transport: frozenset[str]) -> Finding:
        local = [
            w
            for w in policy.fleet.workers
            if w.role.serves(Role.PREFILL)
            and urlsplit(w.url).hostname in LOOPBACK
            and w.engine not in own_transport
        ]
        staging_bytes = policy.handoff.staging_bytes * len(local)
        available_bytes = psutil.virtual_memory().available
        if not local:
            detail = f"no worker here stages KV, {available_bytes // MIB} MiB are available"
            return Finding(Level.OK, "memory", detail)
        detail = (
            f"staging of {len(local)} prefill workers takes up to {staging_bytes // MIB} MiB, "
            f"{available_bytes // MIB} MiB are available"
        )
        if staging_bytes * 2 > available_bytes:
            return Finding(Level.WARNING, "memory", detail, "lower handoff.staging_bytes")
        return Finding(Level.OK, "memory", detail)


def judge_gateway_port(policy: Policy) -> Iterator[Finding]:
    """Yield a finding if something listens on the gateway's port."""
    host, port = policy.gateway.host, policy.gateway.port
    url = f"http://{'127.0.0.1' if host in ANY_ADDRESS else host}:{port}"
    try:
        status, _ = get_json(url, "/internal/status")
    except OSError:
        return
    except HTTPException:
        status = 0
    if status == HTTP_OK:
        yield Finding(Level.OK, "gateway", f"runs at {url}; ask it with --live {url}")
    else:
        yield Finding(
            Level.PROBLEM,
            "gateway",
            f"{url} is in use by something that is not this project's gateway",
            "end that program, or choose another gateway.port",
        )


def judge_pairs(pairs: EnginePairs | None) -> list[Finding]:
    """Return a finding for each two kinds of workers whose engines keep them apart."""
    if pairs is None:
        return []
    level = Level.WARNING if pairs.possible else Level.PROBLEM
    return [Finding(level, "pairs", problem, UNLIKE_FIX) for problem in pairs.problems]


def get_json(url: str, path: str) -> tuple[int, Any]:
    """Return status and decoded answer of a GET, bounded in time and size; None: not JSON.

    Raises:
        OSError: Nobody answers.
        HTTPException: What answers does not speak HTTP.
    """
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_BYTES)
        try:
            return answer.status, json.loads(body)
        except ValueError:
            return answer.status, None
    finally:
        connection.close()


class WorkersCheck:
    """The policy's workers: is there a dialect, do they answer, do they serve one model?"""

    name = "workers"

    def run(self, context: CheckContext) -> Sequence[Finding]:
        """Return one finding a worker, and those of the fleet: models that differ, bad pairs."""
        if context.policy is None:
            return []
        findings: list[Finding] = []
        models: dict[str, list[str]] = {}
        for worker in context.policy.fleet.workers:
            if worker.engine not in context.engines:
                known = ", ".join(sorted(context.engines)) or "none"
                findings.append(
                    Finding(
                        Level.PROBLEM,
                        worker.name,
                        f"no plugin speaks to the engine {worker.engine!r} (known: {known})",
                        "install its adapter, or correct the worker's engine",
                    )
                )
                continue
            finding, served = self._ask(worker)
            if served is not None:
                models.setdefault(served, []).append(worker.name)
                wanted = context.policy.model
                if wanted is not None and served != wanted:
                    finding = Finding(
                        Level.PROBLEM,
                        worker.name,
                        f"serves {served}, the policy's model is {wanted}",
                        f"start it with --served-model-name {wanted}, or correct `model`",
                    )
            findings.append(finding)
        if len(models) > 1:
            listed = "; ".join(f"{m}: {', '.join(names)}" for m, names in sorted(models.items()))
            findings.append(
                Finding(
                    Level.PROBLEM,
                    "fleet",
                    f"two models in one fleet ({listed})",
                    "start every worker with the same model and the same served name",
                )
            )
        return findings + judge_pairs(context.pairs)

    def _ask(self, worker: WorkerPolicy) -> tuple[Finding, str | None]:
        try:
            status, answer = get_json(worker.url, "/v1/models")
            model = str(answer["data"][0]["id"]) if status == 200 else None
        except OSError:
            return self._silent(worker), None
        except (HTTPException, LookupError, TypeError):
            status, model = 0, None
        if model is None:
            said = f"status {status}" if status else "something else"
            return (
                Finding(
                    Level.PROBLEM,
                    worker.name,
                    f"{worker.url} answers, but not as an engine does ({said} for /v1/models)",
                    "another program may have the port: correct the url, or end that program",
                ),
                None,
            )
        return Finding(Level.OK, worker.name, f"runs at {worker.url} and serves {model}"), model

    def _silent(self, worker: WorkerPolicy) -> Finding:
        if worker.launch is None:
            return Finding(
                Level.WARNING,
                worker.name,
                f"nobody answers at {worker.url}",
                "start the worker, or correct its url",
            )
        try:
            check_port_free(worker)
        except ConfigError as problem:
            return Finding(Level.PROBLEM, worker.name, problem.problem, problem.fix or "")
        return Finding(Level.OK, worker.name, f"does not run; `disagg up` starts it: {worker.url}")
