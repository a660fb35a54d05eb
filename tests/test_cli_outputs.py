"""What the command line refuses before any work, what it keeps when something breaks, and what it lets a name do."""

import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from typer import Typer

import spgdd.report
from fake_model import FakeModel, part
from spgdd import cli
from spgdd.cli.common import add
from spgdd.diagnosis import Diagnoser
from spgdd.errors import SpgddError, printable
from spgdd.files import STALE, check_outputs, write_json
from spgdd.loading import load_model
from spgdd.ranges import check_ranges


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder with three good pictures and two to diagnose; the command needs no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spgdd.diagnosis.load", lambda *_, **__: Diagnoser(FakeModel()))
    for seed, name in enumerate(("good/1.png", "good/2.png", "good/3.png", "parts/a.png", "parts/b.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        part(seed=seed, marks=[(80, 80, 20, 20)] if name == "parts/b.png" else []).save(tmp_path / name)
    return tmp_path


def run(line, *more):
    return cli.main([*line.split(), *map(str, more)])


def no_model(*_, **__):
    raise AssertionError("the model was loaded before the options were looked at")


@pytest.mark.parametrize("line", [
    "diagnose a.png --tiles 0", "diagnose a.png --tiles 17", "diagnose a.png --tiles 1e3", "diagnose a.png --tiles -1",
    "diagnose a.png --max-new-tokens 0", "diagnose a.png --max-new-tokens 99999", "diagnose a.png --device gpu",
    "diagnose a.png --false-alarm-rate 0", "diagnose a.png --false-alarm-rate 0.5",
    "diagnose a.png --false-alarm-rate nan", "diagnose a.png --product=", "diagnose a.png --question=",
    "memory build nut --normal good -o m.safetensors --budget 0", "memory build nut --normal good --output=",
    "evaluate --data . --shots 1 -1", "evaluate --data . --seeds -1", "evaluate --data . --limit 0",
    "evaluate --data . --draws 0", "train --variants -1", "train --turns 0", "tadd world new --products 0",
    "tadd describe . --seed -1", "diagnose a.png --device cuda:x",
])  # fmt: skip
def test_a_value_out_of_range_is_refused_in_one_line_before_any_work(line, folder, monkeypatch, capsys):
    monkeypatch.setattr("spgdd.diagnosis.load", no_model)
    assert run(line) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("spgdd: ") and "--help` shows the usage" in said
    assert run("diagnose a.png --product", " \t ") == 2 and run("memory build", " ", "--normal=x", "-o=x") == 2


def test_ranges_hold_for_functions_too():
    diagnoser = Diagnoser(FakeModel())
    for options in ({"tiles": 17}, {"tiles": 0}, {"max_new_tokens": 0}, {"false_alarm_rate": 0.5}, {"product": " "}):
        with pytest.raises(SpgddError, match=next(iter(options))):
            diagnoser.diagnose(part(), **options)
    with pytest.raises(SpgddError, match="budget must be a whole number from 1 to"):
        diagnoser.reference([part()], budget=0)
    check_ranges(tiles=None, shots=(0, 1000), false_alarm_rate=1e-6, device=torch.device("cpu"), unknown=-5)
    with pytest.raises(SpgddError, match="there is no cuda:99 here"):
        load_model("mini", device="cuda:99")
    with pytest.raises(SpgddError, match="device must be cpu"):
        load_model("mini", device="gpu")


@pytest.mark.parametrize(("options", "said"), [
    ("--json parts", "parts: a folder"), ("--report result.pdf", "must end with .html or .htm"),
    ("--json good/1.png", "must end with .json"), ("--json good/1.png/x.json", "cannot be written"),
    ("--json {long}.json", "cannot be written"), ("--json link.json", "would overwrite"),
    ("--report good/../link.json", "must end with"), ("--json one.json --report same.html", "would overwrite"),
    ("--json hard.json", "would overwrite"), ("--json /proc/nothing/r.json", "cannot be written"),
])  # fmt: skip
def test_outputs_are_tried_before_the_work(options, said, folder, monkeypatch, capsys):
    monkeypatch.setattr("spgdd.diagnosis.load", no_model)
    (folder / "link.json").symlink_to("parts/a.png")
    os.link("good/2.png", "hard.json")
    (folder / "same.html").symlink_to("one.json")
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    assert run("diagnose parts --normal good " + options.format(long="x" * 300)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and {path: path.read_bytes() for path in folder.rglob("*.png")} == before


def test_every_command_tries_its_outputs(folder, monkeypatch, capsys):
    monkeypatch.setattr("spgdd.diagnosis.load", no_model)
    (folder / "good/4.safetensors").symlink_to("1.png")
    for line in ("memory build nut --normal good -o good", "memory build nut --normal good -o good/1.png",
                 "memory build nut --normal good -o good/4.safetensors", "evaluate --data . --json good/1.png",
                 "evaluate --data . --csv a.txt", "evaluate --data . --plot a.xyz", "tadd index . -o good/1.png",
                 "tadd describe . -o good/1.png"):  # fmt: skip
        assert run(line) == 1, line
        assert len(capsys.readouterr().err.splitlines()) == 1
    Image.open(folder / "good/1.png").verify()


def test_read_only_places_are_refused(folder, monkeypatch):
    def read_only(*_, dir, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(SpgddError, match="r.json: cannot be written .Read-only file system"):
        check_outputs([("r.json", [".json"])])


def test_links_are_followed_and_devices_and_pipes_written_to(folder):
    (folder / "real").mkdir()
    (folder / "r.json").symlink_to("real/results.json")
    (folder / "null.json").symlink_to("/dev/null")
    os.mkfifo("pipe.json")
    heard = []
    reader = threading.Thread(target=lambda: heard.append(json.loads((folder / "pipe.json").read_text())))
    reader.start()
    for target in ("r.json", "null.json", "pipe.json", "/dev/null"):
        assert run(f"diagnose parts --normal good --json {target}") == 0
    reader.join(10)
    linked = json.loads((folder / "real/results.json").read_text())
    assert (folder / "r.json").is_symlink() and len(linked["results"]) == 2
    assert len(heard[0]["results"]) == 2 and (folder / "pipe.json").is_fifo() and (folder / "null.json").is_symlink()
    assert run("evaluate --data none --json /dev/null") == 1 and os.path.exists("/dev/null")
    assert not os.path.isfile("/dev/null")


def test_pipes_and_devices_are_no_pictures_and_no_folders(folder, capsys):
    os.mkfifo("part.png")
    assert run("diagnose part.png /dev/null") == 1
    lines = capsys.readouterr().err.splitlines()
    assert "part.png: a device or a pipe, not a file." in lines[0] and "folder" not in "".join(lines)


def test_an_output_that_fails_does_not_lose_the_others(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)  # r.json and r.html fail alike, each at its own end
    assert run("diagnose parts --normal good --json r.json") == 1
    assert "r.json: cannot be written (No space left on device)" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("spgdd.diagnosis.load", lambda *_, **__: Diagnoser(FakeModel()))
    monkeypatch.setattr(spgdd.report.Report, "save", full)
    assert run("diagnose parts --normal good --json r.json --report r.html") == 1
    assert len(json.loads((folder / "r.json").read_text())["results"]) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["good", "parts", "r.json"]


def test_unfinished_files_of_killed_processes_are_removed_by_whoever_writes_there_next(tmp_path):
    old, new, other = (tmp_path / name for name in (f".a.{'0' * 12}.part", f".b.{'f' * 12}.part", ".film.part"))
    for path in (old, new, other):
        path.touch()
        os.utime(path, (0 if path != new else time.time() - 0.5 * STALE,) * 2)
    write_json(tmp_path / "r.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, other.name, "r.json"]


NAMES = ["new\nline.png", "return\r.png", "\x1b[31mred.png", "bell\a\x9b1m.png", "\u202eback.png",
         os.fsdecode(b"\xff.png")]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_do_not_steer_the_terminal(name, folder, capfdbinary):
    for path in (f"good/{name}", f"parts/{name}"):
        part(seed=9).save(folder / path)
    (folder / "good" / f"bad{name}").write_bytes(b"x")
    assert run("diagnose parts --normal good --json r.json --report r.html", f"lost{name}") == 1
    assert run("memory build nut --normal good -o", "m.safetensors") == 1
    assert run("memory inspect m.safetensors") == 0
    assert run("memory inspect", f"lost{name}") == 1
    assert run("evaluate --data", f"no{name}") == 1 and run("tadd index", f"no{name}") == 1
    assert run("diagnose --report", f"{name}.txt", "parts") == 1 and run("diagnose parts --profile", name) == 1
    assert run("train --preset", name) == 1 and run("diagnose parts", f"--{name}") == 2
    out, err = capfdbinary.readouterr()
    for text in (out, err):
        text = text.decode()  # it is UTF-8
        assert all(c.isprintable() or c in "\n\r" for c in text)
        assert not any(line.startswith(("line.png", "lost")) for line in text.splitlines())
    assert printable(name).encode() in out and printable(name).encode() in err
    written = json.loads((folder / "r.json").read_text())
    assert f"parts/{name}" in {row["image"] for row in written["results"]}  # as it is


@pytest.mark.parametrize("settings", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}])
def test_any_locale_will_do(settings, tmp_path):
    name = tmp_path / "tränke\udcff.json"
    line = [sys.executable, "-m", "spgdd", "evaluate", "--data", os.fsencode(name)]
    done = subprocess.run(line, capture_output=True, env={**os.environ, **settings})
    assert done.returncode == 1 and b"\\udcff.json is not a folder" in done.stderr and b"Traceback" not in done.stderr


def test_what_nobody_expected_ends_in_one_line_and_70(capsys):
    def broken(what: str) -> None:
        raise {"pickle": RuntimeError("Weights only load failed.\nSet weights_only=False to be sorry."),
               "disk": PermissionError(13, "Permission denied", "/x\n"), "key": KeyError("a\nb"),
               "memory": MemoryError()}[what]  # fmt: skip

    app = Typer()
    add(app, "broken", broken)
    for what, status in (("pickle", 70), ("disk", 1), ("key", 70), ("memory", 70)):
        assert app([what], standalone_mode=False) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert "weights_only" not in line and (("--debug" in line) == (status == 70))
    with pytest.raises(KeyError):
        app(["key", "--debug"], standalone_mode=False)


def test_small_scores_are_not_shown_as_nothing(folder, capsys):
    Image.fromarray(np.full((64, 64, 3), 100, np.uint8)).save("flat.png")
    Image.fromarray(np.full((64, 64, 3), 101, np.uint8)).save("flatter.png")
    assert run("diagnose flatter.png --normal flat.png") == 0
    score, threshold = capsys.readouterr().out.split("  ")[2].split(" / ")
    assert float(score) > 0 and float(threshold) > 0
