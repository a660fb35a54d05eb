"""`spgdd memory`: what a product looks like when nothing is wrong, as one file for any number of diagnoses.

    spgdd memory build "metal nut" --normal good/ -o nut.safetensors
    spgdd diagnose parts/ --memory nut.safetensors

The file holds the memory bank, the threshold's calibration, and the marks of the model that made it.
"""

import argparse
from pathlib import Path


def add_commands(subparsers) -> argparse.ArgumentParser:
    """Add `memory` to the sub-parsers of `spgdd`; every action sets `run(options)` -> exit status."""
    from spgdd.cli.common import add_model_options

    parser = subparsers.add_parser("memory", help="keep what normal pictures look like in a file")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    about = "encode normal pictures, calibrate on them, and write both to a file"
    add = (build := actions.add_parser("build", help=about, description=about)).add_argument
    add("product", metavar="NAME", help='what is seen, for example "metal nut"')
    add("--normal", nargs="+", required=True, metavar="DIR_OR_FILE", help="pictures of good parts, four or more")
    add("-o", "--output", required=True, metavar="FILE.safetensors")
    add("--budget", type=int, metavar="N", help="at most N entries per depth and scale: bounds size and time")
    rotate = "remember each picture in four orientations, for parts that may lie in any"
    add("--rotate", action=argparse.BooleanOptionalAction, help=rotate)
    add("--tiles", type=int, metavar="N", help="see pictures also in N x N parts: small defects in large pictures")
    add_model_options(build)
    build.set_defaults(run=_build)
    inspect = actions.add_parser("inspect", help="say what is in such a file")
    inspect.add_argument("file", metavar="FILE", type=Path)
    inspect.set_defaults(run=_inspect)
    return parser


def _build(options: argparse.Namespace) -> int:
    from spgdd.cli.common import model_options
    from spgdd.diagnosis import load

    diagnoser = load(**model_options(options))
    reference = diagnoser.reference(options.normal, options.product, options.budget, options.rotate, options.tiles)
    path = reference.save(options.output)
    bank = reference.bank
    print(f"{path}: {bank.normals} normal picture(s), {bank.tokens.shape[2]:,} entries per depth and scale")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from spgdd.reference import Reference
    from spgdd.selfprompt.memory import MemoryBank

    bank = MemoryBank.load(options.file)
    reference = Reference.of(bank)
    calibration, limits = reference.calibration, reference.calibration.limits(0.05)
    turned = ", each in four orientations" if bank.rotate else ""
    rows = {
        "product": bank.product,
        "profile": f"{bank.profile}, ImageBind weights {bank.imagebind}",
        "normals": f"{bank.normals}{turned}: {', '.join(reference.normals)}",
        "views": "whole" if reference.tiles == 1 else f"whole and {reference.tiles} x {reference.tiles} tiles",
        "entries": f"{bank.tokens.shape[2]:,} at each of {len(bank.tokens)} depths and scales {bank.scales}",
        "calibration": f"{calibration.method}, scores {min(calibration.scores):.3f} to {max(calibration.scores):.3f}",
        "threshold": f"{limits.threshold:.3f} at 5 % false alarms, unsure {limits.low:.3f} to {limits.high:.3f}",
        "file": f"{options.file.stat().st_size / 1e6:,.1f} MB",
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    return 0
