"""The command line: what it prints, what it writes, how it ends."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer import Argument, Option, Typer

from fake_model import FakeModel
from spgdd import __version__, cli
from spgdd.cli.common import add
from spgdd.diagnosis import Diagnoser
from spgdd.errors import WeightsError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder with three good pictures and two to diagnose; the command needs no weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spgdd.diagnosis.load", lambda **options: Diagnoser(FakeModel()))
    for name in ("good/1.png", "good/2.png", "good/10.png", "parts/a.png", "parts/b.png"):
        rng = np.random.default_rng(list(name.encode()))
        pixels = (np.array([100, 110, 120]) + rng.normal(0, 6, (64, 96, 3))).astype(np.uint8)
        if name == "parts/b.png":
            pixels[40:60, 70:90] = (200, 50, 50)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def run(*arguments):
    return cli.main(["diagnose", *map(str, arguments)])


def test_a_line_per_picture(folder, capsys):
    assert run("parts", "--normal", "good", "--product", "plate") == 0
    out, err = capsys.readouterr()
    good, bad = (line.split("  ") for line in out.splitlines())
    assert good[:2] == ["parts/a.png", "normal"] and good[3:5] == ["-", "No, there is no anomaly."]
    assert good[5:] == ["(its threshold is a guess, from 3 normal picture(s): give four or more)"]
    assert bad[:2] == ["parts/b.png", "defective"] and bad[3].startswith("bottom right ")
    score, threshold = map(float, bad[2].split(" / "))
    assert score > threshold and err == ""


def test_json_and_report_are_complete_and_repeatable(folder, capsys):
    arguments = (
        "parts/b.png",
        "parts/a.png",
        "--normal",
        "good",
        "--json",
        "out/r.json",
        "--report",
        "out/r.html",
    )
    assert run(*arguments) == 0
    first = (folder / "out/r.json").read_bytes(), (folder / "out/r.html").read_bytes()
    assert run(*arguments) == 0
    assert first == ((folder / "out/r.json").read_bytes(), (folder / "out/r.html").read_bytes())
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["r.html", "r.json"]
    table = json.loads(first[0])
    assert table["spgdd"] == __version__ and table["profile"] == "mini" and table["errors"] == []
    assert table["normals"] == ["good/1.png", "good/2.png", "good/10.png"]
    assert [result["image"] for result in table["results"]] == ["parts/b.png", "parts/a.png"]
    expected = {"score", "threshold", "verdict", "regions", "text", "map", "question", "agreement"}
    assert expected <= table["results"][0].keys() and "timings" not in table["results"][0]
    assert str(folder) not in first[0].decode() + first[1].decode()


def test_json_on_stdout_is_alone_there(folder, capsys):
    assert run("parts", "lost.png", "--normal", "good", "--json", "-", "--timings") == 1
    out, err = capsys.readouterr()
    table = json.loads(out)
    assert len(table["results"]) == 2 and "encode" in table["results"][0]["timings"]
    assert [error["image"] for error in table["errors"]] == ["lost.png"] and "lost.png" in err


def test_bad_files_cost_a_line_each_and_the_rest_goes_on(folder, capsys):
    (folder / "empty.png").touch()
    (folder / "words.jpg").write_text("words")
    (folder / "half.png").write_bytes((folder / "parts/a.png").read_bytes()[:3000])
    (folder / "nothing").mkdir()
    bad = ["empty.png", "words.jpg", "half.png", "lost.png", "nothing"]
    assert run(*bad, "parts", "--normal", "good", "--json", "r.json", "--report", "r.html") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    lines = [line for line in err.splitlines() if line.startswith("spgdd: ")]
    assert lines.pop() == "spgdd: 5 file(s) could not be used."
    assert len(lines) == 5 and all(any(name in line for line in lines) for name in bad)
    assert "Traceback" not in err
    table = json.loads((folder / "r.json").read_text())
    assert {error["image"] for error in table["errors"]} == set(bad) and len(table["results"]) == 2
    assert (folder / "r.html").read_text().count("Not diagnosed.") == 5


def test_bad_normals_are_named_and_left_out_but_one_must_remain(folder, capsys):
    (folder / "good/3.png").write_bytes(b"x")
    assert run("parts/a.png", "--normal", "good", "--json", "r.json") == 1
    table = json.loads((folder / "r.json").read_text())
    assert table["normals"] == ["good/1.png", "good/2.png", "good/10.png"]
    assert table["errors"][0]["image"] == "good/3.png" and len(table["results"]) == 1
    assert run("parts/a.png", "--normal", "good/3.png") == 1
    assert "none of the normal pictures" in capsys.readouterr().err


def test_without_normals_the_line_says_that_it_is_not_calibrated(folder, capsys):
    assert run("parts/a.png") == 0
    assert "(not calibrated)" in capsys.readouterr().out


def test_normals_are_encoded_once(folder, monkeypatch):
    model = FakeModel()
    monkeypatch.setattr("spgdd.diagnosis.load", lambda *_, **__: Diagnoser(model))
    assert run("parts", "--normal", "good/1.png", "good/2.png", "--normal", "good/10.png") == 0
    assert model.encoded == 5


def test_interrupted_batch_keeps_what_is_done(folder, monkeypatch, capsys):
    class Impatient(Diagnoser):
        def diagnose(self, image, *arguments, **options):
            if "b.png" in str(image):
                raise KeyboardInterrupt
            return super().diagnose(image, *arguments, **options)

    monkeypatch.setattr("spgdd.diagnosis.load", lambda *_, **__: Impatient(FakeModel()))
    assert run("parts", "--normal", "good", "--json", "r.json") == 130
    assert len(json.loads((folder / "r.json").read_text())["results"]) == 1


def test_errors_have_no_traceback_unless_asked_for(folder, monkeypatch, capsys):
    def load(*_, **__):
        raise WeightsError("profile mini lacks 1 file(s)")

    monkeypatch.setattr("spgdd.diagnosis.load", load)
    assert run("parts") == 1
    assert capsys.readouterr().err == "spgdd: profile mini lacks 1 file(s)\n"
    with pytest.raises(WeightsError):
        run("parts", "--debug")
    assert run("parts", "--json", "parts") == 1
    assert "parts: a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["diagnose"], ["diagnose", "a.png", "--false-alarm-rate", "0.7"], ["paint"], ["--what"]]
)
def test_wrong_usage_ends_with_2(arguments, capsys):
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spgdd: ") and "--help` shows the usage" in line


def test_options_of_several_values_take_them_at_once_or_one_by_one():
    def several(
        numbers: list[int] = Option((0, 1)), subsets: list[str] = Option(()), names: list[str] = Argument(None)
    ) -> None:
        taken.append((list(numbers), list(subsets), list(names or [])))

    taken, app = [], Typer()
    add(app, "several", several)
    for line in ("a", "--numbers 4 -1 --subsets x - y", "--numbers 4 --subsets x --numbers -1 --subsets - y",
                 "--subsets=x -- --numbers 4", "a b --numbers 4 8 -- c"):  # fmt: skip
        app(line.split(), standalone_mode=False)
    assert taken == [([0, 1], [], ["a"]), ([4, -1], ["x", "-", "y"], []), ([4, -1], ["x", "-", "y"], []),
                     ([0, 1], ["x"], ["--numbers", "4"]), ([4, 8], [], ["a", "b", "c"])]  # fmt: skip


def test_launchers_may_add_the_local_rank(capsys):
    assert cli.main(["--local_rank=0", "train"]) == 1
    assert "Nothing to train on" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "train", "weights download", "tadd world"])
@pytest.mark.parametrize("terminal", [{}, {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "40"}, {"FORCE_COLOR": "1"}])
def test_help_is_plain_text(command, terminal, capsys, monkeypatch):
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: spgdd") and "\x1b" not in out and "│" not in out and err == ""


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from spgdd.cli import main; assert main(['diagnose', '--help']) == 0\n"
    code += "print('heavy', sorted({'torch', 'numpy', 'PIL', 'transformers', 'scipy'} & set(sys.modules)))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--false-alarm-rate" in done.stdout and "heavy []" in done.stdout
    assert time.perf_counter() - start < 1


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "spgdd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
