"""The command ``spgdd``: one sub-command per job. Nothing heavy is imported before a job starts.

    spgdd diagnose part.png --normal good/ --product "metal nut" --json result.json --report result.html

Exit status: 0 all well, 1 something could not be done (a line on stderr says what), 2 wrong usage, 130 interrupted.
"""

import io
import sys
from typing import Annotated

import typer

from spgdd import __version__
from spgdd.cli import memory, tadd, weights
from spgdd.cli.common import MODEL, add, complain
from spgdd.cli.demo import demo
from spgdd.cli.diagnose import diagnose
from spgdd.cli.evaluate import evaluate
from spgdd.cli.train import SETTINGS, train

UsageError = typer.BadParameter.__base__  # of all wrong usage; typer has no public name for it


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        return app(arguments, prog_name="spgdd", standalone_mode=False) or 0
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "spgdd"
        complain(f"{' '.join(error.format_message().split())} `{command} --help` shows the usage.")
        return 2


def show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip


@app.callback()
def spgdd(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="show it")] = False,
    local_rank: Annotated[str | None, typer.Option("--local_rank", hidden=True)] = None,  # DeepSpeed's launcher adds it
) -> None:
    """Find, show and explain product defects."""


add(app, "diagnose", diagnose, MODEL,
    epilog='example: spgdd diagnose parts/ --normal good/ --product "metal nut" --report result.html')  # fmt: skip
add(app, "demo", demo, MODEL)
app.add_typer(actions := typer.Typer(help="Keep what normal pictures look like in a file."), name="memory")
add(actions, "build", memory.build, MODEL)
add(actions, "inspect", memory.inspect)
add(app, "evaluate", evaluate, MODEL, epilog="All figures are percentages.")
add(app, "train", train, SETTINGS)
app.add_typer(actions := typer.Typer(help="List, download, verify, merge and check weights."), name="weights")
add(actions, "list", weights.show_states)
add(actions, "show", weights.show)
add(actions, "download", weights.download)
add(actions, "verify", weights.verify)
add(actions, "merge-vicuna", weights.merge_vicuna)
add(actions, "check", weights.check)
app.add_typer(actions := typer.Typer(help="Index data sets, write TADD_text.json, download."), name="tadd")
add(actions, "index", tadd.index)
add(actions, "describe", tadd.describe)
add(actions, "world", tadd.world)
add(actions, "download", tadd.download)
