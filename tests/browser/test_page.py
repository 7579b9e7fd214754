"""The canary's page in a real browser: watched, promoted and rolled back by clicks and by keys."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from disagg_plugins.canary.report import report_html
from disagg_plugins.cli.main import main
from tests.browser.seen import Seen
from tests.canary.side_by_side import build_side_by_side
from tests.gateway.harness import SECRET, eventually

pytest.importorskip("playwright", reason="run by `make test-browser`")

from playwright.sync_api import Browser, Page, expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

LONG_MS = 15_000.0


@pytest.fixture
def arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISAGG_SECRET", SECRET.decode())
    with ExitStack() as stack:
        yield partial(build_side_by_side, stack, tmp_path)


def link(site, tmp_path: Path, capsys, *words: str) -> str:
    capsys.readouterr()
    assert main(["canary", "page", str(tmp_path / "baseline.yaml"), *words]) == 0
    return capsys.readouterr().out.strip()


def ask(site, count: int) -> None:
    for _ in range(count):
        assert site.complete("hello")[0] == 200


def confirm(page: Page, button: str, why: str) -> None:
    page.get_by_role("button", name=button).click()
    page.get_by_label("Reason").fill(why)
    page.get_by_label("Your name").fill("ann")
    page.get_by_role("button", name="Confirm").click()


def test_a_rollout_is_started_approved_and_rolled_back_by_clicks(
    arms, seen: Seen, tmp_path: Path, capsys
) -> None:
    site = arms(canary={"approval": "manual"})
    page = seen.page
    url = link(site, tmp_path, capsys)
    page.goto(url)
    state = page.locator("#state")
    expect(state).to_have_text("pending, 0 % to the candidate")
    assert "token" not in page.url
    expect(page.get_by_role("button", name="Roll back")).to_be_disabled()

    confirm(page, "Start", "try it")
    expect(state).to_have_text("running, 50 % to the candidate")
    while state.inner_text() == "running, 50 % to the candidate":
        ask(site, 20)
        page.wait_for_timeout(200)
    expect(state).to_have_text("awaiting, 50 % to the candidate", timeout=LONG_MS)

    confirm(page, "Approve next step", "looks good")
    expect(state).to_have_text("completed, 100 % to the candidate", timeout=LONG_MS)
    expect(page.get_by_role("cell", name="approved by ann")).to_be_visible()

    confirm(page, "Roll back", "<b>not</b> so good")
    expect(state).to_have_text("aborted, 0 % to the candidate", timeout=LONG_MS)
    expect(page.get_by_role("cell", name="<b>not</b> so good")).to_be_visible()  # no markup
    assert site.front.lookout.view.weight == 0
    assert seen.hosts == {f"127.0.0.1:{site.port}"}


def test_the_keyboard_alone_holds_and_resumes(arms, seen: Seen, tmp_path: Path, capsys) -> None:
    site = arms(canary={"bake_s": 3600})
    site.command("start")
    site.wait_weight(50)
    page = seen.page
    page.goto(link(site, tmp_path, capsys))
    state = page.locator("#state")
    expect(state).to_have_text("running, 50 % to the candidate")

    def reach(name: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.textContent") == name:
                return
        pytest.fail(f"no key leads to {name}")

    reach("Hold")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.type("lunch")
    page.keyboard.press("Enter")
    expect(state).to_have_text("held, 50 % to the candidate")
    expect(page.get_by_text("Held: lunch", exact=True)).to_be_visible()
    reach("Resume")
    page.keyboard.press("Space")
    page.keyboard.press("Escape")  # thought better of it
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("button", name="Resume").press("Enter")
    page.keyboard.press("Enter")
    expect(state).to_have_text("running, 50 % to the candidate")


def test_it_fits_a_phone_and_shows_both_arms(arms, browser: Browser, tmp_path, capsys) -> None:
    site = arms(
        canary={
            "bake_s": 3600,
            "guardrails": [
                {"metric": "error_rate", "slack": 0.2},
                {"metric": "e2e", "quantile": 0.5, "ratio": 2.0, "required": False},
            ],
        }
    )
    site.command("start")
    site.wait_weight(50)
    ask(site, 120)
    phone = Seen(browser, width=360)
    page = phone.page
    page.goto(link(site, tmp_path, capsys, "--see"))
    expect(page.locator("canvas").first).to_be_visible(timeout=LONG_MS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.get_by_text("b0 (both): healthy")).to_be_visible()
    expect(page.get_by_text("c0 (both): healthy")).to_be_visible()
    expect(page.get_by_role("button", name="Roll back")).to_be_disabled()  # it may only see
    expect(page.get_by_text("disagg canary page")).to_be_visible()
    page.locator("#metric").select_option("e2e p50")
    expect(page.locator("#metric")).to_have_value("e2e p50")
    page.close()
    assert phone.errors == []


def test_a_gateway_that_went_away_is_told(arms, browser: Browser, tmp_path, capsys) -> None:
    site = arms()
    found = Seen(browser)
    page = found.page
    page.goto(link(site, tmp_path, capsys))
    expect(page.locator("#state")).to_have_text("pending, 0 % to the candidate")
    site.stop()
    expect(page.locator("#stale")).to_contain_text("does not answer", timeout=LONG_MS)
    page.close()


def test_the_report_needs_no_network_and_runs_no_foreign_script(
    arms, seen: Seen, tmp_path: Path
) -> None:
    site = arms(canary={"bake_s": 3600})
    site.command("start")
    site.wait_weight(50)
    site.command("hold", why="</script><script>document.title = 'owned'</script>")
    eventually(lambda: site.front.lookout.view.progress.phase == "held", "held")
    ask(site, 60)
    document = site.document()
    file = tmp_path / "canary.html"
    file.write_text(report_html(document))
    page = seen.page
    page.goto(file.as_uri())
    expect(page.locator("#state")).to_have_text("held, 50 % to the candidate")
    assert page.title().startswith("Canary default")
    assert page.get_by_role("button").count() == 0
    assert seen.hosts == {""}
