"""`spgdd tadd`: index folders of images, write their text, fetch data sets, draw generated ones."""

from collections import Counter
from pathlib import Path
from typing import Literal

from typer import Argument, Option

from spgdd.cli.common import accepted, say
from spgdd.data.download import DATASETS
from spgdd.errors import DataError
from spgdd.files import check_outputs, write_json

FOLDER = Argument(help="for example data/TADD")
SPLIT = Option(None, help="VisA's split, a .csv (default: its 1cls.csv)")


def index(
    folder: Path = FOLDER,
    visa_split: Path = SPLIT,
    output: Path = Option(None, "-o", "--output", help="table as .csv, or with the problems as .json"),
    quick: bool = Option(False, "--quick", help="sizes only: damaged files are not found"),
) -> int:
    """One table of images, masks, products and defect types."""
    from spgdd.data.index import index_folder

    check_outputs([(output, [".csv", ".json"])], [visa_split])
    table = index_folder(folder, visa_split, check=not quick)
    counts = Counter((row.subset, row.product, row.split or "-", row.defect_type == "good") for row in table.rows)
    say(f"{'subset':<26}{'product':<26}{'split':<8}{'good':>7}{'defect':>8}")
    for subset, product, split in sorted({key[:3] for key in counts}):
        good, bad = (counts[subset, product, split, flag] for flag in (True, False))
        say(f"{subset:<26}{product:<26}{split:<8}{good:>7}{bad:>8}")
    say(*map(str, table.problems), f"{len(table.rows)} images, {len(table.problems)} problems")
    if output:
        table.save(output)
    return int(any(problem.kind in ("missing", "broken", "ambiguous") for problem in table.problems))


def describe(
    folder: Path = FOLDER,
    visa_split: Path = SPLIT,
    output: Path = Option("TADD_text.json", "-o", "--output", help="the file to write"),
    seed: int = Option(0, help="the same seed writes the same text"),
) -> None:
    """Write TADD_text.json from masks and pixels."""
    from spgdd.data.describe import describe
    from spgdd.data.index import index_folder

    check_outputs([(output, [".json"])], [visa_split])
    table = index_folder(folder, visa_split)
    records = describe(table, seed)
    write_json(output, records, indent=1)
    left_out = len(table.rows) - len(records)
    say(f"{output}: {len(records)} conversations; {left_out} broken or maskless images left out")


def world(
    folder: Path = Argument(help="the folder to write"),
    products: int = Option(500, help="8 pictures each"),
    seed: int = Option(0, help="the same seed draws the same pictures"),
    families: list[str] = Option((), help="default: those that training may see"),
    held_out: bool = Option(False, "--held-out", help="families and defect types kept from training"),
) -> None:
    """Draw a training folder of the mini world, with its text."""
    from miniworld import write_world

    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: a folder that holds files already; name a new one.")
    records = write_world(folder, products, seed, families, held_out)
    say(f"{folder}: {len(records)} pictures of {products} products, and TADD_text.json")


def download(
    name: Literal[tuple(DATASETS)] = Argument(help="the data set"),
    root: Path = Option("data/TADD", help="where data sets lie"),
    yes: bool = Option(False, "--yes", help="do not ask whether the licence is accepted"),
) -> int:
    """Fetch and unpack a data set, or say how to get it."""
    from spgdd.data.download import about, download

    say(*about(name, root).splitlines())
    if "files" not in DATASETS[name]:
        return 0
    if not yes and not accepted("Do you accept this licence and start?"):
        return 1
    say(f"unpacked in {download(name, root)}")
    return 0
