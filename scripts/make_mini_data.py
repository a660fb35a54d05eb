"""Write data/mini: a browsable sample of the mini world in MVTec's layout, and its TADD_text.json.

    python scripts/make_mini_data.py [FOLDER]      # about 5 seconds

The same code gives the same files; what is committed was made by it.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from spgdd.tadd.describe import write_records
from spgdd.tadd.miniworld import Sample, draw_product
from spgdd.tadd.words import conversation

FOLDER = Path(__file__).resolve().parent.parent / "data" / "mini"
SEED = 2
QUALITY = 88  # of the JPEG files
PRODUCTS = {  # family: the defect types of its pictures, every type of the mini world once or more
    "brushed_metal": ("scratch", "dent"),
    "weave": ("thread", "hole"),
    "wood": ("stain", "burn"),
    "leather": ("fold", "fray"),
    "concrete": ("crack", "pitting"),
    "circuit_board": ("misprint", "glue"),
    "nut": ("contamination", "chipped_edge"),
    "screw": ("bent", "scratch"),
    "pill": ("discolouration", "crack"),
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


def record(name: str, sample: Sample) -> dict:
    """What is said about the picture; about every type of this data may be asked, also of good pictures."""
    return {"image_name": name, "conversation": conversation(sample.known, random.Random(name), kinds=KINDS)}


def main(folder: Path = FOLDER) -> None:
    records = []
    for family in PRODUCTS:
        for name, sample in pictures(family):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image).save(path, quality=QUALITY)
            if sample.mask.any():
                mask = folder / family / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(sample.mask).save(mask, optimize=True)
            records.append(record(name, sample))
    write_records(records, folder / "TADD_text.json")
    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"{len(records)} pictures, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {folder.name}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
