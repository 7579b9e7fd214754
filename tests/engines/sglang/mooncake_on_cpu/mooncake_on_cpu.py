"""Lets SGLang 0.5.23's own mooncake backend run without CUDA: a fixture of a benchmark.

``prefill.py`` of SGLang hands senders that support it page indices by way of pinned memory and a
CUDA event. Mooncake's sender says that it does; here it says that it does not, and is handed them
as every other sender is. The folder is a distribution (it has a ``.dist-info``), so that SGLang's
plugin door finds it on ``PYTHONPATH``, and nothing is changed on disk. ``transfer.py`` under
``tests/benchmarks`` puts it there for the servers that it compares with, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

GET_KV_CLASS = "sglang.srt.disaggregation.utils.get_kv_class"


def register() -> None:
    """Register the hook; the entry point of ``sglang.srt.plugins``."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(GET_KV_CLASS, _get_kv_class, HookType.AROUND)


def _get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    found = original(transfer_backend, class_type)
    if getattr(found, "supports_host_tensor_indices", False):
        found.supports_host_tensor_indices = False
    return found
