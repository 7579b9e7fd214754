"""A page in the browser, and what it must not do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REFUSED = ("403", "409", "503")
"""Answers that tests provoke; the browser writes each to its console."""


class Seen:
    """See the module."""

    def __init__(self, browser: Browser, width: int = 1100, **more: object) -> None:
        viewport = {"width": width, "height": 800}
        self.page: Page = browser.new_page(viewport=viewport, locale="en-US", **more)
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("request", lambda r: self.hosts.add(r.url.split("/")[2]))

    def _console(self, message) -> None:
        if message.type == "error" and not any(status in message.text for status in REFUSED):
            self.errors.append(message.text)
