"""Errors in a policy file name file, line, key, what is allowed and what was probably meant."""

from __future__ import annotations

import os
import re
import textwrap

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.policy_file import read_policy

HEAD = """\
    version: 1
    fleet:
      workers:
        - {name: p, url: "http://127.0.0.1:9001", role: prefill}
        - {name: d, url: "http://127.0.0.1:9002", role: decode}
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "disagg.yaml"
        path.write_text(textwrap.dedent(text))
        return read_policy(path)

    return read


@pytest.fixture
def wrong(read):
    def wrong(text):
        with pytest.raises(ConfigError) as caught:
            read(text)
        assert re.search(r"disagg\.yaml", str(caught.value))
        return caught.value

    return wrong


@pytest.mark.parametrize(
    ("tail", "line", "key", "words"),
    [
        ("    gatway: {}\n", 6, "gatway", "did you mean gateway?"),
        ("    handoff:\n      lease: 3\n", 7, "handoff.lease", "did you mean lease_s?"),
        (
            "    scheduler:\n      slo_classes:\n        chat: {ttft: 1}\n",
            8,
            "scheduler.slo_classes.chat.ttft",
            "did you mean ttft_s?",
        ),
        (
            "    scheduler:\n      tenants:\n        a: {max_request: 1}\n",
            8,
            "scheduler.tenants.a.max_request",
            "did you mean max_requests?",
        ),
        ("    handoff:\n      lease_s: -3\n", 7, "handoff.lease_s", "greater than 0, not -3"),
        ("    handoff:\n      lease_s: soon\n", 7, "handoff.lease_s", "not 'soon'"),
        ("    handoff:\n      lease_s:\n", 7, "handoff.lease_s", "not nothing"),
        ("    handoff: []\n", 6, "handoff", "not a list"),
        ("    handoff:\n      staging_bytes: 1MB\n", 7, "handoff.staging_bytes", "write 512MiB"),
        ("    gateway:\n      port: 99999\n", 7, "gateway.port", "65535"),
        ("    gateway:\n      port: 9002\n", 5, "fleet.workers[1].url", "gateway's own"),
        ("    version: 2\n", 6, "version", "stands twice, first in line 1"),
        (
            "    handoff:\n      transports: [tcp, tcp]\n",
            7,
            "handoff.transports",
            "named twice: tcp",
        ),
        (
            "    scheduler:\n      split:\n        min_prompt_token: 3\n",
            8,
            "scheduler.split.min_prompt_token",
            "did you mean min_prompt_tokens?",
        ),
    ],
)
def test_an_error_names_line_key_and_what_is_allowed(wrong, tail, line, key, words):
    error = wrong(HEAD + tail)
    assert (error.line, error.key) == (line, key)
    assert f":{line}: {key}: " in str(error)
    assert words in str(error)


@pytest.mark.parametrize(
    ("worker", "key", "words"),
    [
        ("{url: 'http://h:1', role: both}", "fleet.workers[0].name", "is missing"),
        ("{name: a, url: 'http://h:1', role: prefil}", "fleet.workers[0].role", "mean prefill?"),
        ("{name: a, url: 'https://h:1', role: both}", "fleet.workers[0].url", "http://host:port"),
        ("{name: a, url: 'http://h', role: both}", "fleet.workers[0].url", "names no port"),
        (
            "{name: a, url: 'http://h:1', role: both, labels: {zone: no}}",
            "fleet.workers[0].labels.zone",
            "put it in quotes",
        ),
        ("{name: a, url: 'http://h:1', role: prefill}", "fleet", "nothing could answer"),
        (
            "{name: a, url: 'http://h:1', role: both, launch: {model: m}}",
            "fleet.workers[0].launch",
            "cannot be started from here",
        ),
        (
            "{name: a, url: 'http://127.0.0.1:1', role: both, launch: {modle: m}}",
            "fleet.workers[0].launch.modle",
            "did you mean model?",
        ),
    ],
)
def test_errors_inside_a_worker_are_found_too(wrong, worker, key, words):
    error = wrong(f"fleet:\n  workers:\n    - {worker}\n")
    text = str(error)
    assert key in text
    assert words in text


def test_two_workers_of_one_name_are_an_error(wrong):
    worker = "{name: a, url: 'http://h:%d', role: both}"
    text = f"fleet:\n  workers:\n    - {worker % 1}\n    - {worker % 2}\n"
    assert "two workers have the same name: a" in str(wrong(text))


def test_one_error_tells_everything_in_order_of_lines(wrong):
    text = str(wrong(HEAD + "    handoff:\n      lease: 3\n    gatway: {}\n"))
    assert "2 things are wrong" in text
    assert text.index(":7: handoff.lease") < text.index(":8: gatway")


class TestSecrets:
    SECRET = "correct-horse-battery-staple"

    @pytest.mark.parametrize(
        ("tail", "key", "fix"),
        [
            (f"    secret: {SECRET}\n", "secret", "secret: {env: NAME}"),
            (f"    secret: {{env: {SECRET}}}\n", "secret.env", "secret: {env: NAME}"),
            (f"    secret: {{value: {SECRET}}}\n", "secret.value", "allowed here: env, file"),
            (f"    gateway: {{api_key: {SECRET}}}\n", "gateway.api_key", "secret: {env: NAME}"),
            (f"    gateway: {{password: {SECRET}}}\n", "gateway.password", "{file: PATH}"),
            (
                f"    plugins: {{settings: {{x: {{token: {SECRET}}}}}}}\n",
                "plugins.settings.x.token",
                "plain sight",
            ),
        ],
    )
    def test_in_the_file_are_refused_with_the_fix_and_never_echoed(self, wrong, tail, key, fix):
        error = wrong(HEAD + tail)
        assert error.key == key
        assert error.line == 6
        assert fix in str(error)
        assert self.SECRET not in str(error)
        assert self.SECRET not in repr(error)
        assert error.__context__ is None

    def test_in_a_workers_environment_are_refused_too(self, wrong):
        error = wrong(
            "fleet:\n  workers:\n    - {name: a, url: 'http://127.0.0.1:1', role: both, "
            f"launch: {{model: m, env: {{HF_TOKEN: {self.SECRET}}}}}}}\n"
        )
        assert "workers inherit it" in str(error)
        assert self.SECRET not in str(error)

    def test_under_a_key_that_does_not_exist_are_not_echoed(self, wrong):
        error = wrong(HEAD + f"    gatway: {{secret: {self.SECRET}}}\n")
        assert "plain sight" in str(error)
        assert self.SECRET not in str(error)

    def test_keys_that_only_sound_alike_are_fine(self, read):
        tail = "    scheduler: {chars_per_token: 3, split: {min_prompt_tokens: 7}}\n"
        assert read(HEAD + tail).policy.scheduler.chars_per_token == 3

    def test_both_sources_at_once_are_an_error(self, wrong):
        error = wrong(HEAD + "    secret: {env: A, file: b}\n")
        assert "exactly one of env and file" in str(error)


class TestFile:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "empty"),
            ("- a\n", "not a list"),
            ("just words\n", "not a str"),
            ("a: [1\n", "not valid YAML"),
            ("a: !!python/object:os.system {}\n", "tag"),
            ("a:\n\tb: 1\n", "not valid YAML"),
        ],
    )
    def test_that_is_no_policy_is_told(self, wrong, content, words):
        assert words in str(wrong(content))

    def test_that_is_missing_or_a_folder_is_told(self, tmp_path):
        with pytest.raises(ConfigError, match="no such policy file"):
            read_policy(tmp_path / "none.yaml")
        with pytest.raises(ConfigError, match=r"not a regular file|cannot read"):
            read_policy(tmp_path)

    def test_that_is_a_pipe_does_not_hang(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="not a regular file"):
            read_policy(tmp_path / "pipe")

    def test_that_is_too_large_is_refused(self, wrong):
        assert "larger than 1048576 bytes" in str(wrong("#" * ((1 << 20) + 1)))


class TestWarnings:
    def test_a_missing_secret_is_warned_of_with_the_fix(self, read, monkeypatch):
        monkeypatch.delenv("DISAGG_SECRET", raising=False)
        loaded = read(HEAD)
        assert len(loaded.warnings) == 1
        assert "openssl rand -hex 32" in loaded.warnings[0]
        with pytest.raises(ConfigError, match="DISAGG_SECRET is not set"):
            loaded.secret()

    def test_a_sound_policy_has_none(self, read, monkeypatch):
        monkeypatch.setenv("DISAGG_SECRET", "0123456789abcdef")
        loaded = read(HEAD)
        assert loaded.warnings == ()
        assert loaded.secret() == b"0123456789abcdef"
        assert loaded.path.is_absolute()
