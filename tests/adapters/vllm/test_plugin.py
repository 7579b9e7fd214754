from __future__ import annotations

import subprocess
import sys
import types

import pytest

from disagg_vllm import plugin

FACTORY_MODULE = "vllm.distributed.kv_transfer.kv_connector.factory"


class Factory:
    """Behaves as vLLM's factory: a second registration of a name raises."""

    _registry: dict[str, tuple[str, str]]

    def __init__(self) -> None:
        self._registry = {}

    def register_connector(self, name: str, module_path: str, class_name: str) -> None:
        if name in self._registry:
            raise ValueError(f"Connector '{name}' is already registered.")
        self._registry[name] = (module_path, class_name)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Factory:
    """Put a stand-in for vLLM's factory where ``register`` imports it from."""
    factory = Factory()
    parts = FACTORY_MODULE.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[FACTORY_MODULE].KVConnectorFactory = factory  # type: ignore[attr-defined]
    return factory


def test_connector_is_registered_once_however_often_vllm_asks(factory: Factory) -> None:
    plugin.register()
    plugin.register()
    assert factory._registry == {"DisaggConnector": ("disagg_vllm.connector", "DisaggConnector")}


def test_plugin_offers_a_dialect_a_launcher_and_checks_for_vllm() -> None:
    assert [d.engine for d in plugin.disagg_register_dialects()] == ["vllm"]
    assert [launcher.engine for launcher in plugin.disagg_register_launchers()] == ["vllm"]
    assert [c.name for c in plugin.disagg_register_checks()] == ["vllm"]


def test_offers_need_neither_engine_nor_torch() -> None:
    script = (
        "import sys\n"
        "from disagg_vllm import plugin\n"
        "plugin.disagg_register_dialects()\n"
        "plugin.disagg_register_launchers()\n"
        "plugin.disagg_register_checks()\n"
        "print(sorted({'torch', 'vllm'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout == "[]\n"
