"""The web demo in real Chromium, by role and text: what visitors do, at two widths, in light and dark.

The browser has no network: names do not resolve, and every request that is not to the demo fails the test.
"""

import logging
import re
import threading
import time

import httpx
import pytest
from PIL import Image

from fake_model import FakeModel, part
from spgdd.cli.demo import serve
from spgdd.diagnosis import Diagnoser

MARK = (240, 60, 20, 20)
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}


class SlowModel(FakeModel):
    """Says nothing until ``first`` is set, then its first word until ``rest`` is; counts the answers under way."""

    def __init__(self):
        super().__init__()
        self.first, self.rest, self.speaking = threading.Event(), threading.Event(), 0

    def stream(self, *given, **options):
        self.speaking += 1
        try:
            self.first.wait(30)
            for answer in super().stream(*given, **options):
                yield answer
                while not self.rest.wait(0.05):
                    yield answer
        finally:
            self.speaking -= 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A marked part, three good ones, a text that calls itself a picture, and a hundred million pixels in a few kB."""
    folder = tmp_path_factory.mktemp("parts")
    for number in range(5):
        part(marks=[MARK] * (number == 0), seed=number).save(folder / f"{number}.png")
    (folder / "text.png").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    return folder


@pytest.fixture
def visit(browser):
    """Opens a demo as one more visitor, who may not ask anything of elsewhere."""
    contexts, elsewhere = [], []

    def visit(served, viewport=LAPTOP, colours="light"):
        def allow(route):
            if route.request.url.startswith(served.local_url):
                return route.continue_()
            elsewhere.append(route.request.url)
            return route.abort()

        contexts.append(browser.new_context(viewport=viewport, color_scheme=colours))
        contexts[-1].route(re.compile("^(?!data:|blob:)"), allow)
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.goto(served.local_url)
        button(page, "Diagnose").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert elsewhere == [], "the page asked for something from elsewhere"


@pytest.fixture(params=[FakeModel])
def served(request):
    model = request.param()
    served = serve(Diagnoser(model), port=0)
    served.model = model
    yield served
    served.close(verbose=False)


def button(page, name):
    return page.get_by_role("button", name=name, exact=True).filter(has_text=name)


def upload(page, place, *paths):
    """Choose files, in doubt (0) or good (1), and wait until the page lists them with their sizes."""
    from playwright.sync_api import expect

    listed = page.get_by_role("link", name=re.compile(r"\d [KM]?B"))
    before = listed.count()
    page.locator("input[type=file]").nth(place).set_input_files(paths)
    expect(listed).to_have_count(before + len(paths))


def ask(page, question):
    page.get_by_label("Question").fill(question)
    button(page, "Ask").click()
    page.get_by_label("Conversation").get_by_text(question).wait_for()


@pytest.mark.parametrize("viewport, colours", [(LAPTOP, "dark"), (PHONE, "light")])
def test_a_visitor_goes_all_the_way(served, visit, files, viewport, colours):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(served, viewport, colours)
    upload(page, 1, *(files / f"{number}.png" for number in (1, 2, 3)))
    upload(page, 0, files / "0.png", files / "4.png")
    button(page, "Diagnose").click()
    page.get_by_alt_text("0.png with its heat map: defective").wait_for()
    talk = page.get_by_label("Conversation")
    talk.get_by_text("Yes, there is an anomaly.").wait_for()
    page.get_by_text("3 good pictures of object remembered.").wait_for()

    page.get_by_text("threshold").first.wait_for()
    before, picture = page.locator(".spgdd").inner_text(), page.get_by_alt_text("heat map").get_attribute("src")
    page.get_by_role("slider", name="Map opacity").press("End")
    page.wait_for_function("old => !document.querySelector(`img[src='${old}']`)", arg=picture)
    page.get_by_role("slider", name="False alarms").press("End")
    page.get_by_text("40% false alarms").wait_for()
    assert page.locator(".spgdd").inner_text() != before

    ask(page, "Where is it?")
    page.get_by_label("Ask about a rectangle only").fill("0, 150, 100, 300")
    ask(page, "And here?")
    talk.get_by_text("In the rectangle 0, 150, 100, 300 alone.").wait_for()
    talk.get_by_text("No, there is no anomaly.").wait_for()
    found = [each for each in Axe().run(page).response["violations"] if each["impact"] in ("serious", "critical")]
    assert not found, [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing to scroll sideways for"

    page.get_by_role("radio", name="0.png: defective").press("ArrowDown")
    page.get_by_alt_text("4.png with its heat map").wait_for()
    talk.get_by_text("No, there is no anomaly.").wait_for()
    button(page, "Save").click()
    for name in ("4.html", "4.json", "4.png", "object.safetensors"):
        page.get_by_role("row", name=name).get_by_role("link").last.wait_for()
    button(page, "Clear").click()
    talk.get_by_text("No, there is no anomaly.").wait_for(state="detached")


def test_what_cannot_be_used_is_said_in_words_and_mended(served, visit, files, caplog, monkeypatch):
    page = visit(served)
    button(page, "Diagnose").click()
    page.get_by_text("There is no picture in doubt yet: choose one, or click an example.").wait_for()
    upload(page, 0, files / "text.png", files / "huge.png")
    button(page, "Diagnose").click()
    page.get_by_text("huge.png: 10000 x 10000 are 100 million pixels, more than the 50 that are taken").wait_for()
    page.get_by_role("row", name="huge.png").get_by_role("button").click()
    button(page, "Diagnose").click()
    page.get_by_text("text.png: not a picture that Pillow can read").wait_for()
    upload(page, 0, files / "0.png")
    button(page, "Diagnose").click()
    page.get_by_role("radio", name="0.png").click()
    page.get_by_alt_text("0.png with its heat map").wait_for()

    monkeypatch.setattr(served.model, "evidence", lambda *given: 1 / 0)
    with caplog.at_level(logging.WARNING):
        page.get_by_role("radio", name="text.png").click()
        page.get_by_role("radio", name="0.png").click()
        page.get_by_text("Something failed that should not (ZeroDivisionError).").wait_for()
    assert "Traceback" not in page.content() and "fake_model" not in page.content()
    assert "ZeroDivisionError: division by zero" in caplog.text and "test_demo_browser.py" in caplog.text


@pytest.mark.parametrize("served", [SlowModel], indirect=True)
def test_the_map_is_there_before_the_first_word_and_answers_end(served, visit, files):
    page, model = visit(served), served.model
    talk = page.get_by_label("Conversation")
    upload(page, 0, files / "0.png")
    button(page, "Diagnose").click()
    page.get_by_alt_text("0.png with its heat map").wait_for()
    assert model.speaking == 1 and talk.get_by_text("Yes").count() == 0
    model.first.set()
    talk.get_by_text("Yes").wait_for()
    button(page, "Stop").click()
    until(lambda: model.speaking == 0)
    assert talk.get_by_text("Yes").count() == 1, "what was said stays"

    ask(page, "Where?")
    until(lambda: model.speaking == 1)
    page.reload()
    until(lambda: model.speaking == 0)
    assert talk.get_by_text("Where?").count() == 0
    upload(page, 0, files / "0.png")
    model.rest.set()
    button(page, "Diagnose").click()
    talk.get_by_text("Yes, there is an anomaly.").wait_for()


@pytest.mark.parametrize("served", [SlowModel], indirect=True)
def test_a_visitor_is_told_of_a_full_queue(served, visit, files):
    page, api = visit(served), f"{served.local_url}gradio_api"
    upload(page, 0, files / "0.png")
    (path,) = httpx.post(f"{api}/upload", files={"files": (files / "0.png").open("rb")}).json()
    data = [[{"path": path, "meta": {"_type": "gradio.FileData"}}], [], None, "nut", "", 0.05, 32, 0, 1]
    posted = [httpx.post(f"{api}/call/diagnose", json={"data": data}) for _ in range(20)]  # two at work, sixteen wait
    button(page, "Diagnose").click()
    page.get_by_text(re.compile("queue is full|busy", re.IGNORECASE)).first.wait_for()
    served.model.first.set()
    served.model.rest.set()
    for answer in posted:
        if answer.status_code == 200:
            assert "Yes, there is" in httpx.get(f"{api}/call/diagnose/{answer.json()['event_id']}", timeout=30).text
    button(page, "Diagnose").click()
    page.get_by_alt_text("0.png with its heat map").wait_for()


def test_two_visitors_do_not_see_each_other(served, visit, files):
    one, other = visit(served), visit(served, PHONE)
    for page, name in ((one, "0.png"), (other, "4.png")):
        upload(page, 0, files / name)
        button(page, "Diagnose").click()
    for page, name, question in ((one, "0.png", "Mine?"), (other, "4.png", "Yours?")):
        page.get_by_alt_text(f"{name} with its heat map").wait_for()
        ask(page, question)
    for page, here, there in ((one, ("0.png", "Mine?"), ("4.png", "Yours?")),
                              (other, ("4.png", "Yours?"), ("0.png", "Mine?"))):  # fmt: skip
        seen = page.locator("body").inner_text()
        assert all(text in seen for text in here) and not any(text in seen for text in there)


def until(fact, seconds=10):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "did not come to pass in time"
        time.sleep(0.05)
