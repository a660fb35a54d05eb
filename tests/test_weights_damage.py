"""Nothing damaged passes: mutated files and mutated answers of servers are refused in a line, or change nothing."""

import functools
import hashlib
import json
import os
import random
import shutil
import threading
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from spgdd.data.download import unpack
from spgdd.errors import SpgddError, WeightsError
from spgdd.files import claimed
from spgdd.language import Vicuna
from spgdd.tensors import read_tensors
from spgdd.weights import catalog
from spgdd.weights.catalog import File
from spgdd.weights.delta import apply_delta, save_delta
from spgdd.weights.download import download, fetch
from spgdd.weights.llama import recognise, require_v0
from spgdd.weights.merge import MERGE_REPORT, merge_vicuna
from spgdd.weights.verify import RECORD, check_file, status, verify
from test_weights_download import impatient  # noqa: F401 (it applies to every test here too)
from test_weights_vicuna import Bomb, llama, merged_tensors

JUNK = ([], {}, None, True, "x", "", -1, 0, 1.5, 10**30, float("nan"), float("inf"), [[]], {"a": []}, "../../x")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a stretch zeroed, doubled, moved or cut away, or the end missing."""
    data, at, length = bytearray(data), rng.randrange(len(data)), rng.randint(1, 64)
    kind = rng.randrange(6)
    if kind < 2:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == 3:
        data[at:at] = data[at : at + length]
    elif kind == 4:
        del data[at : at + length]
    else:
        del data[at:]
    return bytes(data)


def mutated_json(value, rng: random.Random):
    """One value anywhere in it replaced by junk, or missing."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(JUNK)
    copy = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        del copy[key]
    else:
        copy[key] = mutated_json(value[key], rng)
    return copy


def merge(*folders):
    return merge_vicuna(*folders, shard_bytes=200_000, progress=False)


def said(error: BaseException) -> None:
    assert isinstance(error, SpgddError), repr(error)
    assert "weights_only" not in str(error) and "Traceback" not in str(error)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_mutated_deltas_are_refused_or_equal(tmp_path, kind):
    torch.manual_seed(0)
    trained, fresh = nn.Linear(8, 8), nn.Linear(8, 8)
    path = tmp_path / f"delta.{kind}"
    if kind == "pt":
        torch.save(trained.state_dict(), path)
    else:
        save_delta(trained, path, {"profile": "mini", "step": "3"})
    data, refused = path.read_bytes(), 0
    for number in range(200):
        path.write_bytes(mutated(data, random.Random(number)))
        try:
            apply_delta(fresh, read_tensors(path, intact=True))
        except Exception as error:
            said(error)
            refused += 1
        else:
            assert all(torch.equal(fresh.state_dict()[name], value) for name, value in trained.state_dict().items())
    assert refused > 120


def test_mutated_configs_and_indexes_are_refused_or_give_the_same_merge(tmp_path):
    base, delta, out = folders = tmp_path / "base", tmp_path / "delta", tmp_path / "out"
    llama(base, 50, "safetensors")
    llama(delta, 51, delta=True)
    merge(*folders)
    expected = merged_tensors(out)
    for number in range(60):
        rng = random.Random(number)
        path = rng.choice((base / "config.json", delta / "config.json", delta / "pytorch_model.bin.index.json",
                           base / "model.safetensors.index.json", out / MERGE_REPORT))  # fmt: skip
        kept = path.read_bytes()
        as_bytes = rng.random() < 0.3
        path.write_bytes(mutated(kept, rng) if as_bytes else json.dumps(mutated_json(json.loads(kept), rng)).encode())
        for attempt, *given in ((recognise, base), (recognise, delta), (require_v0, base), (merge, *folders)):
            try:
                attempt(*given)
            except Exception as error:
                said(error)
        path.write_bytes(kept)
        merge(*folders)
        again = merged_tensors(out)
        assert again.keys() == expected.keys() and all(torch.equal(again[k], expected[k]) for k in again)


def test_a_base_model_with_code_or_without_an_index_entry_is_refused_in_plain_words(tmp_path):
    llama(tmp_path / "code", 51, num_attention_heads=4)
    torch.save({"bomb": Bomb()}, tmp_path / "code/pytorch_model-00001-of-00002.bin")
    llama(tmp_path / "index", 51, num_attention_heads=4)  # whose index lacks what transformers expects there
    for name, reason in (("code", "objects that could run code"), ("index", "unreadable")):
        index = tmp_path / name / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}} | json.loads(index.read_text()) if name == "code" else {}))
        with pytest.raises(WeightsError, match=reason) as error:
            Vicuna.load(tmp_path / name, joint=8)
        said(error.value)


def test_mutated_records_never_make_a_file_verified(tmp_path):
    llama(tmp_path / "base", 50)
    llama(tmp_path / "delta", 51, delta=True)
    out = tmp_path / "root/vicuna_ckpt/13b_v0"
    merge_vicuna(tmp_path / "base", tmp_path / "delta", out, 30_000, progress=False)
    verify("vicuna-13b-v0", tmp_path / "root")
    shard = sorted(out.glob("model-*"))[0]
    shard.write_bytes(bytes(shard.stat().st_size))  # changed after it was verified
    for number in range(200):
        rng = random.Random(number)
        path = rng.choice((out / MERGE_REPORT, tmp_path / "root" / RECORD))
        kept = path.read_bytes()
        changed = mutated(kept, rng) if rng.random() < 0.3 else json.dumps(mutated_json(json.loads(kept), rng)).encode()
        path.write_bytes(changed)
        rows = status("vicuna-13b-v0", tmp_path / "root")
        assert not [row for row in rows if row.path.endswith(shard.name) and row.state == "verified"], number
        path.write_bytes(kept)


