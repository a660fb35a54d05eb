"""One table for every data set, read from the folders that each is published in.

``index_folder("data/TADD")`` walks the folder once; what lies in it is recognised by ``layouts.yaml``, so data sets may
lie side by side. The table has one row a picture that can be used; what is missing, damaged, ambiguous, double or not
understood is listed beside it.
"""

import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from spgdd.data.layouts import KNOWN, SPLITS, Found, is_mask, is_picture, recognise
from spgdd.data.masks import mask_files, read_mask
from spgdd.data.table import SHOWN, Index, Problem, Row
from spgdd.errors import DataError, ImageError
from spgdd.images import is_junk, read_header

MVTEC_PRODUCTS = set(KNOWN["mvtec"])


def index_folder(folder: str | Path, split_csv: str | Path | None = None, check: bool = True) -> Index:
    """Index every data set below ``folder``.

    ``split_csv`` is one of VisA's split files; by default ``split_csv/1cls.csv`` beside VisA's products.
    Without one, VisA's split is "". ``check`` decodes every picture and mask; without it, only what is needed to tell
    good from defective. Raises DataError if the folder holds nothing that is known, and for a wrong ``split_csv``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the one that holds the data, such as data/TADD.")
    files, problems = _walk(folder)
    found = recognise(files)
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda one: _row(folder, one), found))
    problems += [problem for _, problem in results if problem]
    rows = _apart([(one, row) for one, (row, _) in zip(found, results, strict=True) if row])
    rows = _visa_tables(rows, found, files, folder, split_csv, problems)
    problems += _left_over(files, found, folder)
    if not rows:
        raise DataError(
            f"No known layout in {folder} ({len(files)} files). MVTec's is PRODUCT/train/good, PRODUCT/test/TYPE and "
            "PRODUCT/ground_truth/TYPE; a folder `good` beside one for each defect type will do; "
            "`spgdd tadd download -h` lists what else is.",
            *map(str, problems[:SHOWN]),
        )
    index = Index(folder, rows, problems + _duplicates(folder, rows))
    return index.checked() if check else index


def _walk(folder: Path) -> tuple[list[str], list[Problem]]:
    """Paths of all files but hidden ones. Links to folders are followed, unless these are read anyway."""
    files, problems, seen, top = [], [], {}, os.path.realpath(folder)
    for base, folders, names in os.walk(folder, followlinks=True):
        visible = []
        for name in sorted(folders):
            path = Path(base, name)
            shown, real = path.relative_to(folder).as_posix(), os.path.realpath(path)
            if is_junk(name):
                continue
            if path.is_symlink() and (real in seen or f"{real}/".startswith(f"{top}/") or top.startswith(f"{real}/")):
                problems.append(Problem("skipped", shown, f"a link to {seen.get(real, real)}, which is read there", 0))
                continue
            seen[real] = shown
            visible.append(name)
        folders[:] = visible
        files += [Path(base, name).relative_to(folder).as_posix() for name in sorted(names) if not is_junk(name)]
    return files, problems


def _row(folder: Path, found: Found) -> tuple[Row | None, Problem | None]:
    """The row of a picture; None with a problem where it cannot be opened, or be said whether it is good."""
    parts, groups = [folder.resolve().name, *PurePosixPath(found.root).parts], found.groups
    product = found.layout.product or parts[-1]
    subset = groups.get("subset") or found.layout.subset
    if not subset:  # the folder above the product's, or the product's where it stands alone
        alone = len(parts) == 1 or len(parts) == 2 and parts[-1] not in MVTEC_PRODUCTS
        subset = parts[-1] if alone else parts[-2]
    kind, mask, problem = found.kind, found.mask, None
    try:
        width, height, orientation = read_header(folder / found.image)
        if mask and (kind == "good" or found.layout.kind):
            marked = read_mask(folder / mask, folder / found.image).any()
            if kind == "good" and marked:
                return None, Problem("ambiguous", mask, "marks a defect in a picture among the good ones")
            kind = found.layout.kind if marked else "good"
        elif found.layout.kind and not mask:
            kind = found.layout.unmarked
    except (DataError, ImageError) as error:
        return None, Problem.of(error, mask if isinstance(error, DataError) else found.image, folder)
    if not kind:
        return None, Problem("missing", found.image, "no mask, so nobody knows whether it is good")
    if kind == "good":
        mask = ""
    elif not mask:
        problem = Problem("missing", found.image, f"no mask for this {kind} image")
    width, height = (height, width) if orientation > 4 else (width, height)
    split = SPLITS.get(groups.get("split", "").lower(), "")
    return Row(subset, product, split, kind, found.image, mask, width, height), problem


def _apart(pairs: list[tuple[Found, Row]]) -> list[Row]:
    """The rows; products of one name in different places get their places as names of their subsets."""
    places = defaultdict(set)
    for found, row in pairs:
        places[row.subset, row.product].add(found.root)
    rows = []
    for found, row in pairs:
        if len(places[row.subset, row.product]) > 1:
            place = PurePosixPath(found.root)
            place = place if found.layout.product else place.parent
            row = replace(row, subset=place.as_posix() if place.parts else row.subset)
        rows.append(row)
    return rows


def _duplicates(folder: Path, rows: list[Row]) -> list[Problem]:
    """Pictures with the same bytes; only those of one size are read."""
    sizes = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.split != "train"):
        sizes[(folder / row.image).stat().st_size].append(row)
    problems = []
    for group in sizes.values():
        first = {}
        for row in group if len(group) > 1 else ():
            other = first.setdefault(hashlib.sha256((folder / row.image).read_bytes()).digest(), row)
            if other is not row:
                leak = ", a training picture" * (other.split == "train" and row.split != "train")
                problems.append(Problem("duplicate", row.image, f"same bytes as {other.image}{leak}"))
    return problems


def _left_over(files: list[str], found: list[Found], folder: Path) -> list[Problem]:
    """Masks of no picture, and by their folders the pictures that are in no known layout."""
    used = {one.image for one in found}
    for one in found:
        if one.mask:
            used.update(file.relative_to(folder).as_posix() for file in mask_files(folder / one.mask))
    problems, skipped = [], Counter()
    for name in files:
        if name in used or not is_mask(name):
            continue
        if set(name.lower().split("/")[:-1]) & set(KNOWN["masks"]):
            problems.append(Problem("unused", name, "mask of no image"))
        elif is_picture(name):
            skipped[PurePosixPath(name).parent.as_posix()] += 1
    return problems + [
        Problem("skipped", place, f"{count} pictures in no known layout", count) for place, count in skipped.items()
    ]


def _visa_tables(rows: list[Row], found: list[Found], files: list[str], folder: Path, split_csv, problems) -> list[Row]:
    """Rows with VisA's splits and defect types, which are published as tables; damaged ones become problems."""
    by_image = {row.image: row for row in rows}
    known = {name.lower(): name for name in files}

    def lines(place: PurePosixPath, columns: str) -> list[dict]:
        name = known.get(place.as_posix().lower())
        try:
            return _table(folder / name, columns) if name else []
        except DataError as error:
            problems.append(Problem.of(error, name, folder))
            return []

    roots = sorted({PurePosixPath(one.root) for one in found if one.layout.subset == "VisA"})
    for root in roots:
        for line in lines(root / "image_anno.csv", "image,label,mask"):
            image = known.get((root.parent / line["image"]).as_posix().lower())
            if image in by_image and line["label"] != "normal":
                kind = ",".join(part.strip() for part in line["label"].split(","))
                by_image[image] = replace(by_image[image], defect_type=kind)
    for top in sorted({root.parent for root in roots}):
        columns, usual = "object,split,label,image,mask", top / "split_csv" / "1cls.csv"
        for line in _table(Path(split_csv), columns) if split_csv else lines(usual, columns):
            image, mask = ((top / line[key]).as_posix() if line[key] else "" for key in ("image", "mask"))
            if (there := known.get(image.lower())) in by_image:
                by_image[there] = replace(by_image[there], split=line["split"])
            elif not there:
                problems.append(Problem("missing", image, f"named in {split_csv or usual}"))
            if mask and mask.lower() not in known:
                problems.append(Problem("missing", mask, f"named in {split_csv or usual}"))
    return list(by_image.values())


def _table(path: Path, columns: str) -> list[dict]:
    try:
        reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        columns_there, lines = ",".join(reader.fieldnames or ()), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a table that can be read ({error}).") from error
    if columns_there != columns:
        raise DataError(f"{path}: has the columns {columns_there[:80]!r}, VisA's are {columns}.")
    if any(None in line.values() or None in line for line in lines):
        raise DataError(f"{path}: a line has not the columns {columns}; the file may be cut off.")
    return lines
