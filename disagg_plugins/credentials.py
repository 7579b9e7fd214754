"""Where the shared secret comes from: the environment or a file, never the policy itself.

No function here puts a secret, or a part of one, into an error, a log line or a ``repr``.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from disagg_plugins.errors import ConfigError
from disagg_plugins.yaml_source import read_bounded

if TYPE_CHECKING:
    from pathlib import Path

    from disagg_plugins.policy import SecretSource

MIN_SECRET_BYTES = 16
"""128 bits, when it is random: what a ticket's signature is worth at least."""

MAX_SECRET_BYTES = 4096

MAKE_SECRET = "openssl rand -hex 32"

OTHERS = 0o007
"""Permission bits of users who are neither the owner nor in the group."""

SECRET_WORDS = re.compile(
    r"(^|[_-])(secret|password|passwd|passphrase|token|api[_-]?key|private[_-]?key|credentials?)$",
    re.IGNORECASE,
)


def read_secret(source: SecretSource, base_dir: Path) -> bytes:
    """Return the secret, white space at its ends removed.

    Args:
        source: ``secret`` of the policy.
        base_dir: Folder of the policy file, where a relative path starts.

    Raises:
        ConfigError: It is missing or too short, or others may read its file; tells the fix.
    """
    value, where, file = _read(
        source,
        base_dir,
        "secret",
        f"export {source.env}=$({MAKE_SECRET}), the same for every worker and the gateway",
    )
    secret = value.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{where} holds {len(secret)} bytes, a secret needs at least {MIN_SECRET_BYTES}",
            file=file,
            key=f"secret.{'env' if file is None else 'file'}",
            fix=f"make one with: {MAKE_SECRET}",
        )
    return secret


def read_dsn(source: SecretSource, base_dir: Path, key: str) -> str:
    """Return the DSN of a database, which has a password in it.

    Args:
        source: Where it stands.
        base_dir: Folder of the policy file, where a relative path starts.
        key: The policy's key, for errors.

    Raises:
        ConfigError: It is missing or empty, or others may read its file; tells the fix.
    """
    form = "postgresql://user:password@host:5432/database"
    value, where, file = _read(source, base_dir, key, f"write {form} there")
    try:
        dsn = value.decode().strip()
    except UnicodeDecodeError:
        dsn = ""
    if not dsn or "\0" in dsn:
        raise ConfigError(f"{where} holds no DSN", file=file, key=key, fix=f"write {form} there")
    return dsn


def read_authorization(source: SecretSource, base_dir: Path, key: str) -> str:
    """Return the value of a header ``authorization``, white space at its ends removed.

    Args:
        source: Where it stands.
        base_dir: Folder of the policy file, where a relative path starts.
        key: The policy's key, for errors.

    Raises:
        ConfigError: It is missing, or no such value, or others may read its file; tells the fix.
    """
    make = "write Bearer and the token there"
    value, where, file = _read(source, base_dir, key, make)
    try:
        found = value.decode("ascii").strip()
    except UnicodeDecodeError:
        found = ""
    if not found or not found.isprintable():
        problem = f"{where} holds no value of a header"
        raise ConfigError(problem, file=file, key=key, fix=make)
    return found


def _read(
    source: SecretSource, base_dir: Path, key: str, make: str
) -> tuple[bytes, str, str | None]:
    """Return what stands there, where that is in words, and the file if it is one."""
    if source.env is not None:
        value = os.environ.get(source.env)
        if value is None:
            raise ConfigError(
                f"the environment variable {source.env} is not set",
                key=f"{key}.env",
                fix=make,
            )
        return os.fsencode(value), f"the environment variable {source.env}", None
    if source.file is None:
        raise ConfigError("names neither env nor file", key=key)
    path = base_dir / source.file.expanduser()
    create = f"umask 077; {MAKE_SECRET} > {path}" if key == "secret" else f"{make}, for you alone"
    try:
        content, mode = read_bounded(path, MAX_SECRET_BYTES, "secret file")
    except ConfigError as exc:
        raise ConfigError(exc.problem, file=str(path), key=f"{key}.file", fix=create) from exc
    if mode & OTHERS:
        raise ConfigError(
            f"every user of this machine has access to the secret file (mode {mode & 0o777:04o})",
            file=str(path),
            key=f"{key}.file",
            fix=f"chmod 600 {path}",
        )
    return content, "the secret file", str(path)


def looks_like_a_secret(key: str) -> bool:
    """Return whether a key's name says that its value is a secret."""
    return SECRET_WORDS.search(key) is not None
