"""Every notebook keeps the course's form and runs in a fresh kernel; checker and runner do their job."""

import json
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import check_notebooks
import lesson
import run_course
from conftest import ROOT
from spgdd.profiles import get_profile

COURSE = run_course.course()
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_notebook_keeps_the_form(path):
    assert check_notebooks.problems(path) == []


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_notebook_runs_in_a_fresh_kernel(path):
    result = run_course.run(path)
    assert result.failure is None, result.failure


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solution_runs_in_a_fresh_kernel(path):
    result = run_course.run(path)
    assert result.failure is None, result.failure


def test_course_is_numbered_from_zero_without_repeats():
    numbers = [path.name[:2] for path in COURSE]
    assert len(set(numbers)) == len(numbers), f"two notebooks share a number: {numbers}"


def test_a_cell_that_needs_what_the_profile_lacks_says_so(monkeypatch, capsys):
    cell = ["%%needs words language\n", "1 / 0\n"]
    monkeypatch.setattr(lesson, "profile", get_profile("dinov2-small"), raising=False)
    exec("".join(lesson.skip(cell)))
    assert capsys.readouterr().out == "skipped: dinov2-small compares with no sentences and has no language model\n"
    monkeypatch.setattr(lesson, "profile", get_profile("mini"))
    assert lesson.skip(cell) == ["\n", "1 / 0\n"]


def test_what_is_noticed_must_hold_with_mini_alone(monkeypatch, capsys):
    monkeypatch.setattr(lesson, "profile", get_profile("mini"), raising=False)
    with pytest.raises(AssertionError, match="it is bright"):
        lesson.notice(False, "it is bright")
    monkeypatch.setattr(lesson, "profile", get_profile("dinov2-small"))
    lesson.notice(False, "it is bright")
    assert capsys.readouterr().out == "✗ not with dinov2-small: it is bright\n"


# the checker: a sample that passes, and one broken copy per rule

TOP = """# 01 · Read a number
You will be able to read a number. You need nothing.

| profile | time | VRAM | disk |
|---|---|---|---|
| mini | 1 s | - | - |

You are here: the only step."""
INSTALL = 'import sys\nif "google.colab" in sys.modules:\n    %pip install -q spgdd'
ENVIRONMENT = """def environment(profile):
    print(f"precision float32, because {profile} runs on the CPU")"""
END = "1. One?\n2. Two?\n3. Three?\n4. Four?\n5. Five?"


def sample():
    """A notebook that keeps every rule, not executed yet."""
    cells = [
        new_markdown_cell(TOP, id="top"),
        new_code_cell(INSTALL, id="install"),
        new_code_cell('PROFILE = "huge"  # mini or a 7B profile\nSEED = 0', id="parameters"),
        new_code_cell(ENVIRONMENT + "\nenvironment(PROFILE)", id="environment"),
        new_markdown_cell("It is below 1.", id="told"),
        new_code_cell(
            "import random\nrandom.seed(SEED)\nvalue = random.random()\nprint(value < 1)", id="draw"
        ),
        new_code_cell('assert value < 1, "random() is in [0, 1)"', id="check"),
        new_markdown_cell("## Limits\nOne number only.", id="limits"),
        new_markdown_cell("## Takeaways\n- Numbers can be read.", id="takeaways"),
        new_markdown_cell(f"## Questions\n{END}", id="questions"),
        new_markdown_cell("## Exercises\nRead two; [solution](solutions/01_read_number.md).", id="exercises"),
    ]
    cells[2].metadata["tags"] = ["parameters"]
    return new_notebook(cells=cells)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of the sample, executed and written in normal form."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "solutions").mkdir()
    (folder / "solutions" / "01_read_number.md").touch()
    path = folder / "01_read_number.ipynb"
    nbformat.write(sample(), path)
    result = run_course.run(path)
    assert result.failure is None, result.failure
    nbformat.write(run_course.normalise(result.notebook), path)
    return path


def test_sample_passes_every_rule(good):
    assert check_notebooks.problems(good) == []


def test_running_and_normalising_again_gives_the_same_bytes(good, tmp_path):
    again = tmp_path / good.name
    nbformat.write(run_course.normalise(run_course.run(good).notebook), again)
    assert again.read_bytes() == good.read_bytes()


