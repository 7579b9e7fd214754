"""The secret comes from the environment or a private file and shows nowhere else."""

from __future__ import annotations

import os

import pytest

from disagg_plugins.credentials import looks_like_a_secret, read_authorization, read_secret
from disagg_plugins.errors import ConfigError
from disagg_plugins.policy import SecretSource

SECRET = "0123456789abcdef0123"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(f" {SECRET}\n")
    path.chmod(0o600)
    return path


def problem(source, base):
    with pytest.raises(ConfigError) as caught:
        read_secret(source, base)
    assert SECRET[:8] not in str(caught.value)
    assert SECRET[:8] not in repr(caught.value)
    return str(caught.value)


def test_comes_from_the_environment_without_white_space(monkeypatch, tmp_path):
    monkeypatch.setenv("MINE", f"\t{SECRET}\n")
    assert read_secret(SecretSource(env="MINE"), tmp_path) == SECRET.encode()


def test_comes_from_a_file_relative_to_the_policy(file, tmp_path):
    assert read_secret(SecretSource(file="secret"), tmp_path) == SECRET.encode()
    assert read_secret(SecretSource(file=file), tmp_path / "elsewhere") == SECRET.encode()


def test_not_set_tells_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.delenv("MINE", raising=False)
    assert "export MINE=$(openssl rand -hex 32)" in problem(SecretSource(env="MINE"), tmp_path)


@pytest.mark.parametrize("value", ["", "   ", SECRET[:15]])
def test_too_short_is_refused(monkeypatch, tmp_path, value):
    monkeypatch.setenv("MINE", value)
    assert "needs at least 16" in problem(SecretSource(env="MINE"), tmp_path)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o777])
def test_a_file_open_to_everybody_is_refused_with_the_fix(file, tmp_path, mode):
    file.chmod(mode)
    assert f"chmod 600 {file}" in problem(SecretSource(file=file), tmp_path)


def test_a_file_open_to_the_group_is_allowed(file, tmp_path):
    file.chmod(0o640)
    assert read_secret(SecretSource(file=file), tmp_path) == SECRET.encode()


def test_a_missing_file_tells_how_to_make_one(tmp_path):
    assert "umask 077; openssl" in problem(SecretSource(file="none"), tmp_path)


def test_a_pipe_does_not_hang_and_a_large_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a regular file" in problem(SecretSource(file="pipe"), tmp_path)
    (tmp_path / "large").write_bytes(b"x" * 10_000)
    assert "larger than" in problem(SecretSource(file="large"), tmp_path)


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("secret", True),
        ("HF_TOKEN", True),
        ("api-key", True),
        ("db_password", True),
        ("min_prompt_tokens", False),
        ("chars_per_token_s", False),
        ("tokenizer", False),
        ("secretary", False),
    ],
)
def test_names_of_secrets_are_recognised(key, secret):
    assert looks_like_a_secret(key) is secret


def test_the_authorization_of_copies_comes_from_a_private_file_or_the_environment(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("MINE", "Bearer of-the-copies\n")
    source = SecretSource(env="MINE")
    assert read_authorization(source, tmp_path, "key") == "Bearer of-the-copies"


@pytest.mark.parametrize(
    "value", ["", " \n", "Bearer of-the-copies\r\nx: y", "of-the-copies \N{EURO SIGN}"]
)
def test_what_is_no_value_of_a_header_is_refused_and_not_told(monkeypatch, tmp_path, value):
    monkeypatch.setenv("MINE", value)
    with pytest.raises(ConfigError, match="no value of a header") as caught:
        read_authorization(SecretSource(env="MINE"), tmp_path, "canary.shadow.authorization")
    assert "of-the-copies" not in str(caught.value)
