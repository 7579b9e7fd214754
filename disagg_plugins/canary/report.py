"""A canary as one HTML file that needs nothing else: to attach to a change request (pure).

It is the page without its commands, with everything inside it. The figures stand in it as tables
too, for readers and programs without JavaScript.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from disagg_plugins.canary.page_files import read


def report_html(document: Mapping[str, Any]) -> str:
    """Return the file.

    Args:
        document: See ``disagg_plugins.canary.document``.
    """
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(document["now_s"]))
    title = escape(f"Canary {document['canary']}: {document['candidate']}, {at}")
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # nothing is loaded, whatever stands in the document
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:\">",
            f"<title>{title}</title>",
            f"<style>{_text('uplot.css')}\n{_text('page.css')}</style></head><body>",
            f'<header><h1 id="title">{title}</h1><p>{escape(at)}</p>',
            '<p id="state"></p><p id="stale" hidden></p><div id="buttons"></div>',
            '<p id="rights" hidden></p></header><main id="main">',
            *_plain(document),
            "</main>",
            f'<script type="application/json" id="document">{_embedded(document)}</script>',
            f"<script>{_text('uplot.js')}</script><script>{_text('page.js')}</script>",
            "</body></html>",
        )
    )


def _text(name: str) -> str:
    return read(name).decode()


def _embedded(document: Mapping[str, Any]) -> str:
    """Return JSON that ends no script, whatever text it holds."""
    text = json.dumps(document)  # ASCII, so no line separator of another alphabet either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(document: Mapping[str, Any]) -> Iterable[str]:
    progress, plan = document["progress"], document["plan"]
    steps = ", ".join(f"{step} %" for step in plan["steps"])
    yield (
        f"<p>{escape(str(progress['phase']))}, {progress['weight']} % to the candidate; "
        f"steps {escape(steps)}</p>"
    )
    for lack in document["lacks"]:
        yield f"<p>The next step waits: {escape(str(lack))}</p>"
    if document["trouble"]:
        yield f"<p>Trouble: {escape(str(document['trouble']))}</p>"
    yield "<h2>Guardrails</h2>"
    yield from _table((g["name"], g["answer"], g["reason"]) for g in document["guardrails"])
    if document.get("parity"):
        yield "<h2>Do both say the same?</h2>"
        yield from _table(
            (f["bucket"], f["aspect"], f["reason"]) for f in document["parity"]["findings"]
        )
    yield "<h2>Decisions</h2>"
    yield from _table(
        (
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(d["at_s"])),
            f"{d['kind']} by {d['by']}: {d['from_weight']} % to {d['to_weight']} %",
            "; ".join(d["why"]),
        )
        for d in document["decisions"]
    )


def _table(rows: Iterable[Iterable[object]]) -> Iterable[str]:
    yield "<table>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
    yield "</table>"
