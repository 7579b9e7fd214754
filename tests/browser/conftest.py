"""The browser of the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.seen import Seen

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = Path(__file__).resolve().parents[2] / ".venvs" / "browser" / "chromium"
NO_SANDBOX = ("--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-dev-shm-usage")
"""A container has no namespaces to give; what is opened comes from this machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    env = {**os.environ, "LD_LIBRARY_PATH": str(CHROMIUM / "lib")}
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM / "chromium", args=NO_SANDBOX, env=env
        )
        yield found
        found.close()


@pytest.fixture
def seen(browser: Browser) -> Iterator[Seen]:
    found = Seen(browser)
    yield found
    found.page.close()
    assert found.errors == []
