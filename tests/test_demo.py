"""The web demo as programs see it: named endpoints, plain errors, a bounded queue, nothing outside of its folders."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from fake_model import FakeModel, part
from spgdd.cli.demo import serve
from spgdd.diagnosis import Diagnoser
from spgdd.errors import SpgddError

SECRET = "what nobody outside may read"
# As a path of the examples' folder E, whose neighbour is secret.txt, S; all as they go over the wire.
TRAVERSALS = """
gradio_api/file=S               gradio_api/file=/S            gradio_api/file=file://S       gradio_api/file/S
gradio_api/file=E/../secret.txt gradio_api/file=E/./../secret.txt
gradio_api/file=E/%2e%2e/secret.txt gradio_api/file=E/..%2fsecret.txt gradio_api/file=E/%2e%2e%2fsecret.txt
gradio_api/file=E/..%252fsecret.txt gradio_api/file=E/....//secret.txt gradio_api/file=E/..%5csecret.txt
gradio_api/file=E/..;/secret.txt gradio_api/file=E/%c0%ae%c0%ae/secret.txt gradio_api/file=E%00/../secret.txt
gradio_api/file=/proc/self/rootS gradio_api/file=/dev/fd/../..S gradio_api/file=/proc/self/environ
file=S                          file/S                        static/../../../../../../../..S
static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2eS  assets/../../../../../../../../..S
gradio_api/proxy=file://S       gradio_api/stream/x/1/..S/playlist.m3u8  gradio_api/custom_component/x/client/style/..S
""".split()


@pytest.fixture(scope="module")
def page(files):
    page = serve(Diagnoser(FakeModel()), port=0, examples=files / "examples")
    yield page
    page.close(verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for number in range(3):
        part(marks=[(240, 60, 20, 20)] * (number == 0), seed=number).save(folder / f"{number}.png")
    (folder / "text.png").write_text("no picture")
    (folder / "examples" / "nut").mkdir(parents=True)
    part(seed=9).save(folder / "examples" / "nut" / "example.png")
    (folder / "secret.txt").write_text(SECRET)
    return folder


def call(client, doubt, good, name="nut"):
    files = [list(map(handle_file, paths)) for paths in (doubt, good)]
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


@pytest.fixture
def get(page):
    """GET of a path exactly as it is written, which httpx and browsers would tidy up before."""

    def get(path):
        connection = HTTPConnection("127.0.0.1", page.server_port, timeout=20)
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        return answer.status, answer.read()

    return get


def test_examples_are_served(get, files):
    example = files / "examples" / "nut" / "example.png"
    assert get(f"gradio_api/file={example}") == (200, example.read_bytes())


@pytest.mark.parametrize("pattern", TRAVERSALS)
def test_no_file_of_the_machine_is_served(get, files, pattern, monkeypatch):
    monkeypatch.setenv("SPGDD_SECRET", SECRET)
    path = pattern.replace("E/", f"{files}/examples/").replace("S", f"{files}/secret.txt")
    status, content = get(path)
    assert status >= 400 and SECRET.encode() not in content


@pytest.mark.parametrize("path", ["{}/0.png", "{}/examples/../0.png", "file://{}/0.png", "/proc/self/root{}/0.png"])
def test_no_picture_of_the_machine_is_diagnosed(page, files, path):
    picture = {"path": path.format(files), "meta": {"_type": "gradio.FileData"}}
    given = [[picture], [], None, "nut", "", 0.05, 32, 0, 1]
    asked = httpx.post(f"{page.local_url}gradio_api/call/diagnose", json={"data": given}).json()
    answer = httpx.get(f"{page.local_url}gradio_api/call/diagnose/{asked['event_id']}", timeout=20).text
    assert answer.startswith("event: error") and "verdict" not in answer


def test_an_upload_stays_in_the_folder_of_uploads(page):
    sent = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("../../../evil.png", b"evil")})
    (path,) = map(Path, sent.json())
    assert path.name == "evil.png" and Path(page.GRADIO_CACHE) in path.parents


def test_eight_programs_at_once_get_their_own_answers(page, tmp_path):
    """Each has a product of its own, whose part is marked at a place of its own (benchmarks/interactive.py: 8 x 25)."""
    expected = {}
    for number in range(8):
        picture = tmp_path / f"part_{number}.png"
        part(marks=[(30 + 34 * number, 30 + 30 * number, 20, 20)], seed=number).save(picture)
        found = Diagnoser(FakeModel()).diagnose(picture, product=f"product {number}").to_dict()
        expected[picture] = {key: found[key] for key in ("product", "score", "regions", "question", "text")}
    assert len({str(found["regions"]) for found in expected.values()}) == 8

    def program(picture):
        client = Client(page.local_url, verbose=False)
        for _ in range(5):
            (result,), _ = call(client, [picture], [], expected[picture]["product"])
            assert result["image"] == picture.name and expected[picture].items() <= result.items()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(program, expected))


def test_a_full_queue_says_so(files):
    """Two requests are worked on and sixteen wait; whoever comes then is told, and those are answered all the same."""
    model, go = FakeModel(), threading.Event()
    speak = model.language.stream
    model.language.stream = lambda *given, **options: go.wait(60) and (yield from speak(*given, **options))
    page = serve(Diagnoser(model), port=0)
    try:
        (path,) = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": (files / "0.png").open("rb")}).json()
        given = [[{"path": path, "meta": {"_type": "gradio.FileData"}}], [], None, "nut", "", 0.05, 32, 0, 1]
        join = f"{page.local_url}gradio_api/call/diagnose"
        with httpx.Client(timeout=60) as client:
            answers = [client.post(join, json={"data": given}) for _ in range(24)]
            refused = [answer for answer in answers if answer.status_code != 200]
            assert 5 <= len(refused) <= 8, "eight more than wait, of whom two or fewer were at work when the last came"
            assert all("Queue is full" in answer.text for answer in refused)
            go.set()
            for answer in answers[: 24 - len(refused)]:
                said = client.get(f"{join}/{answer.json()['event_id']}").text
                assert "event: complete" in said and "Yes, there is an anomaly." in said
    finally:
        go.set()
        page.close(verbose=False)


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
