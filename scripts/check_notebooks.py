"""Check that notebooks keep the form of the course; prints each problem with its cell, exit status 1 if any.

    python scripts/check_notebooks.py                      # all notebooks and appendices, about a second
    python scripts/check_notebooks.py notebooks/03_*.ipynb

What a machine can check of: one top block, install, environment and parameters cell each, short cells, little
prose, checks beside the code, outputs that are executed, clean and small, pictures with an alternative text, links
that lead somewhere, and numbers in the prose that the outputs show. A number that no output shows is marked as given
in a comment of its cell: <!-- given: 14 -->.
"""

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import nbformat

from run_course import ROOT, course, normalise

MAX_BYTES = 1_200_000
MAX_PROSE_WORDS = 80
MAX_MEDIAN_LINES, MAX_LINES = 6, 25
MAX_SILENT = 3  # code cells in a row without a sentence
TOP_BLOCK = ("you will be able to", "you need", "time", "vram", "disk", "you are here")
END_SECTIONS = ("Limits", "Takeaways", "Questions", "Exercises")

# Folders that exist on one machine only. /content is Colab's.
MACHINE_PATH = re.compile(r"(?<![\w.~-])(/(home|Users)/\w+|/root|/tmp|/content|/mnt|[A-Z]:\\Users)(?=[/\\])")
VOLATILE = {
    "a date and time": re.compile(r"\b20\d\d-\d\d-\d\d[ T]\d\d:\d\d"),
    "a memory address": re.compile(r"\b0x[0-9a-f]{8,}"),
}
STOCHASTIC = re.compile(r"\b(torch\.rand\w*|torch\.normal|np\.random\.(?!default_rng)\w+|random\.\w+)\(")
SEED = re.compile(r"manual_seed|default_rng|generator=|random\.seed|random\.Random|np\.random\.seed")
WORDS = "three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
NUMBER_WORDS = {word: number for number, word in enumerate(WORDS.split(), start=3)} | {"dozen": 12, "twenty": 20}
NUMBER = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.]*\w)|\b(?:{'|'.join(NUMBER_WORDS)})\b", flags=re.IGNORECASE)
IPYTHON_LINE = re.compile(r"^(\s*)[%!].*$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A notebook with the views of it that several rules share."""

    path: Path
    notebook: nbformat.NotebookNode

    @cached_property
    def code(self) -> list:
        return [cell for cell in self.notebook.cells if cell.cell_type == "code"]

    @cached_property
    def prose(self) -> list:
        return [cell for cell in self.notebook.cells if cell.cell_type == "markdown"]

    @cached_property
    def appendix(self) -> bool:
        return self.path.parent.name == "appendix"

    @cached_property
    def number(self) -> str:
        """"03" of a numbered notebook, "A" of an appendix."""
        return self.path.name.split("_")[0]

    @cached_property
    def top(self) -> str:
        """Markdown and code up to and with the parameters cell."""
        cells = self.notebook.cells
        last = next((i for i, cell in enumerate(cells) if is_parameters(cell)), len(cells) - 1)
        return "\n".join(cell.source for cell in cells[: last + 1])


def is_parameters(cell) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def python(cell) -> ast.Module:
    """The cell's code; lines of IPython's own (%pip, !ls) count as nothing."""
    return ast.parse(IPYTHON_LINE.sub(r"\1pass", cell.source))


def name_of(cell) -> str:
    first = next((line for line in cell.source.splitlines() if line.strip()), "an empty cell")
    number = f"[{cell.execution_count}] " if cell.get("execution_count") else ""
    return f"cell {number}'{first[:50]}'"


def text_of(output) -> str:
    """What an output says in words: streams, text, the words of pages and drawings, no pictures."""
    data = output.get("data", {})
    page = re.sub(r"<[^>]+>", " ", data.get("text/html", "") + data.get("image/svg+xml", ""))
    return " ".join((output.get("text", ""), data.get("text/plain", ""), page))


# ---- rules: each yields one sentence for each thing that is wrong -----------------------------------------


def file_name(page: Page) -> Iterator[str]:
    number, name = ("[A-Z]", "A") if page.appendix else (r"\d\d", "NN")
    if not re.fullmatch(number + r"(_[a-z0-9]+){2,}\.ipynb", page.path.name):
        yield f"the file is not called {name}_verb_noun.ipynb"


def size(page: Page) -> Iterator[str]:
    bytes_ = page.path.stat().st_size
    if bytes_ >= MAX_BYTES:
        yield f"{bytes_:,} bytes; keep it under {MAX_BYTES:,} (fewer or smaller pictures)"


def title(page: Page) -> Iterator[str]:
    if not re.match(rf"# {page.number} · \S", page.notebook.cells[0].source):
        yield f"the first cell does not begin with '# {page.number} · Title'"


def neighbours(page: Page) -> Iterator[str]:
    if page.appendix:
        if "](../" not in page.notebook.cells[0].source:
            yield "the first cell has no link to the notebook that it belongs to"
        return
    names = [path.name for path in sorted(page.path.parent.glob("[0-9][0-9]_*.ipynb"))]
    here = names.index(page.path.name)
    for word, there in (("previous", here - 1), ("next", here + 1)):
        if 0 <= there < len(names) and f"]({names[there]})" not in page.notebook.cells[0].source:
            yield f"the first cell has no link to the {word} notebook, {names[there]}"


def top_block(page: Page) -> Iterator[str]:
    said = page.top.lower().replace("_", " ")
    for words in TOP_BLOCK[:1] if page.appendix else TOP_BLOCK:
        if words not in said:
            yield f"the top does not say '{words}' before the parameters cell"


def install_cell(page: Page) -> Iterator[str]:
    installs = [cell for cell in page.code if re.search(r"\bpip3? install", cell.source)]
    if len(installs) != 1:
        yield f"{len(installs)} cells install packages; exactly one does, the first"
    for cell in installs:
        if '"google.colab" in sys.modules' not in cell.source:
            yield f"{name_of(cell)} installs outside Colab too"


def environment_cell(page: Page) -> Iterator[str]:
    cells = [cell for cell in page.code if re.search(r"\benvironment\(", cell.source)]
    if page.appendix:
        return
    if not cells:
        yield "no cell prints versions, device and precision: call spgdd.ui.notebook.environment(...)"
    elif "precision" not in "".join(text_of(output) for output in cells[0].outputs):
        yield f"{name_of(cells[0])} shows no precision in its output"


def parameters_cell(page: Page) -> Iterator[str]:
    cells = [cell for cell in page.code if is_parameters(cell)]
    if len(cells) != 1:
        yield f"{len(cells)} cells are tagged 'parameters'; exactly one is"
    for statement in (statement for cell in cells for statement in python(cell).body):
        try:
            constant = isinstance(statement, ast.Assign) and [ast.literal_eval(statement.value)]
        except ValueError:
            constant = False
        if not constant:
            yield f"the parameters cell holds more than constants: {ast.unparse(statement)}"


def executed(page: Page) -> Iterator[str]:
    counts = [cell.execution_count for cell in page.code if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield "not executed once from top to bottom: run scripts/run_course.py --write on it"


def outputs_present(page: Page) -> Iterator[str]:
    for cell in page.code:
        calls = [node.func for node in ast.walk(python(cell)) if isinstance(node, ast.Call)]
        names = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
        if names & {"print", "display", "show"} and not cell.outputs and "google.colab" not in cell.source:
            yield f"{name_of(cell)} prints or plots, and has no output"


def no_errors(page: Page) -> Iterator[str]:
    for cell in page.code:
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"{name_of(cell)} ends in an error"


def normal_form(page: Page) -> Iterator[str]:
    cleaned = normalise(page.notebook)
    if cleaned.metadata != page.notebook.metadata:
        yield "metadata beyond kernelspec and language (widget state?); run_course.py --write drops it"
    for cell, clean in zip(page.notebook.cells, cleaned.cells, strict=True):
        if cell != clean:
            yield f"{name_of(cell)} has times, widgets, stderr or metadata; run_course.py --write drops them"


def cell_ids(page: Page) -> Iterator[str]:
    raw = json.loads(page.path.read_text(encoding="utf-8"))  # nbformat.read would invent ids at random
    for identifier, times in Counter(cell.get("id") for cell in raw["cells"]).items():
        if identifier is None or times > 1:
            yield f"{times} cells have the id {identifier}: each needs its own, so that diffs stay readable"


def machine_paths(page: Page) -> Iterator[str]:
    for cell in page.notebook.cells:
        shown = "".join(text_of(output) for output in cell.get("outputs", []))
        for found in sorted({match.group() for match in MACHINE_PATH.finditer(cell.source + "\n" + shown)}):
            yield f"{name_of(cell)} names a folder of one machine, {found}"


def volatile_outputs(page: Page) -> Iterator[str]:
    for cell in page.code:
        shown = "".join(text_of(output) for output in cell.outputs)
        for what, pattern in VOLATILE.items():
            if pattern.search(shown):
                yield f"{name_of(cell)} shows {what}, which changes with every run"


def cell_lengths(page: Page) -> Iterator[str]:
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in page.code]
    if lengths and median(lengths) > MAX_MEDIAN_LINES:
        yield f"the median code cell has {median(lengths):g} lines, more than {MAX_MEDIAN_LINES}"
    for cell, length in zip(page.code, lengths, strict=True):
        if length > MAX_LINES:
            yield f"{name_of(cell)} has {length} lines, more than {MAX_LINES}"


def prose_lengths(page: Page) -> Iterator[str]:
    for cell in page.prose:
        text = re.sub(r"(?s)```.*?```|<!--.*?-->|<[^>]+>", "", cell.source)
        lines = [line for line in text.splitlines() if not re.match(r"\s*([#|>]|[-*] |\d+\. )", line)]
        words = len(re.sub(r"\]\([^)]*\)", "]", " ".join(lines)).split())
        if words > MAX_PROSE_WORDS:
            yield f"{name_of(cell)} has {words} words of prose, more than {MAX_PROSE_WORDS}"


def seeds(page: Page) -> Iterator[str]:
    for cell in page.code:
        if STOCHASTIC.search(cell.source) and not SEED.search(cell.source):
            yield f"{name_of(cell)} draws random numbers with no seed beside them"


def silent_cells(page: Page) -> Iterator[str]:
    row = 0
    for cell in page.notebook.cells:
        row = row + 1 if cell.cell_type == "code" else 0
        if row == MAX_SILENT + 1:
            yield f"{name_of(cell)} is the {row}th code cell in a row without a sentence"


def check_cells(page: Page) -> Iterator[str]:
    found = False
    for cell in page.code:
        for node in ast.walk(python(cell)):
            checks = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("check", "equal", "notice")
            found = found or checks or isinstance(node, ast.Assert)
            if isinstance(node, ast.Assert) and node.msg is None:
                yield f"{name_of(cell)} asserts without a message that teaches: {ast.unparse(node)}"
            if checks and not any(is_sentence(argument) for argument in node.args):
                yield f"{name_of(cell)} checks without a sentence that teaches: {ast.unparse(node)}"
    if not found:
        yield "no check cell: nothing asserts a shape or proves equality with spgdd"


def is_sentence(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and " " in str(node.value)


def alternative_text(page: Page) -> Iterator[str]:
    for cell in page.code:
        for output in cell.outputs:
            for mime, value in output.get("data", {}).items():
                says = output.metadata.get(mime, {}).get("alt") or mime == "image/svg+xml" and "aria-label=" in value
                if mime.startswith("image/") and not says:
                    yield f"{name_of(cell)} shows a picture without alternative text: give image_grid or compact alt="


def raw_repr(page: Page) -> Iterator[str]:
    for cell in page.code:
        for output in cell.outputs:
            plain = output.get("data", {}).get("text/plain", "")
            if set(output.get("data", {})) == {"text/plain"} and re.match(r"<|\w+\(", plain):
                yield f"{name_of(cell)} shows the raw {plain.split('(')[0][:40]}: print what a reader wants of it"


def numbers_in_prose(page: Page) -> Iterator[str]:
    """Numbers that prose names and no output shows; those marked as given in their cell, the top and tasks are free."""
    shown = {value for cell in page.code for output in cell.outputs for value in numbers(text_of(output))} | {0, 1, 2}
    for cell in (cell for cell in page.prose[1:] if not re.match("## (Questions|Exercises)", cell.source)):
        given = {value for mark in re.findall(r"<!-- given: (.*?) -->", cell.source) for value in numbers(mark)}
        text = re.sub(r"(?s)```.*?```|`[^`]*`|<!--.*?-->|<[^>]+>|\]\([^)]*\)|\$[^$]*\$", "", cell.source)
        text = re.sub(r"(?m)^\s*\d+\. |^#+ .*$|(?i:notebooks?|exercises?|appendix) \d+(, \d+)*( and \d+)?", "", text)
        unknown = [match.group() for match in NUMBER.finditer(text) if not appears(match.group(), shown | given)]
        if unknown:
            yield f"{name_of(cell)} names {', '.join(unknown)}, which no output shows"


def numbers(text: str) -> set[float]:
    return {value_of(match.group()) for match in NUMBER.finditer(text)}


def value_of(number: str) -> float:
    return float(NUMBER_WORDS.get(number.lower()) or number.replace(",", ""))


def appears(number: str, shown: set[float]) -> bool:
    """Whether a number is among those shown, or one of these rounds to it."""
    decimals = len(number.partition(".")[2])
    return any(round(value, decimals) == value_of(number) for value in shown)


def end_sections(page: Page) -> Iterator[str]:
    sections = {}
    for cell in [] if page.appendix else page.prose:
        heading = re.match(r"## (\w+)", cell.source)
        if heading:
            sections[heading.group(1)] = cell.source
    for wanted in () if page.appendix else END_SECTIONS:
        if wanted not in sections:
            yield f"no section '## {wanted}'"
    questions = len(re.findall(r"^\d+\. ", sections.get("Questions", ""), flags=re.MULTILINE))
    if "Questions" in sections and not 5 <= questions <= 8:
        yield f"{questions} questions; ask 5 to 8, numbered"
    if "Exercises" in sections and "](solutions/" not in sections["Exercises"]:
        yield "the exercises link to no solution under solutions/"


def links(page: Page) -> Iterator[str]:
    for cell in page.prose:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", cell.source):
            external = re.match(r"[a-z]+:", target)
            if not external and not (page.path.parent / target).exists():
                yield f"{name_of(cell)} links to {target}, which does not exist"


RULES = (
    file_name, size, title, neighbours, top_block, install_cell, environment_cell, parameters_cell, executed,
    outputs_present, no_errors, normal_form, cell_ids, machine_paths, volatile_outputs, cell_lengths,
    prose_lengths, silent_cells, seeds, check_cells, alternative_text, raw_repr, numbers_in_prose, end_sections, links,
)  # fmt: skip


def problems(path: Path) -> list[str]:
    """Every broken rule of one notebook, as sentences; empty when it keeps the form."""
    page = Page(path, nbformat.read(path, as_version=4))
    if not page.notebook.cells:
        return ["the notebook has no cells"]
    return [problem for rule in RULES for problem in rule(page)]


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: the whole course")
    paths = [path.resolve() for path in parser.parse_args().notebooks] or course()
    found = {path: problems(path) for path in paths}
    for path, sentences in found.items():
        for sentence in sentences:
            print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: {sentence}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
