"""`spgdd memory`: what a product looks like when nothing is wrong, as one file for any number of diagnoses.

    spgdd memory build "metal nut" --normal good/ -o nut.safetensors
    spgdd diagnose parts/ --memory nut.safetensors

The file holds the memory bank, the threshold's calibration, and the marks of the model that made it.
"""

from pathlib import Path

from typer import Argument, Option

from spgdd.cli.common import TILES, pictures, say
from spgdd.files import check_outputs


def build(
    product: str = Argument(help='what is seen, for example "metal nut"'),
    normal: list[str] = Option(help="pictures of good parts, or folders of them: four or more pictures"),
    output: str = Option(..., "-o", "--output", help="the file to write, for example nut.safetensors"),
    budget: int = Option(None, help="at most so many entries per depth and scale: bounds size and time"),
    rotate: bool = Option(None, help="remember each picture in four orientations, for parts that may lie in any"),
    tiles: int = TILES,
    **model,
) -> int:
    """Encode normal pictures, calibrate on them, and write both to a file."""
    from spgdd.diagnosis import load

    errors = []
    found = pictures(normal, errors, check=True)
    check_outputs([(output, [".safetensors"])], found)
    reference = load(**model).reference(found, product, budget, rotate, tiles)
    path, bank = reference.save(output), reference.bank
    left_out = f"; {len(errors)} left out" if errors else ""
    say(f"{path}: {bank.normals} normal picture(s){left_out}, {bank.tokens.shape[2]:,} entries per depth and scale")
    return int(bool(errors))


def inspect(file: Path = Argument(help="what `spgdd memory build` wrote")) -> None:
    """Say what is in such a file."""
    from spgdd.reference import read_reference
    from spgdd.report import number

    reference = read_reference(file)
    bank = reference.bank
    calibration, limits = reference.calibration, reference.calibration.limits(0.05)
    scores, (threshold, low, high) = calibration.scores, map(number, limits[:3])
    turned = ", each in four orientations" if bank.rotate else ""
    rows = {
        "product": reference.product,
        "profile": f"{reference.profile}, weights of its vision tower {reference.vision}",
        "normals": f"{bank.normals}{turned}: {', '.join(reference.normals)}",
        "views": "whole" if reference.tiles == 1 else f"whole and {reference.tiles} x {reference.tiles} tiles",
        "entries": f"{bank.tokens.shape[2]:,} at each of {len(bank.tokens)} depths and scales {bank.scales}",
        "calibration": f"{calibration.method}, scores {number(min(scores))} to {number(max(scores))}",
        "threshold": f"{threshold} at 5 % false alarms, unsure {low} to {high}",
        "file": f"{file.stat().st_size / 1e6:,.1f} MB",
    }
    say(*(f"{name:<12} {value}" for name, value in rows.items()))
