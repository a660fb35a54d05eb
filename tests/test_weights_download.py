"""Downloads from a server that misbehaves in every way that real ones do."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import spgdd
from conftest import ROOT
from spgdd.data.download import CATALOG
from spgdd.errors import SpgddError, WeightsError
from spgdd.profiles import PROFILES, get_profile
from spgdd.weights import catalog
from spgdd.weights.catalog import File
from spgdd.weights.download import address, download, fetch
from spgdd.weights.plan import plan
from spgdd.weights.verify import status, verify

QUICK = (0.001,) * 7


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """huggingface_hub waits a second after each break and hands over 10 MB at a time: much for small files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.15)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    for module in ("file_download", "utils._http"):
        hurried = SimpleNamespace(sleep=lambda seconds: time.sleep(0.001))
        monkeypatch.setattr(f"huggingface_hub.{module}.time", hurried)
    monkeypatch.setattr("spgdd.weights.download.WAITS", QUICK)


class Server(ThreadingHTTPServer):
    """Serves `files` by path; `faults(path, count)` names what goes wrong with a path's count-th request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.faults = {}, [], lambda path, count: "none"
        self.link = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        """Honest, and uncounted; the mirrors whose name ends with b have not learned it."""
        data = self.server.files.get(self.path)
        if self.path.split("/")[1].endswith("b"):
            return self.answer(501, b"", {})
        if isinstance(data, dict):
            return self.answer(302, b"", data)
        size = {"Content-Length": str(len(data or b"")), "ETag": f'"{hashlib.md5(data or b"").hexdigest()}"'}
        self.answer(404 if data is None else 200, b"", size)

    def do_GET(self):
        server, data = self.server, self.server.files.get(self.path)
        count = sum(path == self.path for path, _ in server.requests)
        server.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        fault = server.faults(self.path, count)
        if fault.isdigit() or data is None:
            return self.answer(int(fault) if fault.isdigit() else 404, b"no", {})
        if isinstance(data, dict):  # a redirect
            return self.answer(302, b"", data)
        chosen, headers, code, start = data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}, 200, 0
        if fault == "wrong bytes":
            chosen = bytes(byte ^ 1 for byte in data)
        if fault == "web page":
            chosen = b"<html>Please log in</html>"
        wanted = self.headers.get("Range")
        if wanted and fault != "no ranges":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(chosen):
                return self.answer(416, b"", {})
            start = {"earlier range": max(start - 7, 0), "later range": start + 7}.get(fault, start)
            code, headers["Content-Range"] = 206, f"bytes {start}-{len(chosen) - 1}/{len(chosen)}"
            chosen = chosen[start:]
        rng = random.Random(f"{self.path}{count}")
        if fault == "too long":
            chosen += b"x" * 100
            headers["Content-Range"] = (
                f"bytes {start}-{start + len(chosen) - 101}/{start + len(chosen) - 100}"
            )
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(chosen))}).items():
            self.send_header(key, value)
        self.end_headers()
        if fault in ("drop", "stall", "early drop", "late drop"):
            shares = {"early drop": 0.1, "late drop": 0.9}
            self.wfile.write(chosen[: int(shares.get(fault, rng.random()) * (len(chosen) + 1))])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(0.4)
            self.close_connection = True
            return self.connection.shutdown(2)
        if fault == "slow":
            for at in range(0, len(chosen), 4096):
                self.wfile.write(chosen[at : at + 4096])
                time.sleep(0.01)
            return None
        self.wfile.write(chosen)

    def answer(self, code, body, headers):
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def published(server, name, size, mirrors=("a",), seed=0, **known):
    data = random.Random(f"{name}{seed}").randbytes(size)
    for mirror in mirrors:
        server.files[f"/{mirror}/{name}"] = data
    known = known or {"sha256": hashlib.sha256(data).hexdigest(), "bytes": size}
    return data, File(
        f"folder/{name}", tuple(f"{server.link}/{mirror}/{name}" for mirror in mirrors), **known
    )


RECOVERABLE = (
    "drop",
    "drop",
    "drop",
    "stall",
    "429",
    "500",
    "503",
    "no ranges",
    "earlier range",
    "wrong bytes",
    "none",
)
HOPELESS = ("403", "404", "wrong bytes", "web page", "too long", "500")


def test_two_hundred_downloads_end_verified_or_refused(server, tmp_path):
    """Each file has one to three mirrors; a mirror is flaky but honest at last, or hopeless in one way."""
    nature = {}

    def faults(path, count):
        mirror = nature[path]
        if mirror != "flaky":
            return mirror
        rng = random.Random(f"{path}{count}")
        if count > 5:
            return "none"
        choices = [fault for fault in RECOVERABLE if fault != "wrong bytes" or count == 1]
        return rng.choice(choices)

    server.faults, rng, outcomes, lock = faults, random.Random(5), {}, threading.Lock()
    jobs = []
    for number in range(200):
        mirrors = [f"m{number}{letter}" for letter in "abc"[: rng.randint(1, 3)]]
        known = {} if number % 4 else {"bytes": None}
        data, file = published(server, f"{number}.bin", rng.choice((1, 1000, 30_000, 200_000)), mirrors)
        if known:  # one in four: hash known, size not
            file = File(file.path, file.sources, sha256=file.sha256)
        for mirror in mirrors:
            nature[f"/{mirror}/{number}.bin"] = rng.choice(("flaky", "flaky", *HOPELESS))
        honest = any(nature[f"/{mirror}/{number}.bin"] == "flaky" for mirror in mirrors)
        jobs.append((data, file, honest))

    def run(share):
        for data, file, honest in share:
            try:
                fetch(file, tmp_path, QUICK, progress=False)
                outcome = "verified"
            except WeightsError as error:
                outcome = str(error)
            with lock:
                outcomes[file.path] = (outcome, data, honest, len(file.sources))

    threads = [threading.Thread(target=run, args=(jobs[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(outcomes) == 200
    for path, (outcome, data, honest, mirrors) in outcomes.items():
        final = tmp_path / path
        if outcome == "verified":
            assert final.read_bytes() == data, path
        else:
            assert not final.exists(), path
            assert outcome.count("http://") == mirrors, outcome  # a reason for each source
            assert any(
                word in outcome for word in ("answered", "denied", "wrong", "announces", "sent", "broke")
            )
        assert (outcome == "verified") == honest, (path, outcome)
    verified = sum(outcome == "verified" for outcome, *_ in outcomes.values())
    assert 60 < verified < 140  # both ways out are really exercised


def test_resumes_where_it_stopped(server, tmp_path):
    data, file = published(server, "big.bin", 100_000)
    server.faults = lambda path, count: "drop" if count == 0 else "none"
    fetch(file, tmp_path, QUICK, progress=False)
    second = server.requests[1][1]["range"]
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) < 100_000
    assert (tmp_path / file.path).read_bytes() == data
    assert not list((tmp_path / "folder").glob("*.part*"))


@pytest.mark.parametrize("fault", ["earlier range", "later range", "no ranges"])
def test_another_range_than_asked_for(server, tmp_path, fault):
    """A file without a hash must not get a gap or a doubled stretch."""
    data, file = published(server, "f.dat", 50_000, bytes=50_000)
    server.faults = lambda path, count: ("drop", fault)[count] if count < 2 else "none"
    fetch(file, tmp_path, QUICK, progress=False)
    assert (tmp_path / file.path).read_bytes() == data


def test_a_broken_line_is_no_failure_after_a_wrong_file(server, tmp_path):
    """A wrong file had nearly arrived when the line broke: the next attempts count from nothing again."""
    data, file = published(server, "f.dat", 200_000)
    server.faults = lambda path, count: ["late drop", "wrong bytes", "early drop", "early drop", "none"][count]
    fetch(file, tmp_path, (0.001,), progress=False)
    assert (tmp_path / file.path).read_bytes() == data and len(server.requests) == 5


def test_another_version_on_the_server_starts_anew(server, tmp_path):
    """Without a hash, the beginning of one version must not be completed with the end of another."""
    data, file = published(server, "f.dat", 50_000, bytes=50_000)
    server.faults = lambda path, count: "drop" if count == 0 else "403"
    with pytest.raises(WeightsError, match="denied"):
        fetch(file, tmp_path, QUICK, progress=False)
    newer, _ = published(server, "f.dat", 50_000, seed=1, bytes=50_000)
    server.faults = lambda path, count: "none"
    fetch(file, tmp_path, QUICK, progress=False)
    assert (tmp_path / file.path).read_bytes() == newer


def test_says_what_cannot_be_verified(server, tmp_path, monkeypatch):
    published(server, "f.dat", 3000, bytes=3000)
    small_catalogue(server, monkeypatch, [{"name": "f.dat", "bytes": 3000}])
    (row,) = download("part", tmp_path, progress=False)
    assert row.state == "accepted" and "no hash is published; its size could be compared" in row.detail


def test_web_page_in_place_of_a_file_without_hash_is_refused(server, tmp_path):
    _, file = published(server, "config.json", 26, bytes=None)
    server.faults = lambda path, count: "web page"
    with pytest.raises(WeightsError, match="web page"):
        fetch(file, tmp_path, QUICK, progress=False)
    assert not (tmp_path / file.path).exists()


def small_catalogue(server, monkeypatch, files, source="a"):
    data = {
        "profiles": {"prof": ["part"]},
        "known_wrong": {},
        "bundles": {
            "part": {
                "title": "t",
                "folder": "folder",
                "licence": "for tests",
                "notebooks": ["01"],
                "contents": {"kind": "x"},
                "sources": [f"{server.link}/{source}/{{name}}"],
                "files": files,
            }
        },
    }
    monkeypatch.setattr(catalog, "_data", lambda: data)


def test_download_verify_and_status(server, tmp_path, monkeypatch):
    data = [published(server, f"{i}.bin", 20_000 + i)[0] for i in range(3)]
    small_catalogue(
        server,
        monkeypatch,
        [
            {"name": f"{i}.bin", "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
            for i, d in enumerate(data)
        ],
    )
    assert {row.state for row in status("prof", tmp_path)} == {"missing"}
    assert "for tests" in str(plan("prof", tmp_path)) and "3 file(s), 60 kB to fetch" in str(
        plan("prof", tmp_path)
    )
    assert {row.state for row in download("prof", tmp_path, progress=False)} == {"verified"}
    served = len(server.requests)
    download("prof", tmp_path, progress=False)
    assert len(server.requests) == served  # nothing is fetched twice
    damaged = tmp_path / "folder" / "1.bin"
    damaged.write_bytes(bytes(len(data[1])))
    assert [row.state for row in status("prof", tmp_path)] == ["verified", "unchecked", "verified"]
    assert [row.state for row in verify("prof", tmp_path)] == ["verified", "wrong", "verified"]
    with pytest.raises(WeightsError, match="Move it away"):
        download("prof", tmp_path, progress=False)
    damaged.write_bytes(data[1])
    (tmp_path / "verified.json").unlink()  # files that were copied by hand: nothing to fetch, all to be verified
    assert not plan("prof", tmp_path).files and "3 file(s) are there" in str(plan("prof", tmp_path))
    assert {row.state for row in download("prof", tmp_path, progress=False)} == {"verified"}
    assert len(server.requests) == served and str(plan("prof", tmp_path)) == "Nothing to download: all is there."


def test_offline_mode_and_small_disk(server, tmp_path, monkeypatch):
    small_catalogue(server, monkeypatch, [{"name": "f.dat", "bytes": 10}])
    monkeypatch.setattr("spgdd.weights.download.is_offline_mode", lambda: True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        download("part", tmp_path, progress=False)
    assert not server.requests
    small_catalogue(server, monkeypatch, [{"name": "f.dat", "bytes": 10**18}])
    with pytest.raises(SpgddError, match="are needed in .* are free"):
        download("part", tmp_path, progress=False)


def test_a_known_wrong_file_is_named(server, tmp_path, monkeypatch):
    data, _ = published(server, "f.dat", 100)
    small_catalogue(server, monkeypatch, [{"name": "f.dat", "bytes": 100}])
    catalog._data()["known_wrong"][hashlib.sha256(data).hexdigest()] = "Vicuna-7B v1.1"
    with pytest.raises(WeightsError, match="it is Vicuna-7B v1.1"):
        download("part", tmp_path, progress=False)


HUB = """
import sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
from spgdd.weights.catalog import File
from spgdd.weights.download import fetch
from pathlib import Path
fetch(File("f/model.bin", ("hf:owner/repo@main/sub/model.bin",)), Path(sys.argv[1]), progress=False)
"""


def test_hub_file_killed_and_resumed_with_token_and_hub_hash(server, tmp_path):
    """HF_ENDPOINT and HF_TOKEN as a user sets them; the hub states the hash, another host sends the bytes."""
    data = random.Random(3).randbytes(400_000)
    server.files["/cdn/blob"] = data
    server.files["/owner/repo/resolve/main/sub/model.bin"] = {
        "Location": f"http://localhost:{server.server_port}/cdn/blob",
        "X-Linked-Size": str(len(data)),
        "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
        "X-Repo-Commit": "c" * 40,
    }
    server.faults = lambda path, count: "slow" if path == "/cdn/blob" and count == 0 else "none"
    environment = os.environ | {"HF_ENDPOINT": server.link, "HF_TOKEN": "hf_secret"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", HUB, str(tmp_path)]
    process, part = subprocess.Popen(command, env=environment), tmp_path / "f" / "model.bin.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 50_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "f" / "model.bin").exists()
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "f" / "model.bin").read_bytes() == data
    cdn = [headers for path, headers in server.requests if path == "/cdn/blob"]
    assert int(cdn[1]["range"].removeprefix("bytes=").removesuffix("-")) > 0
    assert all("authorization" not in headers for headers in cdn)  # the token stays with the hub
    asked = [headers for path, headers in server.requests if path.startswith("/owner/")]
    assert [headers["authorization"] for headers in asked] == ["Bearer hf_secret"] * 2
    record = json.loads((tmp_path / "verified.json").read_text())["f/model.bin"]
    assert record["checked"] == "SHA-256 as stated by the hub"


COMMAND = """
import json, sys
from spgdd.weights import catalog
data = json.load(sys.stdin)
catalog._data = lambda: data
from spgdd.cli import main
sys.exit(main(["weights", "download", "dinov2-small", "--yes", "--root", sys.argv[1]]))
"""


def test_a_backbone_comes_from_the_hub_by_name_and_revision(server, tmp_path):
    """`spgdd weights download` against the hub's protocol: resumed, offline, and a wrong or a cut file refused."""
    from transformers import Dinov2Config, Dinov2Model

    Dinov2Model(Dinov2Config(hidden_size=48, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}')
    data = json.loads(json.dumps(catalog._data()))  # a copy
    revision, names = "ed25f3a31f01632728cabb09d1542f84ab7b0056", []
    for file in data["bundles"]["dinov2-small"]["files"]:
        content = (tmp_path / file["name"]).read_bytes()
        file |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        names.append(f"/facebook/dinov2-small/resolve/{revision}/{file['name']}")
        server.files[f"/blobs/{file['name']}"] = content
        server.files[names[-1]] = {"Location": f"/blobs/{file['name']}", "X-Linked-Etag": f'"{file["sha256"]}"'}
    weights = "/blobs/model.safetensors"

    def fetch_into(root, **environment):
        server.requests.clear()
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | environment
        return subprocess.run([sys.executable, "-c", COMMAND, str(root)], input=json.dumps(data), text=True,
                              env=environment | {"HF_ENDPOINT": server.link}, capture_output=True)  # fmt: skip

    refused = fetch_into(tmp_path / "a", HF_HUB_OFFLINE="1")
    assert refused.returncode == 1 and "HF_HUB_OFFLINE" in refused.stderr and not server.requests
    server.faults = lambda path, count: "wrong bytes" if path == weights else "none"
    refused = fetch_into(tmp_path / "a")
    assert refused.returncode == 1 and "sent a wrong file twice" in refused.stderr
    server.faults, whole = (lambda path, count: "none"), server.files[weights]
    server.files[weights] = whole[:-1000]
    refused = fetch_into(tmp_path / "a")
    assert refused.returncode == 1 and "announces a file of" in refused.stderr
    assert not (tmp_path / "a/dinov2_ckpt/small/model.safetensors").exists()
    server.files[weights] = whole
    part = tmp_path / "b/dinov2_ckpt/small/model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:1000])
    done = fetch_into(tmp_path / "b")
    assert done.returncode == 0, done.stderr
    asked = {path: headers for path, headers in server.requests}
    assert set(names) <= set(asked) and asked[weights]["range"] == "bytes=1000-"
    assert (tmp_path / "b/dinov2_ckpt/small/model.safetensors").read_bytes() == whole
    assert {row.state for row in status("dinov2-small", tmp_path / "b")} == {"wrong"}  # the real one has other bytes
    diagnoser = spgdd.load("dinov2-small", root=tmp_path / "b", device="cpu")
    assert diagnoser.model.vision.mean == (0.5, 0.5, 0.5)


def test_every_source_is_an_address():
    """Of the weights and of the data sets: models, spaces and data sets of the hub, and plain links."""
    bundles = [catalog.get_bundle(name) for name in catalog.names()[1]]
    sources = [source for bundle in bundles for file in bundle.files for source in file.sources]
    sources += [source for entry in CATALOG for file in entry.get("files", ()) for source in file["sources"]]
    links = {source: address(source)[0] for source in sources}
    assert all(link.startswith("https://") for link in links.values()) and len(links) > 40
    chat = next(link for source, link in links.items() if source.startswith("hf:datasets/"))
    name = "pandagpt_visual_instruction_dataset/resolve/db19562/pandagpt4_visual_instruction_data.json"
    assert chat == f"https://huggingface.co/datasets/openllmplayground/{name}"


def test_catalogue_is_complete():
    profiles, bundles = catalog.names()
    assert profiles == list(PROFILES)
    for name in bundles:
        bundle = catalog.get_bundle(name)
        assert bundle.licence and bundle.notebooks and (bundle.files or bundle.recipe)
        for file in bundle.files:
            assert file.size or bundle.contents["kind"] == "shipped"
            assert file.sources or bundle.contents["kind"] == "shipped"
            assert file.sha256 is None or len(file.sha256) == 64
    with pytest.raises(WeightsError, match="Parts: mini, dinov2-small, dinov2-base, imagebind-huge"):
        catalog.get_bundles("vicuna")


def test_the_shipped_weights_are_those_of_the_catalogue():
    """After a retraining the catalogue must be updated; the failure shows what its entries should be."""
    if not (ROOT / "pretrained_ckpt/mini").is_dir():
        pytest.skip("no mini weights in this checkout")
    bundle = catalog.get_bundle("mini")
    listed = {file.path: (file.bytes, file.sha256) for file in bundle.files}
    shipped = {}
    for path in sorted((ROOT / "pretrained_ckpt/mini").rglob("*")):
        if path.is_file() and path.suffix != ".md":  # the model card is no weight
            data = path.read_bytes()
            name = path.relative_to(ROOT / "pretrained_ckpt").as_posix()
            shipped[name] = (len(data), hashlib.sha256(data).hexdigest())
    assert listed == shipped, "the files are right and spgdd/weights/catalog.json is old, or a file is damaged"
    assert set(get_profile("mini").files()) <= set(listed)
    assert {row.state for row in verify("mini")} == {"verified"}
