"""The web demo as programs see it: named endpoints, plain errors, and nothing outside of what was uploaded."""

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from fake_model import FakeModel, part
from spgdd.cli.demo import serve
from spgdd.diagnosis import Diagnoser
from spgdd.errors import SpgddError


@pytest.fixture(scope="module")
def page():
    page = serve(Diagnoser(FakeModel()), port=0)
    yield page
    page.close(verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for number in range(3):
        part(marks=[(240, 60, 20, 20)] * (number == 0), seed=number).save(folder / f"{number}.png")
    (folder / "text.png").write_text("no picture")
    return folder


def call(client, doubt, good, name="nut"):
    files = [[handle_file(path) for path in paths] for paths in (doubt, good)]
    return client.predict(*files, None, name, "", 0.05, 32, 0, 1, api_name="/diagnose")


def test_a_program_diagnoses_by_a_named_endpoint(page, files):
    client = Client(page.local_url, verbose=False)
    results, overlays = call(client, [files / "0.png"], [files / "1.png", files / "2.png"])
    assert results[0]["verdict"] == "defective" and results[0]["image"] == "0.png" and results[0]["product"] == "nut"
    assert results[0]["text"] == "Yes, there is an anomaly." and len(overlays) == 1
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {"/remember", "/diagnose"}


def test_errors_are_plain_words(page, files):
    with pytest.raises(AppError, match=r"^text\.png: not a picture"):
        call(Client(page.local_url, verbose=False), [files / "text.png"], [])


def test_no_file_of_the_machine_is_served(page):
    for path in ("/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "/proc/self/environ", __file__):
        answer = httpx.get(f"{page.local_url}gradio_api/file={path}")
        assert answer.status_code in (403, 404) and "root:" not in answer.text


def test_others_are_let_in_with_a_password_alone():
    with pytest.raises(SpgddError, match="give a --password"):
        serve(Diagnoser(FakeModel()), host="0.0.0.0")
    page = serve(Diagnoser(FakeModel()), port=0, password="secret")
    try:
        assert httpx.get(f"{page.local_url}config").status_code == 401
        wrong, right = (httpx.post(f"{page.local_url}login", data={"username": "me", "password": word})
                        for word in ("guess", "secret"))  # fmt: skip
        assert wrong.status_code == 400 and right.status_code == 200
    finally:
        page.close(verbose=False)
