"""From the policy to the store that it names."""

from __future__ import annotations

import pytest

from disagg_plugins.canary.policy import CanaryStorePolicy
from disagg_plugins.canary.postgres_store import PostgresStore
from disagg_plugins.canary.store_opening import open_store
from disagg_plugins.errors import ConfigError

DSN = "postgresql://u:correct-horse@db:5433/x"


def store(**fields):
    return CanaryStorePolicy.model_validate(fields)


def test_a_file_lies_beside_the_policy(tmp_path):
    assert open_store(store(), tmp_path).name == str(tmp_path / "canary.sqlite")
    assert open_store(store(path="m/x.db"), tmp_path).name == str(tmp_path / "m" / "x.db")


def test_a_dsn_comes_from_the_environment_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY_DSN", DSN)
    (tmp_path / "dsn").write_text(DSN + "\n")
    (tmp_path / "dsn").chmod(0o600)
    for source in ({"env": "CANARY_DSN"}, {"file": "dsn"}):
        opened = open_store(store(postgres=source), tmp_path)
        assert isinstance(opened, PostgresStore)
        assert opened.name == "postgresql db 5433 x"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"env": "NO_SUCH_DSN"}, "is not set"),
        ({"file": "nowhere"}, "canary.store.postgres.file"),
        ({"file": "open"}, "chmod 600"),
        ({"file": "empty"}, "holds no DSN"),
        ({"file": "binary"}, "holds no DSN"),
    ],
)
def test_a_dsn_that_is_missing_or_for_everybody_is_an_error_with_its_key(tmp_path, source, words):
    for name, content, mode in (("open", b"x", 0o644), ("empty", b" ", 0o600)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(mode)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(ConfigError, match="canary.store.postgres") as caught:
        open_store(store(postgres=source), tmp_path)
    assert words in str(caught.value)
