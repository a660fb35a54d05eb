"""Random calls of every command, options out of range, odd files and places: no traceback, nothing overwritten.

    SPGDD_FUZZ=300 python -m pytest tests/test_cli_fuzz.py      more calls than the test suite makes
"""

import hashlib
import os
import random
import socket
import threading

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

import miniworld.tasks
from fake_model import part
from spgdd import cli
from spgdd.diagnosis import Diagnoser
from spgdd.errors import WeightsError
from spgdd.ranges import RANGES
from spgdd.training.settings import OPTIONS
from test_evaluation import Speaker

CALLS, SEED = (int(os.environ.get(name, number)) for name, number in (("SPGDD_FUZZ", 120), ("SPGDD_FUZZ_SEED", 1)))
NUMBERED = {*RANGES, *(field.name for field in OPTIONS.values() if field.type in (int, float, tuple))}
NUMBERS = ("-1", "0", "3", "17", "9" * 30, "1.5", "nan", "-inf", "", "x", "0x10", "１")
TEXTS = ("metal nut", "", " ", "\n", "a" * 5000, "\x1b[2J", "MT=tile", "=", "set", "bolt", "ü", "--", "tiles=99")
WRITTEN = {"json_file", "report", "csv", "plot", "output", "save_path", "log_path", "cache", "out"}
GOOD = {  # what makes a call do its work
    "images": ["data/set/bolt/test/good", "data/set/bolt/test/scratch/*.png"], "normal": ["data/set/bolt/train/good"],
    "memory": ["new.safetensors"], "product": ["bolt", "set=bolt"], "data": ["data", "miniworld"], "subsets": ["set"],
    "folder": ["data", "drawn"], "json_file": ["new.json", "-"], "report": ["new.html"], "csv": ["new.csv"],
    "plot": ["drawn.png"], "output": ["new.safetensors", "new.json", "new.csv"], "file": ["new.safetensors"],
    "names": ["mini", "pandagpt-7b"], "name": ["mt"], "size": ["7b"], "data_path": ["list.json"],
    "preset": ["workshop"], "profile": ["mini"], "device": ["cpu"],
    "false_alarm_rate": ["0.1"], "root": ["weights"], "switches": ["tiles=1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set and every kind of odd thing."""
    root = tmp_path_factory.mktemp("odd")
    for number in range(8):
        kind = "train/good" if number < 4 else "test/good" if number < 6 else "test/scratch"
        path = root / "data/set/bolt" / kind / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        part((60, 40), [(30, 20, 6, 6)] * (kind == "test/scratch"), seed=number).save(path)
        if kind == "test/scratch":
            path = root / "data/set/bolt/ground_truth/scratch" / f"{number:03}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40 + 9 * (number == 7), 60), 255, np.uint8)).save(path)
    (root / "data/set/bolt/test/good/bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    good = (root / "data/set/bolt/train/good/000.png").read_bytes()
    odd = {"empty.png": b"", "half.png": good[:2000], "words.jpg": b"words", "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n",
           "list.json": b"[]", "half.json": b'[{"a": ', "null.yaml": b"null", "deep.yaml": b"{1: 2, epochs: [}",
           "bank.safetensors": b"\x08\0\0\0\0\0\0\0{}      ", "table.csv": b"\xff\xfe,\0\n", "page.html": b"<html>",
           "new\nline.png": good, "\x1b[31mred.png": good, os.fsdecode(b"\xff.png"): good, "x.json": good}  # fmt: skip
    for name, content in odd.items():
        (root / name).write_bytes(content)
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)).save(root / "deep.png")
    (root / "folder.png").mkdir()
    (root / "empty").mkdir()
    os.mkfifo(root / "pipe.png")
    pipe = os.open(root / "pipe.png", os.O_RDWR)  # somebody reads what is written there
    threading.Thread(target=lambda: [*iter(lambda: os.read(pipe, 10**6), b"")], daemon=True).start()
    for name, target in (("loop.png", "loop.png"), ("lost.png", "lost"), ("link.json", "half.png"),
                         ("link.safetensors", "bank.safetensors"), ("data/set/again", "..")):  # fmt: skip
        (root / name).symlink_to(target)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket.json")) if len(str(root)) < 80 else None
    return root


def commands(command, path=()):
    """Every command with its words."""
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))
    if path and not hasattr(command, "commands"):
        yield path, command


