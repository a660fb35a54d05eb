"""A report opened in a real browser: whatever files and users are called, nothing runs and nothing is asked for."""

import dataclasses
import shutil

import pytest

from fake_model import FakeModel, part
from spgdd.diagnosis import Diagnoser
from spgdd.report import Report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAYLOADS = (
    "<script>document.title='run'</script>", "<img src=x onerror=\"document.title='run'\">",
    "\"><svg onload=\"document.title='run'\">", "'><body onload=document.title='run'>",
    "<iframe src=\"javascript:parent.document.title='run'\"></iframe>", "</style><script>document.title='run'</script>",
    "<link rel=stylesheet href=http://127.0.0.1:9/x.css>", "<img src=http://127.0.0.1:9/x.png>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>", "{{ 7 * 7 }}{% for x in y %}",
    "red;background:url(http://127.0.0.1:9/x)", "javascript:document.title='run'//",
)  # fmt: skip
FIELDS = ("image", "product", "profile", "question", "text")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_no_payload_runs_and_no_request_leaves_the_page(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    found = Diagnoser(FakeModel()).diagnose(part(marks=[(80, 80, 20, 20)]), [part(seed=1), part(seed=2)])
    diagnoses = []
    for payload in PAYLOADS:
        everywhere = dict.fromkeys(FIELDS, payload)
        diagnoses.append(dataclasses.replace(
            found, **everywhere, normals=(payload,), notes=(payload,), history=((payload, payload),)
        ))  # fmt: skip
    page_file = Report(diagnoses, PAYLOADS).save(tmp_path / "page.html")
    assert "49" not in page_file.read_text().split("</style>")[-1].split("<article")[0]
    asked = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: asked.append(f"dialog {dialog.message}"))
        page.goto(page_file.as_uri())
        page.wait_for_timeout(500)
        assert page.title() == "Defect diagnosis"
        assert page.locator("article").count() == len(PAYLOADS)
        assert page.locator("script, iframe, svg, meta[http-equiv=refresh]").count() == 0
        assert all(payload in page.locator("body").inner_text() for payload in PAYLOADS[:3])
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
