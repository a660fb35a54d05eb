"""The command ``spgdd``: one sub-command per job. Nothing heavy is imported before a job starts.

    spgdd diagnose part.png --normal good/ --product "metal nut" --json result.json --report result.html

Exit status: 0 all well, 1 something could not be done (a line on stderr says what), 2 wrong usage.
"""

import argparse
import io
import os
import sys

from spgdd import __version__
from spgdd.cli.common import complain
from spgdd.cli.diagnose import add_diagnose
from spgdd.cli.evaluate import add_commands as add_evaluate
from spgdd.cli.memory import add_commands as add_memory
from spgdd.cli.tadd import add_commands as add_tadd
from spgdd.cli.train import add_commands as add_train
from spgdd.cli.weights import add_commands as add_weights
from spgdd.errors import SpgddError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="spgdd", description="Find, show and explain product defects.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it before all else
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_diagnose, add_memory, add_evaluate, add_train, add_weights, add_tadd):
        add(commands).add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        return options.run(options)
    except SpgddError as error:
        if options.debug:
            raise
        complain(error)
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:  # whoever reads stdout, `head` for example, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
