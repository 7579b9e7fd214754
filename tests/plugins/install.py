"""Install the example plugin as a distribution of its own, without a network.

The wheel is written by hand (a pure wheel is a zip archive) and installed by uv or pip where there
is one; a bare virtual environment unpacks it, which is what installing a pure wheel is.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

PROJECT = Path(__file__).parent / "disagg-example-plugin"


def build_wheel(folder: Path) -> Path:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    info = f"{stem}.dist-info"
    points = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    files = {
        str(path.relative_to(PROJECT / "src")): path.read_text()
        for path in (PROJECT / "src").rglob("*.py")
    }
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = "\n".join(points) + "\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def install(target: Path) -> None:
    """Build the wheel and install it into ``target``, a folder for ``sys.path``."""
    wheel = build_wheel(target.parent)
    options = ["--quiet", "--no-deps", "--target", str(target), str(wheel)]
    if uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--offline", "--python", sys.executable, *options]
    elif importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", "install", "--no-index", *options]
    else:
        zipfile.ZipFile(wheel).extractall(target)
        return
    subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
