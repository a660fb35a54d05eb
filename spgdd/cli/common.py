"""What the commands share: how a function becomes one, how it ends, and options that several of them take."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Literal

from typer import BadParameter, Option, Typer
from typer.core import TyperCommand

from spgdd.errors import ImageError, SpgddError, printable
from spgdd.files import write_json
from spgdd.profiles import PROFILES, get_profile
from spgdd.ranges import check_ranges

PROFILE = Option("mini", help=", ".join(PROFILES))
ROOT = Option(None, help="folder of the weights (default: $SPGDD_WEIGHTS or pretrained_ckpt)")
DEVICE = Option(None, help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
QUANTIZE = Option(None, help="shrink the language model on a GPU (needs bitsandbytes)")
LANGUAGE = Option(True, help="with the language model; without, maps and verdicts alone, in a fraction of the space")
TILES = Option(None, help="see pictures also in N x N parts, N up to 16: small defects in large pictures")
RATE = Option(0.05, help="share of good parts that may exceed the threshold")


def option(name: str, kind, default) -> Parameter:
    """An option that the function of a command takes as one of its ``**options``."""
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)


MODEL = [  # as spgdd.load takes them
    option("profile", str, PROFILE), option("root", Path, ROOT), option("device", str, DEVICE),
    option("quantize", Literal["8bit", "4bit"], QUANTIZE), option("language", bool, LANGUAGE),
]  # fmt: skip
DEBUG = option("debug", bool, Option(False, "--debug", help="show where an error comes from"))


def add(group: Typer, name: str, run: Callable, more: Sequence[Parameter] = (), **about) -> None:
    """Make a function a command: its parameters and ``more`` become arguments and options, its docstring the help, what
    it returns the exit status (nothing: 0). Values out of their range and errors end in one line and a status.
    """

    def guarded(debug, **options) -> int:
        try:
            check_ranges(**options)
        except SpgddError as error:
            raise BadParameter(str(error)) from None
        try:
            get_profile(options.get("profile", "mini"))
            return run(**options) or 0
        except (Exception, KeyboardInterrupt) as error:
            if debug and isinstance(error, Exception):
                raise
            return ended_by(error)

    own = [each for each in inspect.signature(run).parameters.values() if each.kind is not each.VAR_KEYWORD]
    guarded.__signature__ = inspect.Signature([*own, *more, DEBUG])
    guarded.__doc__ = run.__doc__
    group.command(name, cls=Command, **about)(guarded)


def ended_by(error: BaseException) -> int:
    """Say in one line why a command ended; returns its exit status."""
    if isinstance(error, KeyboardInterrupt):
        complain("interrupted")
        return 130
    if isinstance(error, BrokenPipeError):  # whoever reads stdout, `head` for example, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, (SpgddError, OSError)):
        complain(error)
        return 1
    text = " ".join(str(error).split())
    if "weights_only" in text:  # torch advises to switch the protection off
        text = "a checkpoint holds more than tensors"
    complain(f"unexpected {type(error).__name__}: {text[:300]}. With --debug it shows where it comes from.")
    return 70


class Command(TyperCommand):
    """An option that may be repeated takes several values at once too: ``--normal a b``, ``--normal a --normal b``."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        several = {name for each in self.params if getattr(each, "multiple", False) for name in each.opts}
        current, spread = None, []
        for word in args:
            if word.startswith("-") and word != "-" and not word[1].isdigit():
                current = word if word in several else None
            elif current and spread[-1] != current:
                spread.append(current)
            spread.append(word)
        return super().parse_args(ctx, spread)


def complain(message: object) -> None:
    print("spgdd:", message if isinstance(message, SpgddError) else printable(str(message)), file=sys.stderr)


def say(*lines: str) -> None:
    for line in lines:
        print(printable(line), flush=True)


def accepted(question: str) -> bool:
    """Ask on the terminal; whoever cannot answer does not accept."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def pictures(paths: Sequence[str], errors: list[dict], check: bool = False) -> list[Path]:
    """The pictures that the paths name; what is not there (with ``check``: not readable) becomes an error."""
    from spgdd.images import list_images, read_image

    found = []
    for path in paths:
        try:
            for file in list_images(path):
                try:
                    if check:
                        read_image(file)
                    found.append(file)
                except ImageError as error:
                    note(errors, file, error)
        except ImageError as error:
            note(errors, path, error)
    return found


def save_json(path: str | Path, content: dict) -> None:
    """Write JSON values; "-" is standard output, in ASCII."""
    if str(path) == "-":
        print(json.dumps(content, indent=2), flush=True)
    else:
        write_json(path, content)


def note(errors: list[dict], image: str | Path, error: SpgddError) -> None:
    errors.append({"image": str(image), "error": str(error)})
    complain(error)
