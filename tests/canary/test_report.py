"""The report: one file, whatever text it is about."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from disagg_plugins.canary.report import report_html
from tests.canary.hand_made import made_document

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028&"
DOCUMENT = made_document(EVIL)


class Words(HTMLParser):
    """What a reader without JavaScript sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.words.append(data)


def shown(document: dict[str, object]) -> str:
    return " | ".join(Words(report_html(document)).words)


def test_text_from_outside_is_never_markup() -> None:
    page = report_html(DOCUMENT)
    found = Words(page)
    assert found.tags.count("script") == 3  # the document, the charts and the page
    assert "img" not in found.tags
    assert "alert(1)</script>" not in page
    assert "&lt;img src=x" in page


def test_the_document_can_be_read_back() -> None:
    found = re.search(r'id="document">(.*?)</script>', report_html(DOCUMENT), re.DOTALL)
    assert found
    assert "\u2028" not in found[1]
    assert json.loads(found[1]) == DOCUMENT


def test_it_tells_the_reasons_without_javascript() -> None:
    words = shown({**made_document(), "lacks": ["5 s of bake time are left"]})
    assert "The next step waits: 5 s of bake time are left" in words


def test_it_tells_the_figures_without_javascript() -> None:
    words = shown(made_document())
    assert "0.2 (0.1875 to 0.23; 120)" in words
    assert "0.21 (0.125 to unbounded; 120)" in words
    assert "0.25 s" in words
    assert "0.09375 (0 to 0.75; 120)" in words


def test_it_tells_the_arms_and_their_workers_without_javascript() -> None:
    words = shown(made_document("worn out"))
    assert "candidate-0 worn out (decode): worn out" in words
    assert "39 of 40, 1 ended by prefill" in words


def test_it_tells_lost_copies_without_javascript() -> None:
    assert "never answered: 0 of the baseline, 7 of the candidate" in shown(made_document())


def test_what_is_not_there_is_left_out() -> None:
    document = {**made_document(), "parity": None, "shadow": None, "trouble": None}
    document["guardrails"][0]["baseline"] = None
    words = shown(document)
    assert "Do both say the same?" not in words
    assert "| none |" in words
