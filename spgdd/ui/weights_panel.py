"""The state of the weights as a table in a notebook."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from spgdd.errors import SpgddError
from spgdd.weights.catalog import readable
from spgdd.weights.verify import FileStatus, status, verify

COLOURS = {"verified": "#1a7f37", "accepted": "#1a7f37", "unchecked": "#9a6700", "partial": "#9a6700",
           "stand-in": "#8250df", "missing": "#57606a", "wrong": "#cf222e"}


def status_table(rows: Iterable[FileStatus]) -> str:
    """HTML table of file states, as `status`, `verify` and `download` return them."""
    left = "<td style='text-align:left; overflow-wrap:anywhere'>"
    cells = "".join(
        f"<tr><td style='color:{COLOURS[row.state]}'><b>{row.state}</b></td>{left}{escape(row.path)}</td>"
        f"<td>{readable(row.size)}</td>{left}{escape(row.detail)}</td></tr>"
        for row in rows)
    heads = f"<th>state</th>{left}<b>file</b></td><th>size</th>{left}<b>what is known</b></td>"
    return f"<table><tr>{heads}</tr>{cells}</table>"


def status_panel(names: str | Iterable[str], root: str | Path | None = None):
    """ipywidgets table with buttons to verify and download; the licences are shown before a download."""
    import ipywidgets

    from spgdd.weights.download import download
    from spgdd.weights.plan import plan

    names = [names] if isinstance(names, str) else list(names)
    table, output = ipywidgets.HTML(status_table(status(names, root))), ipywidgets.Output()
    buttons = {text: ipywidgets.Button(description=text) for text in ("Verify", "Show licences", "Download")}
    buttons["Download"].disabled = True  # until the licences were shown

    def run(button) -> None:
        output.clear_output()
        with output:
            try:
                if button is buttons["Show licences"]:
                    print(plan(names, root))
                    buttons["Download"].disabled = False
                else:
                    work = verify if button is buttons["Verify"] else download
                    table.value = status_table(work(names, root))
            except SpgddError as error:
                print(error)

    for button in buttons.values():
        button.on_click(run)
    return ipywidgets.VBox([table, ipywidgets.HBox(list(buttons.values())), output])
