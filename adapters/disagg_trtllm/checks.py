"""What ``disagg doctor`` asks about TensorRT-LLM: is its connector interface one of the known ones?

The installed sources are read, nothing of them is run: importing the package takes a minute and a
GPU. Imports no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from disagg_plugins import __version__
from disagg_plugins.cli.checks import Finding, Level
from disagg_plugins.cli.engine_check import OURS, Answer, EngineCheck, Question
from disagg_trtllm.compat import NEW_PATH, OLD_PATH

NOT_RUN = (
    "written against the published interface, exercised on a host that follows it, not run on "
    "TensorRT-LLM here"
)

WORKER = (
    "register_kv_caches", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save",
    "get_finished", "bind_connector_meta", "get_connector_meta",
)  # fmt: skip
SCHEDULER = (
    "build_connector_meta", "get_num_new_matched_tokens", "request_finished",
    "update_state_after_alloc",
)  # fmt: skip
REQUEST = (
    "request_id", "new_tokens", "new_block_ids", "computed_position", "num_scheduled_tokens",
)  # fmt: skip
OUTPUT = ("new_requests", "cached_requests")

ERAS = {"main": NEW_PATH, "1.2": OLD_PATH}
"""The module of the interface in each era."""

CONFIG = (
    "tensorrt_llm.llmapi.llm_args.KvCacheConnectorConfig",
    "tensorrt_llm.llmapi.llm_args.connector_module",
    "tensorrt_llm.llmapi.llm_args.connector_scheduler_class",
    "tensorrt_llm.llmapi.llm_args.connector_worker_class",
)
"""How a connector of one's own is named in the options."""


def interface_of(module: str) -> tuple[str, ...]:
    """Return every name that the connector needs of an era's module, as dotted paths."""
    parts = {
        "KvCacheConnectorWorker": WORKER,
        "KvCacheConnectorScheduler": SCHEDULER,
        "RequestData": REQUEST,
        "SchedulerOutput": OUTPUT,
    }
    found = []
    for kind, names in parts.items():
        found.append(f"{module}.{kind}")
        found += [f"{module}.{name}" for name in names]
    return tuple(dict.fromkeys(found))


class TrtllmCheck(EngineCheck):
    """Asks each interpreter that starts a TensorRT-LLM worker; without a policy, this one."""

    name = "trtllm"
    question = Question(
        package="tensorrt_llm",
        group="disagg_plugins",
        distributions=("tensorrt_llm", "torch"),
        paths=(*interface_of(NEW_PATH), *interface_of(OLD_PATH), *CONFIG),
    )

    def judge(self, python: str, answer: Answer, env: Mapping[str, str]) -> Iterator[Finding]:
        """Yield what is right and wrong with its interface, field by field."""
        version = answer.versions["tensorrt_llm"] or "(no version)"
        if not answer.installed:
            yield Finding(
                Level.PROBLEM,
                "tensorrt_llm",
                f"not installed for {python}",
                "run `disagg doctor` with the Python of the container that serves",
            )
            return
        yield from self._judge_interface(version, python, set(answer.missing))
        ours = answer.versions[OURS]
        if ours is None:
            yield Finding(
                Level.PROBLEM,
                "connector",
                f"disagg-plugins is not installed for {python}: every rank imports it",
                f"{python} -m pip install {OURS}",
            )
        elif ours != __version__:
            yield Finding(
                Level.WARNING,
                "connector",
                f"the worker has {OURS} {ours}, this side has {__version__}",
                f"{python} -m pip install {OURS}=={__version__}",
            )
        else:
            yield Finding(Level.OK, "connector", f"{OURS} {ours}: {NOT_RUN}")

    def _judge_interface(self, version: str, python: str, missing: set[str]) -> Iterator[Finding]:
        lacks = {
            era: [path for path in interface_of(module) if path in missing]
            for era, module in ERAS.items()
        }
        era = min(lacks, key=lambda each: len(lacks[each]))
        detail = f"tensorrt_llm {version} in {python}"
        if not lacks[era]:
            yield Finding(Level.OK, "interface", f"{detail}: that of the {era}-era, every field")
        else:
            names = ", ".join(path.removeprefix(ERAS[era] + ".") for path in lacks[era])
            yield Finding(
                Level.PROBLEM,
                "interface",
                f"{detail} is of no known era; of the nearest ({era}) it lacks {names}",
                "use TensorRT-LLM 1.2 or a later release whose connector interface has these, or "
                "engine trtllm-native, which needs none",
            )
        unknown = [path.rpartition(".")[2] for path in CONFIG if path in missing]
        if unknown:
            yield Finding(
                Level.WARNING,
                "kv_connector_config",
                f"tensorrt_llm/llmapi/llm_args.py does not name {', '.join(unknown)}",
                "see in its documentation how a connector of your own is named",
            )
