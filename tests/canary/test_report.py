"""The report: one file, whatever text it is about."""

from __future__ import annotations

import json
import re

from disagg_plugins.canary.report import report_html

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028&"
DOCUMENT = {
    "now_s": 1_790_000_000.0,
    "canary": "default",
    "candidate": EVIL,
    "plan": {"steps": [1, 100]},
    "progress": {"phase": "running", "weight": 1},
    "lacks": [EVIL],
    "trouble": EVIL,
    "guardrails": [{"name": EVIL, "answer": "open", "reason": EVIL}],
    "parity": {"findings": [{"bucket": EVIL, "aspect": "different", "reason": EVIL}]},
    "decisions": [
        {"at_s": 0.0, "kind": "start", "by": EVIL, "from_weight": 0, "to_weight": 1, "why": [EVIL]}
    ],
}


def test_text_from_outside_is_never_markup() -> None:
    page = report_html(DOCUMENT)
    assert "alert(1)</script>" not in page
    assert "<img" not in page
    assert "&lt;img src=x" in page


def test_the_document_can_be_read_back() -> None:
    found = re.search(r'id="document">(.*?)</script>', report_html(DOCUMENT), re.DOTALL)
    assert found
    assert json.loads(found[1]) == DOCUMENT


def test_it_tells_the_reasons_without_javascript() -> None:
    page = report_html({**DOCUMENT, "lacks": ["5 s of bake time are left"]})
    assert "The next step waits: 5 s of bake time are left" in page
