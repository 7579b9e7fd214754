"""A file of workers that is followed: what is read, when, and what is told of a wrong one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from disagg_plugins.errors import ConfigError
from disagg_plugins.gateway.watched_file import WatchedFile
from disagg_plugins.yaml_source import MAX_FILE_BYTES

ONE = "- {name: a, url: 'http://127.0.0.1:1', role: decode}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "workers.yaml"


@pytest.fixture
def watched(path: Path) -> WatchedFile:
    return WatchedFile(path, 60.0, asyncio.new_event_loop(), lambda found: None)


@pytest.fixture(autouse=True)
def close_loop(watched: WatchedFile) -> object:
    yield
    watched._loop.close()


def names(found: object) -> list[str]:
    assert isinstance(found, tuple)
    return [worker.name for worker in found]


def test_it_is_read_once_until_it_changes(watched: WatchedFile, path: Path) -> None:
    path.write_text(ONE)
    assert names(watched.look()) == ["a"]
    assert watched.look() is None
    path.write_text(ONE.replace("a,", "bb,"))
    assert names(watched.look()) == ["bb"]


def test_a_file_put_in_its_place_with_the_same_time_and_size_is_noticed(
    watched: WatchedFile, path: Path
) -> None:
    path.write_text(ONE)
    assert names(watched.look()) == ["a"]
    said = path.stat()
    new = path.with_suffix(".new")
    new.write_text(ONE.replace("a,", "b,"))
    os.utime(new, ns=(said.st_atime_ns, said.st_mtime_ns))
    new.rename(path)
    assert names(watched.look()) == ["b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("a: 1", "a list of workers is needed, not a mapping"),
        ("- [", "not valid YAML"),
        ("- {name: a, role: decode}", ":1: [0].url: is missing"),
        (ONE + ONE.replace("1'", "2'"), "two workers have the same name: a"),
        (ONE + ONE.replace("a,", "b,"), "two workers have the same url"),
        (ONE + "- !!python/object:os.system {}", "is not allowed"),
        ("#" * (MAX_FILE_BYTES + 1), "larger than"),
    ],
)
def test_a_wrong_file_is_told_once(watched: WatchedFile, path: Path, text: str, words: str) -> None:
    path.write_text(text)
    found = watched.look()
    assert isinstance(found, ConfigError)
    assert words in str(found)
    assert str(path) in str(found)
    assert watched.look() is None
    path.write_text(ONE)
    assert names(watched.look()) == ["a"]


def test_a_file_that_goes_and_comes_back_unchanged_is_read_again(
    watched: WatchedFile, path: Path
) -> None:
    path.write_text(ONE)
    watched.look()
    aside = path.rename(path.with_suffix(".aside"))
    assert isinstance(watched.look(), ConfigError)
    assert watched.look() is None
    aside.rename(path)
    assert names(watched.look()) == ["a"]


def test_an_empty_list_is_a_fleet_without_workers(watched: WatchedFile, path: Path) -> None:
    path.write_text("[]")
    assert watched.look() == ()


def test_what_is_no_file_is_told(watched: WatchedFile, path: Path) -> None:
    path.mkdir()
    found = watched.look()
    assert isinstance(found, ConfigError)