def test_profile_of_the_parameters_cell_is_set_by_the_runner(good):
    cells = {cell.id: cell for cell in nbformat.read(good, as_version=4).cells}
    assert cells["parameters"].source.startswith('PROFILE = "mini"  # mini')
    assert "because mini runs" in cells["environment"].outputs[0].text


def cell(notebook, name):
    return next(cell for cell in notebook.cells if cell.id == name)


def edit(name, old, new):
    """A break: text of one cell replaced."""

    def apply(notebook):
        assert old in cell(notebook, name).source
        cell(notebook, name).source = cell(notebook, name).source.replace(old, new)

    return apply


def stream(text, name="stdout"):
    return new_output("stream", text=text, name=name)


def shows(output):
    """A break: the cell that draws shows something more."""
    return lambda notebook: cell(notebook, "draw").outputs.append(output)


BREAKS = {
    "title": (edit("top", "# 01 ·", "# 02 ·"), "does not begin with '# 01 · Title'"),
    "ability": (edit("top", "You will be able to", "Let us"), "'you will be able to'"),
    "needs": (edit("top", "You need", "There is"), "'you need'"),
    "resources": (edit("top", "VRAM", "memory"), "'vram'"),
    "pipeline": (edit("top", "You are here", "Now"), "'you are here'"),
    "install missing": (edit("install", "%pip install -q spgdd", "pass"), "0 cells install packages"),
    "install everywhere": (edit("install", 'if "google.colab" in sys.modules:', "if True:"), "outside Colab"),
    "no environment cell": (edit("environment", "environment(", "show("), "spgdd.ui.notebook.environment"),
    "no precision": (lambda nb: cell(nb, "environment").outputs.clear(), "shows no precision"),
    "parameters not tagged": (lambda nb: cell(nb, "parameters").metadata.clear(), "0 cells are tagged"),
    "computed parameter": (edit("parameters", "SEED = 0", "SEED = int(0)"), "constants: SEED = int(0)"),
    "not executed": (lambda nb: cell(nb, "draw").update(execution_count=None), "not executed once"),
    "executed out of order": (lambda nb: cell(nb, "draw").update(execution_count=9), "not executed once"),
    "output missing": (lambda nb: cell(nb, "draw").outputs.clear(), "prints or plots, and has no output"),
    "error": (shows(new_output("error", ename="ValueError", evalue="", traceback=[])), "ends in an error"),
    "execution times": (lambda nb: cell(nb, "draw").metadata.update(execution={}), "has times, widgets"),
    "stderr": (shows(stream("a warning", "stderr")), "has times, widgets, stderr"),
    "widget view": (
        shows(new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})),
        "has times, widgets",
    ),
    "widget state": (lambda nb: nb.metadata.update(widgets={"state": {}}), "metadata beyond kernelspec"),
    "kernel of one machine": (
        lambda nb: nb.metadata.kernelspec.update(name="a"),
        "metadata beyond kernelspec",
    ),
    "id missing": (lambda nb: cell(nb, "draw").pop("id"), "1 cells have the id None"),
    "same id twice": (lambda nb: cell(nb, "draw").update(id="check"), "2 cells have the id check"),
    "absolute path": (edit("draw", "value < 1", '"/home/ann/parts"'), "one machine, /home/ann"),
    "absolute path shown": (shows(stream("in /tmp/x")), "one machine, /tmp"),
    "date": (shows(stream("2026-01-31 10:00:00")), "a date and time"),
    "address": (shows(stream("<object at 0x7f0011223344>")), "a memory address"),
    "long cell": (edit("check", "assert", "x = 1\n" * 25 + "assert"), "has 26 lines, more than 25"),
    "long median": (
        lambda nb: [c.update(source="x = 1\n" * 7 + c.source) for c in nb.cells if c.cell_type == "code"],
        "the median code cell has",
    ),
    "much prose": (edit("limits", "One number", "word " * 81), "words of prose, more than 80"),
    "no seed": (edit("draw", "random.seed(SEED)", "pass"), "no seed beside them"),
    "no check": (edit("check", "assert value", "value"), "no check cell"),
    "check that does not teach": (edit("check", ', "random() is in [0, 1)"', ""), "without a message"),
    "no takeaways": (edit("takeaways", "## Takeaways", "## Summary"), "no section '## Takeaways'"),
    "few questions": (edit("questions", "5. Five?", ""), "4 questions; ask 5 to 8"),
    "no solution": (edit("exercises", "(solutions/01_read_number.md)", "(#top)"), "link to no solution"),
    "dead link": (edit("exercises", "01_read_number.md", "gone.md"), "gone.md, which does not exist"),
    "too large": (shows(stream("x" * 1_200_000)), "bytes; keep it under 1,200,000"),
    "no sentence": (lambda nb: nb.cells.remove(cell(nb, "told")), "is the 4th code cell in a row"),
    "picture without words": (
        shows(new_output("display_data", {"image/png": "", "text/plain": "a picture"})),
        "a picture without alternative text",
    ),
    "raw value": (
        shows(new_output("execute_result", {"text/plain": "tensor([1.0])"}, execution_count=4)),
        "shows the raw tensor",
    ),
    "number from nowhere": (edit("told", "below 1", "below 1, and 17 % more"), "names 17, which no output shows"),
    "number word from nowhere": (edit("told", "below 1", "one of seven"), "names seven, which no output shows"),
    "silent call of a check": (edit("check", "assert value < 1, ", "check(value < 1) #"), "without a sentence"),
}


