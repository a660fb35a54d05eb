"""The web demo in real Chromium: the way of a visitor, by role and text, with nothing fetched from elsewhere."""

import shutil

import pytest

from fake_model import FakeModel, part
from spgdd.cli.demo import serve
from spgdd.diagnosis import Diagnoser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: scripts/install_chromium.sh")
def test_a_visitor_uploads_asks_and_clears(tmp_path):
    from playwright.sync_api import sync_playwright

    for number in range(4):
        part(marks=[(240, 60, 20, 20)] * (number == 0), seed=number).save(tmp_path / f"{number}.png")
    page_served, elsewhere = serve(Diagnoser(FakeModel()), port=0), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("request", lambda request: elsewhere.append(request.url) if "127.0.0.1" not in request.url
                and not request.url.startswith(("data:", "blob:")) else None)  # fmt: skip
        page.goto(page_served.local_url)
        diagnose = page.get_by_role("button", name="Diagnose", exact=True)
        diagnose.wait_for(timeout=30_000)
        uploads = page.locator("input[type=file]")
        uploads.nth(1).set_input_files([tmp_path / f"{number}.png" for number in (1, 2, 3)])
        uploads.nth(0).set_input_files([tmp_path / "0.png"])
        page.get_by_text("0.png").first.wait_for()
        page.wait_for_timeout(1500)  # uploads end
        diagnose.click()
        page.get_by_alt_text("heat map: defective").wait_for(timeout=30_000)
        talk = page.get_by_label("Conversation")
        talk.get_by_text("Yes, there is an anomaly.").wait_for()
        page.get_by_label("Question").fill("Where is it?")
        page.get_by_role("button", name="Ask", exact=True).click()
        talk.get_by_text("Where is it?").wait_for()
        page.get_by_role("button", name="Clear", exact=True).filter(has_text="Clear").click()
        talk.get_by_text("Where is it?").wait_for(state="detached")
        browser.close()
    page_served.close(verbose=False)
    assert elsewhere == []
