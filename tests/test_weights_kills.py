"""Downloads killed at random moments: nothing half-written under a final name, and the last run ends as any other."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest

from spgdd.weights.verify import RECORD
from test_weights_download import Handler

RUN = """
import json, os, random, signal, sys, time
import huggingface_hub.constants
from spgdd.data import download as data
from spgdd.weights import catalog, download
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
job, root, kills, entry = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
part = {key: value for key, value in entry.items() if key != "page"}
catalog._data = lambda: {"profiles": {}, "known_wrong": {}, "bundles": {"part": part}}
data.DATASETS["part"] = entry

def start():
    if (child := os.fork()) == 0:
        download.download("part", root, progress=False) if job == "weights" else data.download("part", root)
        os._exit(0)
    return child

rng, hit = random.Random(3), 0
while hit < kills:
    child = start()
    time.sleep(rng.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    hit += os.waitpid(child, 0)[1] == signal.SIGKILL
    print("killed", flush=True)
    sys.stdin.readline()
assert os.waitpid(start(), 0)[1] == 0
"""


def kill(job: str, root, entry: dict, kills: int, look) -> None:
    """Run a download in a process that is killed so often; `look` is called after each kill."""
    command = [sys.executable, "-c", RUN, job, str(root), str(kills), json.dumps(entry)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.stdout.readline():
        look()
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.wait() == 0


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    server.files, server.requests, server.faults = {}, [], lambda path, count: "slow"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def published(server, files: dict[str, bytes]) -> dict:
    """An entry of the catalogues for files that a local server has."""
    server.files |= {f"/a/{name}": data for name, data in files.items()}
    link = f"http://127.0.0.1:{server.server_port}/a/"
    entries = [{"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
               for name, data in files.items()]  # fmt: skip
    return {"title": "t", "folder": "part", "licence": "for tests", "notebooks": [], "contents": {}, "page": "",
            "sources": [f"{link}{{name}}"], "files": entries}  # fmt: skip


def test_weights_download_killed(server, tmp_path, kills=5):
    files = {f"{i}.dat": random.Random(i).randbytes(12_000 * kills * i + 1000) for i in range(4)}

    def look():
        for name, data in files.items():
            assert not (tmp_path / "part" / name).exists() or (tmp_path / "part" / name).read_bytes() == data

    kill("weights", tmp_path, published(server, files), kills, look)
    assert {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()} == files
    record = json.loads((tmp_path / RECORD).read_text())
    assert all(record[f"part/{name}"]["verified"] for name in files)


def test_tadd_download_killed(server, tmp_path, kills=5):
    pictures = tmp_path / "made" / "bolt" / "train" / "good"
    pictures.mkdir(parents=True)
    for i in range(300):
        (pictures / f"{i}.png").write_bytes(random.Random(i).randbytes(500))
    archive = shutil.make_archive(str(tmp_path / "toy"), "zip", tmp_path / "made")
    with open(archive, "rb") as file:
        entry = published(server, {"toy.zip": file.read()})
    entry["files"][0]["sources"] = [entry["sources"][0].replace("{name}", "toy.zip")]
    whole = {path.relative_to(tmp_path / "made"): path.read_bytes() for path in pictures.iterdir()}
    unpacked = tmp_path / "TADD" / "part" / "bolt"

    def look():
        found = {path.relative_to(unpacked.parent): path.read_bytes() for path in unpacked.rglob("*.png")}
        assert found.items() <= whole.items()
        return found

    kill("tadd", tmp_path / "TADD", entry, kills, look)
    assert look() == whole
    assert {path.name for path in unpacked.parent.iterdir() if path.name[0] != "."} == {"bolt", "toy.zip", RECORD}
    assert not (unpacked.parent / ".toy.zip.unpacking").exists()
