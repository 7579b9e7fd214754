"""The canary's page before documents that no short run of a gateway brings forth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg_plugins.canary.report import report_html
from tests.browser.page_server import Site, serve
from tests.browser.seen import Seen
from tests.canary.hand_made import made_document

pytest.importorskip("playwright", reason="run by `make test-browser`")

from playwright.sync_api import Browser, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

LONG_MS = 15_000.0
EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as found:
        yield found


def wait_polls(page: Page, site: Site, count: int = 2) -> None:
    """Let the page ask ``count`` more times."""
    wanted = site.gets + count
    while site.gets < wanted:
        page.wait_for_timeout(50)


def go(page: Page, site: Site, token: str = "act.1.a") -> None:
    page.goto(f"{site.url}#token={token}")
    expect(page.locator("#state")).to_have_text("running, 1 % to the candidate")


def change(site: Site) -> None:
    """Let a figure be another one, as it is at each look of a gateway under load."""
    counted = dict(site.document["counted"])
    counted["candidate"] += 1
    guardrails = [dict(g, allowed=g["allowed"] + 0.001) for g in site.document["guardrails"]]
    site.document = {**site.document, "counted": counted, "guardrails": guardrails}


def test_a_table_stays_where_the_reader_pushed_it(site: Site, browser: Browser) -> None:
    seen = Seen(browser, width=360)
    page = seen.page
    go(page, site)
    box = page.get_by_role("region", name="Guardrails")
    box.evaluate("box => { box.scrollLeft = 60; box.focus({ preventScroll: true }); }")
    change(site)
    expect(page.get_by_text("0.251 s").first).to_be_visible(timeout=LONG_MS)
    assert box.evaluate("box => box.scrollLeft") == 60
    assert box.evaluate("box => box === document.activeElement")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()
    assert seen.errors == []


def test_the_selector_that_is_open_is_not_taken_away(site: Site, seen: Seen) -> None:
    page = seen.page
    go(page, site)
    page.evaluate("window.before = document.getElementById('metric')")
    page.locator("#metric").focus()
    change(site)
    expect(page.get_by_text("0.251 s").first).to_be_visible(timeout=LONG_MS)
    assert page.evaluate("window.before === document.getElementById('metric')")
    assert page.evaluate("window.before === document.activeElement")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#metric")).to_have_value("ttft p95")
    expect(page.get_by_role("img", name="ttft p95 over time")).to_be_visible()


def test_each_chart_has_its_figures_as_a_table(site: Site, seen: Seen) -> None:
    page = seen.page
    go(page, site)
    page.get_by_text("Figures of ttft p50 over time").click()
    history = page.get_by_role("region", name="Figures of ttft p50 over time")
    expect(history.get_by_role("row")).to_have_count(4)
    expect(history.get_by_role("cell", name="0.21 (0.05 to unbounded)").first).to_be_visible()
    change(site)
    wait_polls(page, site)
    expect(history).to_be_visible()  # what was opened stays open
    page.get_by_text("Figures of the distribution of ttft").press("Enter")
    spread = page.get_by_role("region", name="Figures of the distribution of ttft")
    expect(spread.get_by_role("cell", name="0.2 to 0.4")).to_be_visible()
    expect(spread.get_by_role("cell", name="900")).to_be_visible()


def test_answers_that_prefill_ended_are_told_apart(site: Site, seen: Seen) -> None:
    go(seen.page, site)
    told = seen.page.get_by_role("cell", name="39 of 40, 1 ended by prefill")
    expect(told.first).to_be_visible()


def test_a_new_link_in_the_same_tab_brings_its_token(site: Site, seen: Seen) -> None:
    page = seen.page
    go(page, site, token="see.1.old")
    site.status = 403
    expect(page.locator("#stale")).to_contain_text("has ended", timeout=LONG_MS)
    site.status = 200
    page.evaluate("location.hash = '#token=act.2.new'")  # what pasting it into the bar does
    expect(page.locator("#stale")).to_be_hidden(timeout=LONG_MS)
    assert page.url == site.url
    assert site.tokens[-1] == "Bearer act.2.new"
    page.reload()
    wait_polls(page, site, 1)
    assert site.tokens[-1] == "Bearer act.2.new"


def test_an_answer_from_before_a_command_does_not_undo_what_is_shown(
    site: Site, seen: Seen
) -> None:
    page = seen.page
    go(page, site)
    site.gate.clear()
    while not site.waiting.is_set():  # a GET that read the state before
        page.wait_for_timeout(20)
    page.get_by_role("button", name="Hold").click()
    page.get_by_label("Reason").fill("lunch")
    page.get_by_role("button", name="Confirm").click()
    state = page.locator("#state")
    expect(state).to_have_text("held, 1 % to the candidate")
    page.evaluate(
        "window.states = []; new MutationObserver(() => window.states.push("
        "document.getElementById('state').textContent)).observe(document.getElementById('state'),"
        " { childList: true })"
    )
    site.gate.set()
    wait_polls(page, site)
    assert page.evaluate("window.states") == []


def test_a_gateway_that_hangs_is_told_before_its_time_is_up(site: Site, seen: Seen) -> None:
    page = seen.page
    page.clock.install()
    go(page, site)
    site.gate.clear()
    page.clock.run_for(2_500)
    while not site.waiting.is_set():
        page.wait_for_timeout(20)
    page.clock.run_for(16_000)
    expect(page.locator("#stale")).to_contain_text("may be old")
    site.gate.set()
    expect(page.locator("#stale")).to_be_hidden(timeout=LONG_MS)


def test_a_gateway_that_gives_the_candidate_less_says_so(site: Site, seen: Seen) -> None:
    site.document = {**site.document, "weight_here": 0}
    page = seen.page
    page.goto(site.url)
    expect(page.locator("#state")).to_have_text(
        "running, 1 % to the candidate; this gateway gives it 0 %"
    )


def test_a_refused_command_says_why_and_keeps_the_words(site: Site, seen: Seen) -> None:
    page = seen.page
    go(page, site)
    page.get_by_role("button", name="Roll back").click()
    page.get_by_label("Your name").fill("ann")
    page.get_by_role("button", name="Confirm").click()
    expect(page.locator("#dialog-error")).to_have_text("say why")
    page.get_by_label("Reason").fill("too slow")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("aborted, 0 % to the candidate")
    assert site.commands[-1] == {"do": "rollback", "why": "too slow", "by": "ann"}


def test_an_answer_that_is_no_json_tells_its_status(site: Site, seen: Seen) -> None:
    page = seen.page
    go(page, site)
    page.route("**/internal/canary", lambda route: route.fulfill(status=503, body="<html>"))
    expect(page.locator("#stale")).to_contain_text("answered 503", timeout=LONG_MS)


def test_where_no_chart_can_be_drawn_the_tables_are_there(site: Site, seen: Seen) -> None:
    page = seen.page
    page.route("**/uplot.js", lambda route: route.fulfill(body="", content_type="text/javascript"))
    go(page, site)
    expect(page.get_by_text("The chart cannot be drawn here")).to_have_count(2)
    page.get_by_text("Figures of the distribution of ttft").click()
    expect(page.get_by_role("cell", name="0.2 to 0.4")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_others_wrote_is_text_on_the_page(browser: Browser, scheme: str) -> None:
    with serve(EVIL) as site:
        seen = Seen(browser, width=360, color_scheme=scheme)
        page = seen.page
        go(page, site)
        expect(page.get_by_text(EVIL).first).to_be_visible()
        assert page.locator("#main img, #main script").count() == 0
        assert page.title() == "Canary"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert seen.hosts == {site.url.split("/")[2]}
        page.close()
        assert seen.errors == []


def test_the_report_of_hostile_words_is_text_too(seen: Seen, tmp_path: Path) -> None:
    file = tmp_path / "canary.html"
    file.write_text(report_html(made_document(EVIL)))
    page = seen.page
    page.goto(file.as_uri())
    expect(page.locator("#state")).to_have_text("running, 1 % to the candidate")
    assert page.title().startswith("Canary default")
    assert page.locator("#main img").count() == 0
    page.get_by_text("Figures of ttft p50 over time").click()
    expect(page.get_by_role("region", name="Figures of ttft p50 over time")).to_be_visible()
    assert seen.hosts == {""}


def test_the_report_can_be_read_without_javascript(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "canary.html"
    file.write_text(report_html(made_document()))
    seen = Seen(browser, width=360, java_script_enabled=False)
    page = seen.page
    page.goto(file.as_uri())
    expect(page.get_by_role("cell", name="0.2 (0.1875 to 0.23; 120)").first).to_be_visible()
    expect(page.get_by_role("columnheader", name="Allowed").first).to_be_visible()
    page.close()
    assert seen.errors == []