def call_of(rng: random.Random, words: tuple, command, paths: list[str]) -> tuple[list[str], set[str]]:
    """A line with some of the options, half of their values right; and the files that it may write."""
    line, tail, written, careful = list(words), [], {"TADD_text.json"} if "describe" in words else set(), rng.random()
    for each in command.params:
        argument = each.param_type_name == "argument"
        needed = each.required or argument
        if each.name in ("help", "debug", "yes") or rng.random() < (0.05 if needed else 0.8):
            continue
        if getattr(each, "is_flag", False) or getattr(each, "is_bool_flag", False):
            line.append(rng.choice([*each.opts, *each.secondary_opts]))
            continue
        odd = NUMBERS if each.name in NUMBERED else (*paths, *TEXTS)
        good = GOOD.get(each.name, ("1", "2") if each.name in NUMBERED else odd)
        many = each.nargs == -1 or getattr(each, "multiple", False)
        count = rng.choice((1, 2)) if many else each.nargs
        given = [rng.choice(good if rng.random() < careful else odd) for _ in range(count)]
        written |= set(given) if each.name in WRITTEN else set()
        if argument:
            tail += given
        else:
            line += [each.opts[0], *given]
    return [*line, *tail], written


def contents(root) -> dict:
    """What files and links there are, and what is in them."""
    found = {}
    for folder, _, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in names):
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[path] = hashlib.sha256(file.read()).hexdigest()
    return found


def test_no_call_ends_in_a_traceback_or_overwrites_what_it_reads(place, monkeypatch, capsys):
    def no_weights(*_, **__):
        raise WeightsError("there are no weights here")

    write_world, miniworld_tasks = miniworld.write_world, miniworld.tasks.miniworld_tasks
    monkeypatch.chdir(place)
    monkeypatch.setattr("spgdd.diagnosis.load", lambda *_, **__: Diagnoser(Speaker()))
    monkeypatch.setattr("spgdd.loading.load_model", no_weights)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    monkeypatch.setattr("miniworld.samples.PICTURES", 2)
    monkeypatch.setattr("miniworld.write_world", lambda folder, products, *more: write_world(folder, 1, *more))
    monkeypatch.setattr("miniworld.tasks.miniworld_tasks", lambda names, *_: miniworld_tasks(names or ["nut"], 1, 1))
    paths = [*sorted(os.listdir(place)), "data", "data/set", ".", "data/..", "/dev/null", "nowhere", "no/where.png",
             "*.png", "y" * 300, "", "half.png/x.json", "/proc/version", "new.json", "new/deep/new.json"]  # fmt: skip
    every = [each for each in commands(get_command(cli.app)) if each[0] != ("demo",)]  # which would serve
    assert len(every) == 15
    rng, known, statuses, problems = random.Random(SEED), contents(place), [], []
    for number in range(CALLS):
        words, command = every[number % len(every)]
        line, written = call_of(rng, words, command, paths)
        statuses.append(status := cli.main(line))
        out, err = capsys.readouterr()
        now = contents(place)
        changed = {os.path.relpath(path, place) for path, digest in known.items() if now.get(path) != digest}
        inputs = {path for path in line if line.count(path) > (path in written)}
        told = status == 0 or "spgdd: " in err or status == 1 and out
        if status not in (0, 1, 2) or "Traceback" in out + err or not told or changed - written or changed & inputs:
            problems.append((line, status, err[-300:], changed))
        known = now
    print({status: statuses.count(status) for status in sorted(set(statuses))})
    assert not problems, "\n".join(map(str, problems))
    assert all(statuses.count(status) > CALLS / 10 for status in (0, 1, 2))
