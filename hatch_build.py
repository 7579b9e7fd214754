"""Compiles some modules into the wheel, for those who ask: ``HATCH_BUILD_HOOK_ENABLE_CUSTOM=1``.

The same sources run either way; mypyc turns them into C by their types. hatch-mypyc does the same
for projects with one source folder; ours has three, and it leaves its products among the sources,
where an editable install would go on importing them after an edit.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILE_TIMEOUT_S = 900.0
"""About 30 s on one core of 2024."""

SETUP = """\
from mypyc.build import mypycify
from setuptools import setup

options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
built = mypycify([*options, *{modules!r}], group_name="disagg_plugins")
setup(name="compiled", packages=[], py_modules=[], ext_modules=built)
"""


class CompiledModules(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled form of ``modules`` to a wheel; never to an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile beside the sources' copies and let the wheel take what came of it.

        Raises:
            RuntimeError: There is no C compiler, or the sources do not compile.
        """
        if version == "editable":
            return
        folder = Path(tempfile.mkdtemp(prefix="compiled-"))
        built = _compile(Path(self.root), folder, self.config["modules"])
        for path in built:
            build_data["force_include"][str(path)] = str(path.relative_to(folder / "out"))
        build_data["infer_tag"] = True
        build_data["pure_python"] = False
        self._folder = folder

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled: the wheel has it."""
        folder = getattr(self, "_folder", None)
        if folder is not None:
            shutil.rmtree(folder)


def _compile(root: Path, folder: Path, modules: list[str]) -> list[Path]:
    """Return the extension modules made of ``modules``, below ``folder / "out"``."""
    setup = folder / "setup.py"
    setup.write_text(SETUP.format(modules=modules))
    command = [sys.executable, str(setup), "build_ext"]
    command += ["--build-lib", str(folder / "out"), "--build-temp", str(folder / "temp")]
    # mypy reads the modules, and mypyc leaves its C files, below the folder it runs in
    (folder / "disagg_plugins").symlink_to(root / "disagg_plugins")
    ran = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMPILE_TIMEOUT_S,
        check=False,
    )
    built = sorted((folder / "out").rglob("*.so")) + sorted((folder / "out").rglob("*.pyd"))
    if ran.returncode or len(built) < len(modules):
        shutil.rmtree(folder)
        raise RuntimeError(
            f"compiling {len(modules)} modules failed (exit status {ran.returncode}): a C compiler "
            "and Python's headers are needed; without HATCH_BUILD_HOOK_ENABLE_CUSTOM nothing is "
            f"compiled\n{ran.stdout[-4000:]}"
        )
    return built
