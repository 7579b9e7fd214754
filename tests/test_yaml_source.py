"""YAML that is safe to read: bounded, plain, without surprises."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_plugins.errors import ConfigError
from disagg_plugins.yaml_source import dotted, parse_yaml

BOMB = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (name, name, b",".join([b"*%c" % (name - 1)] * 10))
    for name in range(ord("b"), ord("j"))
)


def problem(content):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(content, "f.yaml")
    return caught.value


def test_lines_of_keys_and_items_are_kept():
    source = parse_yaml(b"a:\n  b:\n    - x\n    - y: 1\nc: 2\n", "f.yaml")
    assert source.data == {"a": {"b": ["x", {"y": 1}]}, "c": 2}
    assert source.line(("a", "b", 1, "y")) == 4
    assert source.line(("a", "b", 1, "missing")) == 4
    assert source.line(("c",)) == 5


def test_aliases_are_followed():
    assert parse_yaml(b"a: &x {k: 1}\nb: *x\n", "f").data == {"a": {"k": 1}, "b": {"k": 1}}


def test_an_alias_bomb_is_refused_at_once():
    started_s = time.monotonic()
    assert "more than 100000 values" in str(problem(BOMB))
    assert time.monotonic() - started_s < 10


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: &a\n  b: *a\n", "nested deeper"),
        (b"a: " + b"[" * 40 + b"]" * 40, "nested deeper"),
        (b"a: " + b"[" * 100_000, "nested deeper"),
        (b"base: &b {x: 1}\na:\n  <<: *b\n", "merge keys"),
        (b"a: 1\nb: 2\na: 3\n", "stands twice, first in line 1"),
        (b"? [a]\n: 1\n", "plain text"),
        (b"a: !!python/name:os.system\n", "not valid YAML"),
        (b"a: \xff\n", "not UTF-8 at byte 3"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"a: *nobody\n", "undefined alias"),
        (b"a: \x00\n", "not valid YAML"),
        (b"a: " + b"9" * 5000 + b"\n", "not a value"),
    ],
)
def test_what_is_not_plain_data_is_refused(content, words):
    assert words in str(problem(content))


def test_dates_stay_text():
    assert parse_yaml(b"a: 2026-01-02\nb: 2026-99-99\n", "f").data["a"] == "2026-01-02"


def test_keys_are_written_as_people_write_them():
    assert dotted(("fleet", "workers", 0, "url")) == "fleet.workers[0].url"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet=" \n\t:-[]{}&*!|>'\"%@`#,?abc019~<", max_size=60))
def test_any_text_is_read_or_refused_in_words(text):
    with contextlib.suppress(ConfigError):  # nothing else is raised
        parse_yaml(text.encode(), "f.yaml")