@pytest.mark.filterwarnings("ignore::nbformat.warnings.MissingIDFieldWarning")
@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
@pytest.mark.parametrize("name", BREAKS)
def test_checker_sees(name, good):
    breaks, expected = BREAKS[name]
    notebook = nbformat.read(good, as_version=4)
    breaks(notebook)
    path = good.with_name("01_broken_copy.ipynb")
    path.write_text(json.dumps(notebook))  # nbformat.write would mend some of it
    try:
        found = check_notebooks.problems(path)
    finally:
        path.unlink()
    assert any(expected in problem for problem in found), found


def test_a_number_may_be_shown_rounded_or_marked_as_given(good):
    notebook = nbformat.read(good, as_version=4)
    shows(stream("0.8342"))(notebook)
    edit("told", "below 1", "0.83, of 224 pixels")(notebook)
    page = check_notebooks.Page(good, notebook)
    (problem,) = check_notebooks.numbers_in_prose(page)
    assert problem.endswith("names 224, which no output shows")
    edit("told", "pixels.", "pixels. <!-- given: 224 -->")(notebook)
    assert list(check_notebooks.numbers_in_prose(page)) == []


def test_an_appendix_links_back_and_needs_neither_neighbours_nor_questions(good):
    folder = good.with_name("appendix")
    folder.mkdir()
    notebook, path = nbformat.read(good, as_version=4), folder / "A_read_letters.ipynb"
    edit("top", "# 01 · Read a number", "# A · Read letters\n\nOf [01](../01_read_number.ipynb)")(notebook)
    edit("exercises", "(solutions/", "(../solutions/")(notebook)
    notebook.cells = [one for one in notebook.cells if one.id not in ("environment", "questions")]
    for number, one in enumerate((one for one in notebook.cells if one.cell_type == "code"), start=1):
        one.execution_count = number
    nbformat.write(notebook, path)
    assert check_notebooks.problems(path) == []
    edit("top", "](../01_read_number.ipynb)", "]")(notebook)
    nbformat.write(notebook, path)
    assert "no link to the notebook that it belongs to" in " ".join(check_notebooks.problems(path))


def test_checker_sees_a_bad_file_name(good):
    copy = good.with_name("01_Broken.ipynb")
    copy.write_bytes(good.read_bytes())
    try:
        assert any("NN_verb_noun" in problem for problem in check_notebooks.problems(copy))
    finally:
        copy.unlink()


def test_checker_asks_for_links_to_the_neighbours(good):
    following = good.with_name("02_read_two.ipynb")
    following.write_bytes(good.read_bytes())
    try:
        assert "next notebook, 02_read_two.ipynb" in " ".join(check_notebooks.problems(good))
        assert "previous notebook, 01_read_number.ipynb" in " ".join(check_notebooks.problems(following))
    finally:
        following.unlink()


def test_checker_command_names_the_file_and_fails(good, capsys, monkeypatch):
    broken = good.with_name("01_broken_copy.ipynb")
    notebook = nbformat.read(good, as_version=4)
    edit("top", "# 01 ·", "# 02 ·")(notebook)
    nbformat.write(notebook, broken)
    monkeypatch.setattr("sys.argv", ["check_notebooks.py", str(broken)])
    try:
        assert check_notebooks.main() == 1
    finally:
        broken.unlink()
    assert "01_broken_copy.ipynb: the first cell does not begin" in capsys.readouterr().out


