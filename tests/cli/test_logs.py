from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from disagg_plugins.cli.logs import FORMAT, OWN, IsoFormatter, show_progress

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """Begin with loggers as a process has them at first, and put back what was."""
    loggers = [logging.getLogger(name) for name in (None, *OWN)]
    before = [logger.level for logger in loggers]
    for logger in loggers[1:]:
        logger.setLevel(logging.NOTSET)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def record(message: str, name: str = "disagg_plugins.x") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, __file__, 1, message, None, None)


def test_a_line_has_iso_time_level_and_name() -> None:
    made = record("hello")
    stamp, rest = IsoFormatter(FORMAT).format(made).split(" ", 1)
    assert rest == "WARNING disagg_plugins.x: hello"
    assert datetime.fromisoformat(stamp).timestamp() == pytest.approx(made.created, abs=0.001)
    assert datetime.fromisoformat(stamp).tzinfo is not None


def test_progress_of_this_project_is_shown_and_that_of_libraries_is_not() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    show_progress()
    for name in ("disagg_plugins.gateway.health", *OWN):
        assert logging.getLogger(name).isEnabledFor(logging.INFO)
    assert not logging.getLogger("asyncio").isEnabledFor(logging.INFO)


def test_showing_progress_hides_nothing_of_a_debug_log() -> None:
    logging.getLogger().setLevel(logging.DEBUG)
    show_progress()
    assert logging.getLogger("disagg_plugins.x").isEnabledFor(logging.DEBUG)


def test_every_package_of_this_project_is_its_own() -> None:
    # not the folders: of an installed wheel these are elsewhere
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert set(tools["importlinter"]["root_packages"]) == set(OWN)
