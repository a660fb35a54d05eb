"""Run notebooks top to bottom, each in a fresh kernel, and keep what they show.

    python scripts/run_course.py                      # every numbered notebook, on mini; `make run`
    python scripts/run_course.py --write              # and put the outputs into notebooks/, ready to commit
    python scripts/run_course.py notebooks/03_*.ipynb --profile anomalygpt-7b --set PART=4

Executed copies and HTML pages go to runs/course/. Exit status 1 when a notebook failed; the others still run.
"""

import argparse
import atexit
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "course"
NARROW = "<style>.jp-RenderedSVG img, .jp-RenderedSVG svg { max-width: 100%; height: auto }</style>"  # of drawings
CELL_TIMEOUT = 900  # seconds; the slowest cell of the course takes a fraction of this on two cores


@dataclass(frozen=True)
class Run:
    """One notebook executed: its outputs so far, the time it took, and what stopped it."""

    notebook: nbformat.NotebookNode
    seconds: float
    failure: str | None  # None when every cell passed, else the cell's source and its error, ready to print


def course() -> list[Path]:
    """The numbered notebooks in reading order, then the appendices."""
    folder = ROOT / "notebooks"
    return [*sorted(folder.glob("[0-9][0-9]_*.ipynb")), *sorted(folder.glob("appendix/[A-Z]_*.ipynb"))]


def run(path: Path, profile: str = "mini", timeout: float = CELL_TIMEOUT, **values: str) -> Run:
    """Execute a notebook in a fresh kernel, in its own folder, with ``PROFILE`` of its parameters set.

    ``values``: Python code for other parameters, whose lines it replaces.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except nbformat.reader.NotJSONError:
        return Run(nbformat.v4.new_notebook(), 0.0, "the file is not valid JSON (a merge conflict?)")
    set_parameters(notebook, {"PROFILE": f'"{profile}"'} | values)
    started = {"cell": None}
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # not its notes on local sockets
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=lambda cell, cell_index: started.update(cell=cell),
    )
    begin, failure = time.perf_counter(), None
    try:
        client.execute()
    except CellExecutionError as error:
        failure = describe_failure(started["cell"], str(error.traceback))
    except CellTimeoutError:
        failure = describe_failure(started["cell"], f"still running after {timeout:g} s, stopped")
    except RuntimeError:  # nbclient's DeadKernelError is one; before the first cell it raises a plain one
        failure = describe_failure(started["cell"], "the kernel died (out of memory, or a native crash)")
    except AssertionError:  # on Ctrl-C nbclient ends the kernel, and then asserts that there is one
        raise KeyboardInterrupt from None
    finally:
        atexit.unregister(client._cleanup_kernel)  # left behind by a kernel that never started
    return Run(notebook, time.perf_counter() - begin, failure)


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, str]) -> None:
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in values.items():
                pattern = re.compile(rf"^{name} = .*?(?=  #|$)", flags=re.MULTILINE)  # its comment stays
                cell.source = pattern.sub(lambda _, line=f"{name} = {value}": line, cell.source)


def describe_failure(cell: nbformat.NotebookNode | None, error: str) -> str:
    """The cell, what it wrote to stderr, and the error, without terminal colours."""
    if cell is None:
        return error
    stderr = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr")
    number = cell.execution_count or "not finished"
    parts = [f"cell [{number}]", indent(cell.source), indent(stderr), error]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(part for part in parts if part.strip()))


def indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The committed form of an executed notebook: the same outputs give the same bytes on every machine.

    Drops execution times, every metadata but tags and alternative texts, widget state and views, and stderr (progress
    bars and warnings, which name folders of the machine); joins the pieces that a stream happened to arrive in; writes
    paths inside the repository as seen from notebooks/.
    """
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        tags = {"tags": cell.metadata.tags} if "tags" in cell.metadata else {}
        cell.metadata = nbformat.from_dict(tags)
        if cell.cell_type == "code":
            cell.outputs = normalise_outputs(cell.outputs)
    return notebook


def normalise_outputs(outputs: list) -> list:
    kept = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            output.text = relative_paths(output.text)
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "data" in output:
            if any("jupyter.widget" in mime for mime in output.data):
                continue
            output.metadata = nbformat.from_dict({mime: {"alt": alt} for mime, alt in alternative_texts(output)})
            for mime, value in output.data.items():
                if mime.startswith("text/"):
                    output.data[mime] = relative_paths(value)
        kept.append(output)
    return kept


def alternative_texts(output: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """What an output's pictures say to whoever cannot see them: (mime type, text)."""
    about = ((mime, values.get("alt")) for mime, values in output.metadata.items() if isinstance(values, dict))
    return [(mime, alt) for mime, alt in about if alt]


def relative_paths(text: str) -> str:
    return text.replace(f"{ROOT}/", "../").replace(str(ROOT), "..")


def save_page(notebook: nbformat.NotebookNode, name: str) -> None:
    """Keep the executed copy and its HTML page under runs/course."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, RESULTS / f"{name}.ipynb")
    page, _ = HTMLExporter().from_notebook_node(notebook, resources={"metadata": {"name": name}})
    page = page.replace("</head>", f"{NARROW}</head>", 1)
    (RESULTS / f"{name}.html").write_text(page, encoding="utf-8")


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all numbered ones of the course")
    parser.add_argument("--profile", default="mini", help="written into each parameters cell; default mini")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other parameters, as Python code")
    parser.add_argument("--timeout", type=float, default=CELL_TIMEOUT, help="seconds for one cell")
    parser.add_argument("--write", action="store_true", help="store the normalised outputs in the notebooks")
    arguments = parser.parse_args()
    if arguments.write and (arguments.profile != "mini" or arguments.set):
        parser.error("--write stores outputs of the mini profile as it is, so that anyone can reproduce them")
    values = dict(pair.split("=", 1) for pair in arguments.set)
    paths = arguments.notebooks or course()
    if not paths:
        print("No numbered notebook (notebooks/NN_*.ipynb) to run.")
        return 1

    failed = []
    for path in paths:
        name = f"solution_{path.stem}" if path.parent.name == "solutions" else path.stem
        print(f"{name:<40}", end=" ", flush=True)
        result = run(path.resolve(), arguments.profile, arguments.timeout, **values)
        save_page(result.notebook, name if arguments.profile == "mini" else f"{name}_{arguments.profile}")
        print(f"{result.seconds:6.1f} s  {'FAILED' if result.failure else 'passed'}", flush=True)
        if result.failure:
            failed.append(path)
            print(indent(result.failure), flush=True)
        elif arguments.write:
            nbformat.write(normalise(result.notebook), path)

    where = RESULTS.relative_to(ROOT)
    if failed:
        print(f"\n{len(failed)} of {len(paths)} notebooks failed. Their pages until then: {where}/*.html")
        return 1
    print(f"\nAll {len(paths)} passed. Next: make lab, and begin with {paths[0].name};")
    print(f"or read the executed pages in a browser: {where}/*.html")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
