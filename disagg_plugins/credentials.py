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
    if source.env is not None:
        value = os.environ.get(source.env)
        if value is None:
            raise ConfigError(
                f"the environment variable {source.env} is not set",
                key="secret.env",
                fix=f"export {source.env}=$(openssl rand -hex 32), the same for every worker and "
                "the gateway",
            )
        return _checked(os.fsencode(value), f"the environment variable {source.env}", "secret.env")
    if source.file is None:
        raise ConfigError("names neither env nor file", key="secret")
    path = base_dir / source.file.expanduser()
    create = f"umask 077; openssl rand -hex 32 > {path}"
    try:
        content, mode = read_bounded(path, MAX_SECRET_BYTES, "secret file")
    except ConfigError as exc:
        raise ConfigError(exc.problem, file=str(path), key="secret.file", fix=create) from exc
    if mode & OTHERS:
        raise ConfigError(
            f"every user of this machine has access to the secret file (mode {mode & 0o777:04o})",
            file=str(path),
            key="secret.file",
            fix=f"chmod 600 {path}",
        )
    return _checked(content, "the secret file", "secret.file", str(path))


def looks_like_a_secret(key: str) -> bool:
    """Return whether a key's name says that its value is a secret."""
    return SECRET_WORDS.search(key) is not None


def _checked(value: bytes, where: str, key: str, file: str | None = None) -> bytes:
    secret = value.strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{where} holds {len(secret)} bytes, a secret needs at least {MIN_SECRET_BYTES}",
            file=file,
            key=key,
            fix="make one with: openssl rand -hex 32",
        )
    return secret
