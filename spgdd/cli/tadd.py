"""`spgdd tadd ...`: index folders of images, write their text, fetch data sets, draw generated ones."""

import argparse
from collections import Counter
from pathlib import Path


def add_commands(subparsers) -> argparse.ArgumentParser:
    """Add the `tadd` command to the sub-parsers of `spgdd`; each action sets `run(args) -> exit status`."""
    from spgdd.data.download import DATASETS

    parser = subparsers.add_parser("tadd", help="index data sets, write TADD_text.json, download")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    index = _folder_action(actions, "index", _index, "one table of images, masks, products and defect types")
    index.add_argument("-o", "--output", type=Path, help="table as .csv, or with the problems as .json")
    index.add_argument("--quick", action="store_true", help="sizes only: no hashes, no damaged files found")

    describe = _folder_action(actions, "describe", _describe, "write TADD_text.json from masks and pixels")
    describe.add_argument("-o", "--output", type=Path, default=Path("TADD_text.json"))
    describe.add_argument("--seed", type=int, default=0, help="the same seed writes the same text")

    world = actions.add_parser("world", help="draw a training folder of the mini world, with its text")
    world.add_argument("folder", type=Path, metavar="DIR")
    world.add_argument("--products", type=int, default=500, metavar="N", help="8 pictures each; default: 500")
    world.add_argument("--seed", type=int, default=0, help="the same seed draws the same pictures")
    world.add_argument("--families", nargs="+", default=(), metavar="NAME", help="default: those that training may see")
    world.add_argument("--held-out", action="store_true", help="families and defect types kept from training")
    world.set_defaults(run=_world)

    download = actions.add_parser("download", help="fetch and unpack a data set, or say how to get it")
    download.add_argument("name", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    download.add_argument("--root", type=Path, default=Path("data/TADD"), help="default: data/TADD")
    download.add_argument("--yes", action="store_true", help="do not ask whether the licence is accepted")
    download.set_defaults(run=_download)
    return parser


def _folder_action(actions, name: str, run, help: str):
    parser = actions.add_parser(name, help=help, description=help)
    parser.add_argument("folder", type=Path, metavar="DIR", help="for example data/TADD")
    parser.add_argument("--visa-split", type=Path, metavar="CSV", help="VisA's split (default: its 1cls.csv)")
    parser.set_defaults(run=run)
    return parser


def _index(args) -> int:
    from spgdd.data.index import index_folder

    table = index_folder(args.folder, args.visa_split, check=not args.quick)
    counts = Counter((row.subset, row.product, row.split or "-", row.defect_type == "good")
                     for row in table.rows)
    print(f"{'subset':<26}{'product':<26}{'split':<8}{'good':>7}{'defect':>8}")
    for subset, product, split in sorted({key[:3] for key in counts}):
        good, bad = (counts[subset, product, split, flag] for flag in (True, False))
        print(f"{subset:<26}{product:<26}{split:<8}{good:>7}{bad:>8}")
    for problem in table.problems:
        print(f"{problem.kind}: {problem.path} ({problem.detail})")
    print(f"{len(table.rows)} images, {len(table.problems)} problems")
    if args.output:
        table.save(args.output)
    return int(any(problem.kind in ("missing", "broken") for problem in table.problems))


def _describe(args) -> int:
    from spgdd.data.describe import describe
    from spgdd.data.index import index_folder
    from spgdd.files import write_json

    table = index_folder(args.folder, args.visa_split)
    records = describe(table, args.seed)
    write_json(args.output, records, indent=1)
    left_out = len(table.rows) - len(records)
    print(f"{args.output}: {len(records)} conversations; {left_out} broken or maskless images left out")
    return 0


def _world(args) -> int:
    from miniworld import write_world

    records = write_world(args.folder, args.products, args.seed, args.families, args.held_out)
    print(f"{args.folder}: {len(records)} pictures of {args.products} products, and TADD_text.json")
    return 0


def _download(args) -> int:
    from spgdd.data.download import DATASETS, about, download

    print(about(args.name, args.root))
    if "files" not in DATASETS[args.name]:
        return 0
    if not args.yes and input("Do you accept this licence and start? [y/N] ").lower() not in ("y", "yes"):
        return 1
    print(f"unpacked in {download(args.name, args.root)}")
    return 0