class Mutating(BaseHTTPRequestHandler):
    """Answers as the hub does, with something wrong in each answer."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        self.answer(self.server.data)

    def answer(self, body):
        server = self.server
        server.count += 1
        rng = random.Random(f"{server.seed} {server.count}")
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        code, size = (206 if begin else 200), len(server.data)
        headers = {"Content-Length": len(body) - begin if body else size, "ETag": f'"{server.etag}"',
                   "X-Linked-Etag": f'"{server.etag}"', "X-Linked-Size": size,
                   "Content-Range": f"bytes {begin}-{size - 1}/{size}" if begin else ""}  # fmt: skip
        body = body[begin:]
        for _ in range(rng.randrange(3)):
            kind, name = rng.randrange(4), rng.choice(list(headers))
            if kind == 0:
                code = rng.choice((200, 204, 206, 301, 302, 304, 400, 401, 404, 416, 429, 500, 503, 999))
            elif kind == 1:
                headers[name] = rng.choice(("", "-5", "x", "bytes 3-2/*", "bytes */9", '"é"', "0", str(10**20), 'W/""'))
            elif kind == 2:
                headers["Location"] = rng.choice(("", "ftp://x", "http://[", "//", self.path, "/other", "http://[::1]:1/"))
            elif body:
                body = mutated(body, rng)
        self.send_response(code)
        for name, value in headers.items():
            if value != "":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("hashed", [True, False])
def test_mutated_answers_end_in_the_right_file_or_a_line(tmp_path, monkeypatch, hashed):
    """A file whose hash the catalogue holds, and one on a hub that states it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mutating)
    server.handle_error = lambda *_: None
    link = f"http://127.0.0.1:{server.server_port}"
    server.data = random.Random(1).randbytes(5000)
    server.etag = hashlib.sha256(server.data).hexdigest()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    known, sources = {"sha256": server.etag, "bytes": 5000}, (f"{link}/file",)
    if not hashed:
        monkeypatch.setattr("spgdd.weights.download.address", lambda source: (f"{link}/file", {}))
        known, sources = {}, ("hf:owner/repo@main/file",)
    outcomes = []
    try:
        for server.seed in range(100):
            server.count = 0
            file = File(f"{server.seed}.dat", sources, **known)
            try:
                fetch(file, tmp_path, (0.001,) * 4, progress=False)
            except Exception as error:
                said(error)
                assert not (tmp_path / file.path).exists()
            else:
                stated = json.loads((tmp_path / RECORD).read_text())[file.path]
                right = (tmp_path / file.path).read_bytes() == server.data
                assert right or (not hashed and not stated["verified"]), server.seed
            outcomes.append((tmp_path / file.path).exists())
    finally:
        server.shutdown()
    assert 20 < sum(outcomes) < 100


class Endless(BaseHTTPRequestHandler):
    """Sends for ever, and says nothing of a length."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.server.sent += self.wfile.write(bytes(100_000))
        except OSError:
            pass


@pytest.mark.parametrize("known", [{"bytes": 12_000}, {"about_bytes": 12_000}])
def test_a_published_size_bounds_a_download(tmp_path, known):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.sent = 0
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    file = File("x.dat", (f"http://127.0.0.1:{server.server_port}/x.dat",), **known)
    try:
        with pytest.raises(WeightsError, match="more than the 1.*000 of the file"):
            fetch(file, tmp_path, (), progress=False)
    finally:
        server.shutdown()
    assert not list(tmp_path.iterdir()) and server.sent < 50e6
    for bundle in map(catalog.get_bundle, catalog.names()[1]):
        assert all(file.size <= file.most < 1.1 * file.size + 2e5 for file in bundle.files)


def test_a_full_disk_and_a_second_download_are_a_line(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    (tmp_path / "x.dat").write_bytes(bytes(20_000))
    file = File("got/x.dat", (f"http://127.0.0.1:{server.server_port}/x.dat",), bytes=20_000, sha256="0" * 64)
    file.partial(tmp_path).parent.mkdir()
    file.partial(tmp_path).symlink_to("/dev/full")
    try:
        with pytest.raises(WeightsError, match="cannot be written .No space left"):
            fetch(file, tmp_path, (), progress=False)
    finally:
        server.shutdown()
    with claimed(tmp_path), pytest.raises(SpgddError, match=f"in use by process {os.getpid()}"):
        download("anomalygpt-7b", tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar", "xztar"])
def test_mutated_archives_are_unpacked_or_thrown_away(tmp_path, kind):
    for i in range(20):
        (tmp_path / "made/good").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"made/good/{i}.png").write_bytes(random.Random(i).randbytes(2000))
    archive = Path(shutil.make_archive(str(tmp_path / "set/set"), kind, tmp_path / "made"))
    data, good = archive.read_bytes(), archive.with_name("good")
    for number in range(50):
        shutil.rmtree(good, ignore_errors=True)
        archive.write_bytes(mutated(data, random.Random(number)))
        try:
            unpack(archive)
        except Exception as error:
            said(error)
            assert not archive.exists() and not good.exists(), str(error)
        else:
            assert archive.exists()
        assert {path.name for path in archive.parent.iterdir()} <= {"good", archive.name}


def test_a_junk_archive_without_a_hash_is_refused(tmp_path):
    """Of its size, but no archive: not accepted, so that the next call fetches it again."""
    with pytest.raises(WeightsError, match="no .zip file"):
        (tmp_path / "x.zip").write_bytes(b"junk" * 100)
        check_file(tmp_path / "x.zip", File("x.zip", (), bytes=400))
