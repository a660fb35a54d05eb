"""Notebook 07 in a real JupyterLab in Chromium: run all, then work with the tool as a reader does, by role and text."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from PIL import Image

from conftest import ROOT
from miniworld import TYPES, photograph

NOTEBOOK = "07_diagnose_with_widgets.ipynb"
SETTINGS = {  # no question about news; cells out of sight stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab with a copy of the notebook, whose settings are in ``tmp_path`` too."""
    (tmp_path / "course" / "notebooks").mkdir(parents=True)
    for name in (NOTEBOOK, "figures.py", "drawing.py"):
        shutil.copy(ROOT / "notebooks" / name, tmp_path / "course" / "notebooks")
    for name, values in SETTINGS.items():
        file = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER{name}_DIR": str(tmp_path / name) for name in ("_CONFIG", "_RUNTIME", "LAB_WORKSPACES")}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
         "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path / 'course'}"],
        env=os.environ | folders, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            urlopen(f"{address}/api").close()
            break
        except URLError:
            assert server.poll() is None and time.monotonic() < end, "JupyterLab did not start"
            time.sleep(0.2)
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture
def parts(tmp_path):
    """Two more parts of the notebook's product: a good one and one with a hole."""
    folder = tmp_path / "more"
    folder.mkdir()
    kinds = torch.tensor([-1, TYPES.index("hole")])
    shots = photograph("gear", torch.full_like(kinds, 2), torch.tensor([50, 51]), kinds)
    for name, image in zip(("fine", "holed"), shots.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def page(browser, tmp_path):
    """A page of the browser; how it looked in the end is kept beside the other files of the test."""
    page = browser.new_page(viewport={"width": 1366, "height": 900})
    page.set_default_timeout(30_000)
    yield page
    page.screenshot(path=tmp_path / "end.png")
    page.close()


def test_a_reader_works_with_the_tool(lab, page, parts, tmp_path):
    from playwright.sync_api import expect

    page.goto(f"{lab}/lab/tree/notebooks/{NOTEBOOK}")
    page.get_by_role("heading", name="07 · Diagnose with widgets").wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)  # before, nothing is run, without a word
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    tool = page.locator(".jp-OutputArea", has=page.get_by_role("button", name="Diagnose", exact=True)).last
    tool.get_by_role("button", name="Diagnose", exact=True).wait_for(timeout=90_000)
    expect(page.get_by_text("[*]:")).to_have_count(0, timeout=90_000)
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']", has_text="Error").count() == 0

    # A picture of the reader's own: overlay and verdict.
    with page.expect_file_chooser() as chooser:
        tool.get_by_role("button", name="Pictures in doubt").click()
    chooser.value.set_files(parts / "holed.png")
    picture, talk = tool.get_by_role("img", name="with its heat map"), tool.get_by_role("log", name="Conversation")
    tool.get_by_role("img", name="holed.png with its heat map: defective").wait_for()
    tool.get_by_text("score").first.wait_for()
    talk.get_by_text("Yes, there is an anomaly").first.wait_for()

    # Both sliders, by keyboard.
    before = picture.get_attribute("src")
    slider(tool, "Map opacity").press("End")
    expect(picture).not_to_have_attribute("src", before)
    slider(tool, "False alarms").press("End")
    tool.get_by_text("40% false alarms").wait_for()

    # Two questions, and a rectangle.
    question = tool.get_by_placeholder("Is there any anomaly in the image?")
    question.fill("Where is it?")
    question.press("Enter")
    talk.get_by_text("Where is it?").wait_for()
    expect(tool.get_by_role("status")).not_to_contain_text("Answering")
    before = picture.get_attribute("src")
    slider(tool, "Frame across").press("PageUp")
    expect(picture).not_to_have_attribute("src", before)
    question.fill("Is there any anomaly in the image?")
    tool.get_by_role("button", name="Ask", exact=True).click()
    talk.get_by_text("In the rectangle").last.wait_for()

    # The report.
    tool.get_by_role("button", name="Save", exact=True).click()
    tool.get_by_text("Saved: ").wait_for()
    (report,) = tmp_path.rglob("holed.html")
    assert "holed.png" in report.read_text(encoding="utf-8")

    # A folder, by keyboard, and its verdicts beside.
    path = tool.get_by_placeholder("or a file or a folder")
    path.fill(str(parts))
    path.press("Tab")
    tool.get_by_role("button", name="Diagnose", exact=True).press("Enter")
    tool.get_by_role("img", name="fine.png with its heat map").wait_for()
    expect(tool.get_by_role("list", name="Verdicts").get_by_text("holed.png: defective")).to_be_visible()
    tool.get_by_role("button", name="Next", exact=True).press("Enter")  # arrow keys belong to JupyterLab
    tool.get_by_role("img", name="holed.png with its heat map").wait_for()


def slider(tool, name):
    """The (first) handle of a slider, which ipywidgets do not tie to its label."""
    return tool.locator(".widget-hslider", has_text=name).get_by_role("slider").first
