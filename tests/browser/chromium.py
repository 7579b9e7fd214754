"""Unpack a headless Chromium into a folder: from npm, where a package holds it with its libraries.

``make browser`` runs it. No package of the system is needed, and no right to install one.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import brotli

PACKAGE = "@sparticuz/chromium@147.0.0"


def npm() -> Path:
    return Path(sys.executable).parent / "npm"


def unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [str(npm()), "pack", "--silent", PACKAGE]
        subprocess.run(command, cwd=temporary, check=True, timeout=300)
        (archive,) = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extractall(temporary, filter="data")
        packed = Path(temporary) / "package" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("al2023", "swiftshader", "fonts"):
            content = brotli.decompress((packed / f"{name}.tar.br").read_bytes())
            with tarfile.open(fileobj=io.BytesIO(content)) as files:
                files.extractall(folder, filter="data")
        program = folder / "chromium"
        program.write_bytes(brotli.decompress((packed / "chromium.br").read_bytes()))
        program.chmod(0o755)


def check(folder: Path) -> None:
    env = {**os.environ, "LD_LIBRARY_PATH": str(folder / "lib")}
    command = [str(folder / "chromium"), "--version"]
    subprocess.run(command, env=env, check=True, timeout=60, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    try:
        unpack(Path(sys.argv[1]))
        check(Path(sys.argv[1]))
    except (OSError, subprocess.SubprocessError, ValueError) as exc:
        sys.exit(
            f"make browser: no Chromium could be had of {PACKAGE}: {exc}. It needs npm's registry "
            "(npm config get registry) and a 64-bit Linux on x86."
        )
