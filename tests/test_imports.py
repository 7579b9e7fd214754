"""What importing the package must not drag in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "vllm", "sglang", "tensorrt_llm", "transformers", "nixl")

PROBE = """
import importlib, sys
{blocked}
for name in {modules!r}:
    importlib.import_module(name)
print(sorted(set({heavy!r}) & set(sys.modules)))
"""

BLOCK = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}:
            raise ImportError(f"{{name}} is imported where it must not be")
sys.meta_path.insert(0, Blocker())
"""


def loaded_by(*modules: str) -> str:
    """Return what of ``HEAVY`` is loaded after importing ``modules``; importing it raises."""
    path = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "connectors")]
    code = f"import sys; sys.path[:0] = {path!r}\n" + PROBE.format(
        modules=modules, heavy=HEAVY, blocked=BLOCK.format(heavy=HEAVY)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_core_imports_no_engine_and_no_torch():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "disagg_plugins").rglob("*.py"))
        if path.name != "__main__.py"
    ]
    assert "disagg_plugins" in modules
    assert loaded_by(*modules) == "[]"


PLUGIN_MODULES = sorted(
    f"{path.parent.name}.plugin"
    for folder in ("adapters", "connectors")
    for path in (ROOT / folder).glob("*/plugin.py")
)


@pytest.mark.parametrize("module", PLUGIN_MODULES)
def test_a_plugin_module_needs_no_engine(module):
    assert loaded_by(module) == "[]"


def test_importing_the_host_starts_no_thread_and_logs_nothing():
    code = "import disagg_plugins.plugins, threading; print(threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("1", "")
