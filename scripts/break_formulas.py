"""Break the formulas of the course one at a time, and show which check of a notebook catches each.

    python scripts/break_formulas.py             # all of broken_formulas.yaml: about ten minutes on one busy core
    python scripts/break_formulas.py AUROC PRO   # those with one of these words in their names

Of a notebook only those cells are run that the check needs: once as they are, when it must hold, and once with the
formula broken, in a copy that is thrown away. Exit status 1 if a broken formula survives.
"""

import argparse
import ast
import multiprocessing
import os
import shutil
import symtable
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import yaml

from check_notebooks import IPYTHON_LINE, is_parameters
from run_course import ROOT

TABLE = yaml.safe_load(Path(__file__).with_name("broken_formulas.yaml").read_text(encoding="utf-8"))
START = "from IPython.core.interactiveshell import InteractiveShell\nInteractiveShell.instance()"
SECONDS = 300  # for the cells of one check
FRESH = multiprocessing.get_context("forkserver")  # processes in which the large packages are imported already
FRESH.set_forkserver_preload(["torch", "transformers", "peft", "sklearn.metrics", "matplotlib.figure", "IPython"])


def path_of(notebook: str) -> Path:
    """The notebook whose name begins with "03", or the appendix with "A"."""
    (path,) = [*ROOT.glob(f"notebooks/{notebook}_*.ipynb"), *ROOT.glob(f"notebooks/appendix/{notebook}_*.ipynb")]
    return path


def cells_for(notebook: str, check: str) -> list[str]:
    """The code of the cell that holds the text ``check``, and before it of all cells that make what it reads."""
    cells = [cell for cell in nbformat.read(path_of(notebook), as_version=4).cells if cell.cell_type == "code"]
    (last,) = [number for number, cell in enumerate(cells) if check in cell.source]
    kept, needed = [], set()
    for number in range(last, -1, -1):
        code = IPYTHON_LINE.sub(r"\1pass", cells[number].source)
        if is_parameters(cells[number]):
            code += "".join(f"\n{name} = {value!r}" for name, value in TABLE["quick"].get(notebook, {}).items())
        makes, reads, changes = names(code)
        if number == last or (makes | changes) & needed and "google.colab" not in code:
            needed = needed - makes | reads
            kept.insert(0, code)
    return kept


def names(code: str) -> tuple[set[str], set[str], set[str]]:
    """The global names that code makes, those that it reads from elsewhere, and those whose methods it calls."""
    module = symtable.symtable(code, "a cell", "exec")
    makes = {one.get_name() for one in module.get_symbols() if one.is_assigned() or one.is_imported()}
    reads, tables = set(), [module]
    for table in tables:
        tables += table.get_children()
        used = [one for one in table.get_symbols() if one.is_referenced()]
        reads |= {one.get_name() for one in used if table is module or one.is_global()}
    calls = [node.value.func for node in ast.parse(code).body if isinstance(getattr(node, "value", None), ast.Call)]
    owners = {call.value.id for call in calls if isinstance(getattr(call, "value", None), ast.Name)}
    return makes, reads - makes, owners


def replaced(text: str, row: dict) -> str:
    if text.count(row["old"]) != 1:
        raise SystemExit(f"{row['breaks']}: found {text.count(row['old'])} times, not once: {row['old']}")
    return text.replace(row["old"], row["new"])


def failure(notebook: str, cells: list[str], row: dict | None = None) -> str | None:
    """The last line that the cells leave when they fail, with the formula of ``row`` broken; None when all hold."""
    paths = [str(ROOT / "notebooks"), str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        script = "\n\n".join([START, *cells])
        if row and "file" not in row:
            script = replaced(script, row)
        elif row:
            package = row["file"].split("/")[0]
            shutil.copytree(ROOT / package, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
            broken = Path(folder, row["file"])
            broken.write_text(replaced(broken.read_text(encoding="utf-8"), row), encoding="utf-8")
            paths.insert(0, folder)
        told = Path(folder, "told.txt")
        child = FRESH.Process(target=execute, args=(script, path_of(notebook).parent, paths, told))
        child.start()
        child.join(SECONDS)
        child.kill()
        return (told.read_text(encoding="utf-8").strip() or "?").splitlines()[-1] if child.exitcode else None


def execute(script: str, folder: Path, paths: list[str], told: Path) -> None:
    """Run a script in a folder with these packages first; what it prints, and how it fails, goes to a file."""
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "SPGDD_WEIGHTS": str(ROOT / "pretrained_ckpt")}
    sys.path[:0] = paths
    with open(told, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        exec(compile(script, "cells", "exec"), {"__name__": "__main__"})


def try_out(rows: list[dict]) -> list[tuple[bool, str]]:
    """Of rows with one and the same check whether it caught them, and what was said."""
    notebook = rows[0]["notebook"]
    cells = cells_for(notebook, rows[0]["check"])
    if told := failure(notebook, cells):
        return [(False, f"FAILS AS IT IS: {told}")] * len(rows)
    found = [failure(notebook, cells, row) or "SURVIVED" for row in rows]
    return [("AssertionError: " in told, told.removeprefix("AssertionError: does not hold: ")) for told in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the names of formulas; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="checks tried at a time")
    arguments = parser.parse_args()
    groups = defaultdict(list)
    for row in TABLE["formulas"]:
        if not arguments.words or any(word in row["breaks"] for word in arguments.words):
            groups[row["notebook"], row["check"]].append(row)
    survived = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for rows, caught in zip(groups.values(), pool.map(try_out, groups.values()), strict=True):
            for row, (seen, told) in zip(rows, caught, strict=True):
                where = row.get("file", "the notebook's own cell")
                print(f"{row['notebook']}  {row['breaks']} ({where})\n    {'✓' if seen else '✗'} {told}", flush=True)
                survived += not seen
    print(f"{sum(map(len, groups.values()))} formulas broken, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
