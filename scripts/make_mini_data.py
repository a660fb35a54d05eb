"""Write data/mini: a browsable sample of the mini world in MVTec's layout, and its TADD_text.json.

    python scripts/make_mini_data.py [FOLDER]      # about 5 seconds

The same code gives the same files; what is committed was made by it.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from miniworld import Sample, draw_product, write_folder

FOLDER = Path(__file__).resolve().parent.parent / "data" / "mini"
SEED = 2
PRODUCTS = {  # family: the defect types of its pictures, every type of the mini world once or more
    "brushed_metal": ("scratch", "dent"),
    "weave": ("fray", "hole"),
    "wood": ("stain", "burn"),
    "leather": ("fold", "glue"),
    "concrete": ("crack", "pitting"),
    "circuit_board": ("misprint", "glue"),
    "nut": ("contamination", "chipped_edge"),
    "screw": ("bent", "scratch"),
    "pill": ("discolouration", "thread"),
    "gear": ("missing_part", "stain"),
    "cable": ("hole", "contamination"),
    "ring": ("blowhole", "chipped_edge"),
}
KINDS = sorted({kind.replace("_", " ") for kinds in PRODUCTS.values() for kind in kinds})


def pictures(family: str) -> Iterator[tuple[str, Sample]]:
    """The name below the folder, and the picture: two normal ones, a good one and two defective ones to test."""
    kinds = PRODUCTS[family]
    names = ["train/good/000", "train/good/001", "test/good/000", *(f"test/{kind}/000" for kind in kinds)]
    drawn = draw_product(family, SEED, ["good"] * 3 + [kind.replace("_", " ") for kind in kinds])
    yield from zip((f"{family}/{name}.jpg" for name in names), drawn, strict=True)


def main(folder: Path = FOLDER) -> None:
    records = write_folder(folder, itertools.chain.from_iterable(map(pictures, PRODUCTS)), KINDS)
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{len(records)} pictures, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {folder.name}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
