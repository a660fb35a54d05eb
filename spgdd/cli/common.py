"""What the commands share: how a function becomes one, how it ends, and options that several of them take."""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Literal

from typer import BadParameter, Option, Typer
from typer.core import TyperCommand

from spgdd.errors import SpgddError
from spgdd.profiles import PROFILES


def below_half(share: float) -> float:
    if not 0 < share < 0.5:
        raise BadParameter(f"{share} is not between 0 and 0.5")
    return share


PROFILE = Option("mini", help=", ".join(PROFILES))
ROOT = Option(None, help="folder of the weights (default: $SPGDD_WEIGHTS or pretrained_ckpt)")
DEVICE = Option(None, help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
QUANTIZE = Option(None, help="shrink the language model on a GPU (needs bitsandbytes)")
LANGUAGE = Option(True, help="with the language model; without, maps and verdicts alone, in a fraction of the space")
TILES = Option(None, help="see pictures also in N x N parts: small defects in large pictures")
RATE = Option(0.05, callback=below_half, help="share of good parts that may exceed the threshold")


def option(name: str, kind, default) -> Parameter:
    """An option that the function of a command takes as one of its ``**options``."""
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)


MODEL = [  # as spgdd.load takes them
    option("profile", str, PROFILE), option("root", Path, ROOT), option("device", str, DEVICE),
    option("quantize", Literal["8bit", "4bit"], QUANTIZE), option("language", bool, LANGUAGE),
]  # fmt: skip
DEBUG = option("debug", bool, Option(False, "--debug", help="show where an error comes from"))


def complain(message: object) -> None:
    print(f"spgdd: {message}", file=sys.stderr)


def accepted(question: str) -> bool:
    """Ask on the terminal; whoever cannot answer does not accept."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def add(group: Typer, name: str, run: Callable, more: Sequence[Parameter] = (), **about) -> None:
    """Make a function a command: its parameters and ``more`` become arguments and options, its docstring the help, what
    it returns the exit status (nothing: 0). With --debug, an error shows where it comes from.
    """

    def guarded(debug, **options) -> int:
        try:
            return run(**options) or 0
        except SpgddError as error:
            if debug:
                raise
            complain(error)
            return 1
        except KeyboardInterrupt:
            complain("interrupted")
            return 130
        except BrokenPipeError:  # whoever reads stdout, `head` for example, has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    own = [each for each in inspect.signature(run).parameters.values() if each.kind is not each.VAR_KEYWORD]
    guarded.__signature__ = inspect.Signature([*own, *more, DEBUG])
    guarded.__doc__ = run.__doc__
    group.command(name, cls=Command, **about)(guarded)


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
