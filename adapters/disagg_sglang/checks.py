"""What ``disagg doctor`` asks about SGLang: is it there, and will it take the transfer backend?

Imports no engine. Names and behaviour are SGLang 0.5.23's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.cli.checks import Finding, Level
from disagg_plugins.cli.engine_check import (
    ENTRY_POINT,
    Answer,
    EngineCheck,
    Question,
    judge_plugin,
)
from disagg_plugins.types import Role
from disagg_sglang.launcher import POLICY_ENV
from disagg_sglang.patches import HOOKED

if TYPE_CHECKING:
    from disagg_plugins.policy import WorkerPolicy

DOOR = (
    "sglang.srt.plugins.hook_registry.HookRegistry",
    "sglang.srt.disaggregation.utils.TransferBackend",
)
"""What lets the hooks in, and the enumeration that gets one more member."""

WRITTEN_FOR = "0.5.23"

SUBJECT = "transfer backend"

WHITELIST = "SGLANG_PLUGINS"
"""Names, parted by commas, of all plugins that SGLang loads; empty or unset: no limit."""


class SglangCheck(EngineCheck):
    """Asks each interpreter that starts an SGLang worker; without a policy, this one."""

    name = "sglang"
    question = Question(
        package="sglang",
        group="sglang.srt.plugins",
        distributions=("sglang", "torch"),
        paths=(*DOOR, *HOOKED),
    )

    def judge(self, python: str, answer: Answer, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield what is right and wrong with SGLang, torch and the backend, in this order."""
        if not answer.installed:
            yield Finding(
                Level.PROBLEM,
                "sglang",
                f"not installed for {python}",
                f"uv pip install --python {python} sglang",
            )
            return
        version = answer.versions["sglang"] or "(no version)"
        torch = answer.versions["torch"]
        if answer.missing:
            yield Finding(
                Level.PROBLEM,
                "sglang",
                f"sglang {version} in {python} lacks what this release hooks: "
                f"{', '.join(answer.missing)}",
                f"uv pip install --python {python} sglang=={WRITTEN_FOR}",
            )
        else:
            beside = f" with torch {torch}" if torch else ""
            yield Finding(Level.OK, "sglang", f"sglang {version}{beside} in {python}")
        if torch is None:
            yield Finding(
                Level.PROBLEM,
                "torch",
                f"not installed for {python}: importing SGLang fails",
                f"uv pip install --python {python} torch",
            )
        yield judge_plugin(
            python,
            answer,
            self.question,
            subject=SUBJECT,
            engine="SGLang",
            barred=_barred(env.get(WHITELIST, "")),
        )

    def judge_worker(self, worker: WorkerPolicy, policy_path: Path) -> Iterator[Finding]:
        """Yield what is right and wrong with the worker's model and with its policy."""
        yield from super().judge_worker(worker, policy_path)
        if worker.launch is None or worker.role is Role.BOTH:
            return
        given = worker.launch.env.get(POLICY_ENV)
        subject = f"policy of {worker.name}"
        fix = f"leave {POLICY_ENV} out of launch.env: `disagg up` sets it"
        if given is None:
            detail = f"`disagg up` sets {POLICY_ENV} to {policy_path}"
            yield Finding(Level.OK, "policy of workers", detail)
        elif not Path(given).is_file():
            detail = f"launch.env sets {POLICY_ENV} to {given!r}, which is no file"
            yield Finding(Level.PROBLEM, subject, detail, fix)
        elif Path(given).resolve() != policy_path.resolve():
            detail = f"launch.env sets {POLICY_ENV} to {given}, not to {policy_path}"
            yield Finding(Level.WARNING, subject, detail, fix)

    def judge_shell(self, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield whether a server that is started by hand finds its policy."""
        given = env.get(POLICY_ENV)
        fix = f"export {POLICY_ENV}=/path/to/disagg.yaml before you start a server by hand"
        if not given:
            detail = f"{POLICY_ENV} is not set here (`disagg up` sets it for its workers)"
            yield Finding(Level.WARNING, "policy", detail, fix)
        elif not Path(given).is_file():
            detail = f"{POLICY_ENV} is {given!r}, which is no file"
            yield Finding(Level.PROBLEM, "policy", detail, fix)
        else:
            yield Finding(Level.OK, "policy", f"{POLICY_ENV} is {given}")


def _barred(plugins: str) -> Finding | None:
    if not plugins or ENTRY_POINT in (name.strip() for name in plugins.split(",")):
        return None
    return Finding(
        Level.PROBLEM,
        SUBJECT,
        f"SGLANG_PLUGINS={plugins!r} keeps SGLang from loading it",
        "add disagg_plugins to SGLANG_PLUGINS, or unset it",
    )
