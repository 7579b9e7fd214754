"""The page's files: a fixed list, served with what a browser needs to know."""

from __future__ import annotations

import re

import pytest

from disagg_plugins.canary.page_files import KINDS, static


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_file_is_in_the_package(name: str) -> None:
    kind, body = static(name)  # type: ignore[misc]
    assert body
    assert b"charset=utf-8" in kind


@pytest.mark.parametrize("name", ["", "../policy.py", "page.py", "index.html/", "/etc/passwd"])
def test_nothing_else_is(name: str) -> None:
    assert static(name) is None


def test_the_page_names_no_other_host_and_holds_no_script() -> None:
    page = (static("index.html") or (b"", b""))[1].decode()
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) == {
        "/canary/uplot.css",
        "/canary/page.css",
        "/canary/uplot.js",
        "/canary/page.js",
    }
    assert "<script>" not in page
    assert "style=" not in page
