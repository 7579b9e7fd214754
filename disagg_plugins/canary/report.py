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
from disagg_plugins.telemetry.split_words import beside_happened


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
    yield "<h2>Arms</h2>"
    yield from _table(ARMS_HEAD, (_arm(name, arm) for name, arm in document["arms"].items()))
    yield "<h2>Guardrails</h2>"
    counted = document["counted"]
    yield f"<p>Counted: {_arms(counted)}.</p>"
    yield from _table(
        ("Guardrail", "Verdict", "Baseline (interval; requests)", "Candidate", "Allowed", "Why"),
        (_guardrail(guardrail) for guardrail in document["guardrails"]),
    )
    if parity := document["parity"]:
        yield "<h2>Do both say the same?</h2>"
        yield f"<p>Pairs: {_arms(parity['pairs'])}; never answered: {_arms(parity['lost'])}.</p>"
        yield from _table(
            ("Prompts", "Aspect", "Verdict", "Baseline with itself", "Candidate", "Allowed", "Why"),
            (_finding(finding) for finding in parity["findings"]),
        )
    if shadow := document["shadow"]:
        ttft, e2e = _number(shadow["ttft_ratio_p50"]), _number(shadow["e2e_ratio_p50"])
        yield (
            f"<h2>Copies</h2><p>Sent: {_arms(shadow['copied'])}; median of the candidate's time "
            f"over the baseline's: TTFT {ttft}, end to end {e2e}.</p>"
        )
    yield "<h2>Decisions</h2>"
    yield from _table(
        ("When", "What", "Why"),
        (
            (
                time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(d["at_s"])),
                f"{d['kind']} by {d['by']}: {d['from_weight']} % to {d['to_weight']} %",
                "; ".join(d["why"]),
            )
            for d in document["decisions"]
        ),
    )


ARMS_HEAD = ("Arm", "Model", "Requests", "In flight", "Really split, of the last", "Workers")


def _arm(name: str, arm: Mapping[str, Any]) -> Iterable[object]:
    split = f"{arm['split']['happened']} of {arm['split']['routed']}"
    split += beside_happened(arm["split"])
    workers = "; ".join(
        f"{w['name']} ({w['role']}): {'healthy' if w['healthy'] else w['reason']}"
        for w in arm["workers"]
    )
    return name, arm["model"], arm["requests"], arm["in_flight"], split, workers


def _guardrail(guardrail: Mapping[str, Any]) -> Iterable[object]:
    figures = (_figure(guardrail[arm]) for arm in ("baseline", "candidate"))
    allowed = guardrail["allowed"]
    words = "" if allowed is None else f"{_number(allowed)} {guardrail['unit']}"
    name = guardrail["name"] + ("" if guardrail["required"] else " (only rolls back)")
    return name, guardrail["answer"], *figures, words, guardrail["reason"]


def _finding(finding: Mapping[str, Any]) -> Iterable[object]:
    figures = (_figure(finding[arm]) for arm in ("baseline", "candidate"))
    head = (finding["bucket"], finding["aspect"], finding["answer"])
    return *head, *figures, finding["allowed"], finding["reason"]


def _arms(counts: Mapping[str, Any]) -> str:
    """Return the counts of both arms in words, as markup."""
    words = f"{counts['baseline']} of the baseline, {counts['candidate']} of the candidate"
    return escape(words)


def _figure(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "none"
    estimate, low, high = (_number(figure[key], "unbounded") for key in ("estimate", "low", "high"))
    return f"{estimate} ({low} to {high}; {figure['count']})"


def _number(value: float | None, unknown: str = "unknown") -> str:
    return unknown if value is None else f"{value:.4g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterable[str]:
    yield '<div class="scroll"><table><tr>'
    yield "".join(f'<th scope="col">{escape(name)}</th>' for name in head) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
    yield "</table></div>"
