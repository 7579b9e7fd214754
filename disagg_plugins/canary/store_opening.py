"""From the policy to the store that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from disagg_plugins.canary.sqlite_store import SqliteStore
from disagg_plugins.credentials import read_dsn

if TYPE_CHECKING:
    from disagg_plugins.canary.policy import CanaryStorePolicy
    from disagg_plugins.canary.store import Store

DEFAULT_FILE = Path("canary.sqlite")
"""Beside the policy file."""


def open_store(store: CanaryStorePolicy, base_dir: Path) -> Store:
    """Return the store; nothing is opened or connected to before its first use.

    Args:
        store: ``canary.store`` of the policy.
        base_dir: The folder of the policy.

    Raises:
        ConfigError: psycopg is not installed, or the DSN is missing or none.
    """
    if store.postgres is None:
        path = base_dir / (store.path or DEFAULT_FILE).expanduser()
        return SqliteStore(path, store.name, busy_s=store.busy_s)
    from disagg_plugins.canary.postgres_store import PostgresStore

    dsn = read_dsn(store.postgres, base_dir, "canary.store.postgres")
    return PostgresStore(dsn, store.name, busy_s=store.busy_s)