# the runner on notebooks that fail -----------------------------------------------------------------


def notebook_of(tmp_path, name, source):
    path = tmp_path / name
    nbformat.write(new_notebook(cells=[new_code_cell("before = 1"), new_code_cell(source)]), path)
    return path


def test_runner_shows_cell_error_and_stderr_and_goes_on(tmp_path, capsys, monkeypatch):
    bad = notebook_of(tmp_path, "01_bad.ipynb", 'import sys\nprint("a hint", file=sys.stderr)\nbefore / 0')
    fine = notebook_of(tmp_path, "02_fine.ipynb", "before + 1")
    corrupt = tmp_path / "03_corrupt.ipynb"
    corrupt.write_text("<<<<<<< ours")
    before = fine.read_bytes()
    monkeypatch.setattr(run_course, "ROOT", tmp_path)
    monkeypatch.setattr(run_course, "RESULTS", tmp_path / "runs")
    monkeypatch.setattr("sys.argv", ["run_course.py", str(bad), str(fine), str(corrupt)])
    assert run_course.main() == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("01_bad") and lines[0].endswith("FAILED")
    assert "cell [2]" in out and "before / 0" in out and "a hint" in out and "ZeroDivisionError" in out
    assert "\x1b[" not in out, "terminal colours in the report"
    assert any(line.startswith("02_fine") and line.endswith("s  passed") for line in lines)
    assert any(line.startswith("03_corrupt") and line.endswith("FAILED") for line in lines)
    assert "2 of 3 notebooks failed" in lines[-1]
    assert "<html" in (tmp_path / "runs" / "02_fine.html").read_text()
    assert fine.read_bytes() == before, "without --write a notebook must not change"


@pytest.mark.parametrize(
    ("source", "timeout", "expected"),
    [
        ("import time; time.sleep(60)", 2, "still running after 2 s"),
        ("import os; os._exit(1)", 60, "kernel died"),
    ],
    ids=["stuck cell", "dead kernel"],
)
def test_runner_stops_and_says_why(tmp_path, source, timeout, expected):
    result = run_course.run(notebook_of(tmp_path, "01_bad.ipynb", source), timeout=timeout)
    assert expected in result.failure and source in result.failure
    assert result.seconds < 50


def test_kernel_that_dies_at_its_start_ends_that_notebook_alone(tmp_path, monkeypatch):
    startup = tmp_path / "ipython/profile_default/startup/00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("import os; os._exit(1)")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    result = run_course.run(notebook_of(tmp_path, "01_fine.ipynb", "before + 1"))
    assert result.failure.startswith("the kernel died")


def test_ctrl_c_stops_the_course(tmp_path):
    notebook_of(tmp_path, "01_long.ipynb", "import time; time.sleep(60)")
    command = [sys.executable, run_course.__file__, str(tmp_path / "01_long.ipynb"), str(tmp_path / "01_long.ipynb")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as course:
        assert course.stdout.read(7) == "01_long"
        time.sleep(5)
        course.send_signal(signal.SIGINT)
        out, said = course.communicate(timeout=50)
    assert course.returncode == 1 and said.rstrip().endswith("\nStopped.") and "FAILED" not in out


def test_write_refuses_outputs_of_another_profile(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_course.py", "--write", "--profile", "anomalygpt-7b"])
    with pytest.raises(SystemExit):
        run_course.main()
    assert "outputs of the mini profile" in capsys.readouterr().err


def test_alternative_texts_stay_when_outputs_are_normalised():
    picture = new_output("display_data", {"image/png": "AAAA"}, metadata={"image/png": {"alt": "a gear", "width": 3}})
    cleaned = run_course.normalise(new_notebook(cells=[new_code_cell("pass", outputs=[picture])]))
    assert cleaned.cells[0].outputs[0].metadata == {"image/png": {"alt": "a gear"}}


def test_streams_join_and_repository_paths_become_relative():
    outputs = [stream("one "), stream(f"{run_course.ROOT}/runs/x.json\n")]
    cleaned = run_course.normalise(new_notebook(cells=[new_code_cell("pass", outputs=outputs)]))
    assert [output.text for output in cleaned.cells[0].outputs] == ["one ../runs/x.json\n"]
