"""One table for every data set of TADD, read from the folders that each is published in.

``index_folder("data/TADD")`` walks the folder once; a layout is recognised by the path of an image alone, so
data sets may lie side by side. The table has one row an image; what is missing, broken or duplicated is
listed beside it.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from spgdd.errors import DataError

MVTEC_PRODUCTS = set(
    "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw "
    "tile toothbrush transistor wood zipper".split()
)
GOOD = {"good", "ok", "normal", "free", "nodefect"}


@dataclass(frozen=True)
class Layout:
    """How a data set is published: ``image`` is a pattern of paths, ``masks`` are templates of its groups."""

    subset: str  # "" means the name of the folder
    image: str
    masks: tuple[str, ...]
    product: str = ""  # where the path does not name it
    kind: str = ""  # defect type where the path does not name it; good where the mask is empty


AITEX_CODES = {  # as the AITEX paper names them; the data set itself has the numbers alone
    "002": "broken_end", "006": "broken_yarn", "010": "broken_pick", "016": "weft_curling",
    "019": "fuzzyball", "022": "cut_selvage", "023": "crease", "025": "warp_ball", "029": "contamination",
    "030": "nep", "036": "weft_crack",
}  # fmt: skip
CRACKS = "noncrack|Eugen_Muller|Volker|Rissbilder_for_Florian|CFD|CRACK500|DeepCrack|cracktree200|GAPS384"
CRACKS += "|forest|Sylvie"
LAYOUTS = (
    Layout("VisA", r"(?P<product>[^/]+)/Data/Images/(?P<type>Normal|Anomaly)/(?P<stem>[^/]+)",
           ("{product}/Data/Masks/Anomaly/{stem}.png",)),
    Layout("MT", r"MT_(?P<type>Blowhole|Break|Crack|Fray|Uneven|Free)/Imgs/(?P<stem>[^/]+)",
           ("MT_{type}/Imgs/{stem}.png",), "magnetic tile"),
    Layout("AITEX", r"Defect_images/(?P<stem>\d{4}_(?P<type>\d{3})_\d+)",
           ("Mask_images/{stem}_mask.png", "Mask_images/{stem}_mask1.png"), "woven fabric"),
    Layout("AITEX", r"(?P<type>NODefect)_images/(?:[^/]+/)?(?P<stem>[^/]+)", (), "woven fabric"),
    Layout("DeepCrack", r"(?P<split>train|test)_img/(?P<stem>[^/]+)", ("{split}_lab/{stem}.png",),
           "road surface", "crack"),
    Layout("CFD", r"image/(?P<stem>\d{3})", ("groundTruth/{stem}.mat",), "road surface", "crack"),
    Layout("CFD", r"CrackForest/Images/(?P<stem>\d{3})", ("CrackForest/Masks/{stem}_label.PNG",),
           "road surface", "crack"),
    Layout("", rf"(?P<split>train|test)/images/(?P<subset>{CRACKS})_(?P<stem>[^/]+)",
           ("{split}/masks/{subset}_{stem}.jpg",), "road surface", "crack"),
    Layout("KolektorSDD", r"(?P<group>kos\d+)/(?P<stem>Part\d+)", ("{group}/{stem}_label.bmp",),
           "commutator", "defect"),
    Layout("KolektorSDD2", r"(?P<split>train|test)/(?P<stem>\d+(?: \(copy\))?)", ("{split}/{stem}_GT.png",),
           "surface", "defect"),
    Layout("NEU-Seg", r"images/(?P<split>training|test)/(?P<stem>[^/]+)", ("annotations/{split}/{stem}.png",),
           "steel strip", "defect"),
    Layout("", r"(?P<product>[^/]+/)?(?P<split>train|test)/(?P<type>(?!masks/)[^/]+)/(?P<stem>[^/]+)",
           ("{product}ground_truth/{type}/{stem}_mask.png", "{product}ground_truth/{type}/{stem}.png")),
)  # fmt: skip
ENDING = r"\.(?:png|jpe?g|bmp|tiff?)"
PATTERNS = [(re.compile(rf"(?P<root>(?:.*?/)??){known.image}{ENDING}", re.I), known) for known in LAYOUTS]


@dataclass(frozen=True)
class Row:
    """One image; paths are relative to the indexed folder, ``mask`` is "" for a good part."""

    subset: str
    product: str
    split: str
    defect_type: str
    image: str
    mask: str
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Problem:
    kind: str  # missing, broken, duplicate, unused
    path: str
    detail: str


@dataclass(frozen=True)
class Index:
    folder: Path
    rows: list[Row]
    problems: list[Problem]

    def save(self, path: str | Path) -> None:
        """Write the table as .csv, or the table and the problems as .json."""
        path, rows = Path(path), [dataclasses.asdict(row) for row in self.rows]
        if path.suffix == ".json":
            table = {"rows": rows, "problems": [dataclasses.asdict(problem) for problem in self.problems]}
            path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(rows)


def index_folder(folder: str | Path, split_csv: str | Path | None = None, check: bool = True) -> Index:
    """Index every data set below ``folder``.

    ``split_csv`` is one of VisA's split files; by default ``split_csv/1cls.csv`` beside VisA's products.
    Without one, VisA's split is "". ``check`` decodes every image and mask and hashes the images; without it,
    only sizes are read. Raises DataError if the folder holds nothing that is known.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give the one that holds the data, such as data/TADD.")
    files = {path.relative_to(folder).as_posix() for path in _walk(folder)}
    rows, problems, masks = [], [], set()
    for name in sorted(files):
        if found := _recognise(name, files, folder):
            rows.append(found)
            masks.add(found.mask)
            if not found.mask and found.defect_type != "good":
                problems.append(Problem("missing", name, f"no mask for this {found.defect_type} image"))
    if not rows:
        raise DataError(
            f"No known layout in {folder} ({len(files)} files). MVTec's is PRODUCT/train/good, "
            "PRODUCT/test/TYPE and PRODUCT/ground_truth/TYPE; `spgdd tadd download -h` lists what else is."
        )
    rows = _visa_tables(rows, files, folder, split_csv, problems)
    unused = (name for name in sorted(files - masks) if re.search("(^|/)(ground_truth|Masks)/.*/", name))
    problems += [Problem("unused", name, "mask of no image") for name in unused]
    with ThreadPoolExecutor() as pool:
        checked = list(pool.map(lambda row: _read(folder, row, check), rows))
    by_hash: dict[str, str] = {}
    for row, digest, error in checked:
        if error:
            problems.append(error)
        elif digest and digest in by_hash:
            problems.append(Problem("duplicate", row.image, f"same bytes as {by_hash[digest]}"))
        by_hash.setdefault(digest, row.image)
    return Index(folder, [row for row, _, _ in checked], problems)


def _walk(folder: Path):
    for base, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(base, name) for name in names)


def _recognise(name: str, files: set[str], folder: Path) -> Row | None:
    """The row of an image in a known layout, None for every other file."""
    match, layout = next(((m, known) for p, known in PATTERNS if (m := p.fullmatch(name))), (None, None))
    if match is None:
        return None
    groups = {key: value or "" for key, value in match.groupdict().items()}
    root = PurePosixPath(groups["root"])
    masks = (groups["root"] + template.format_map(groups) for template in layout.masks)
    mask = next((path for path in masks if path in files), "")
    if mask == name:  # a mask that lies beside its image
        return None
    product = groups.get("product", "").strip("/") or layout.product or folder.resolve().name
    subset = groups.get("subset") or layout.subset
    if not subset:  # MVTec's layout: the data set's folder, or the product's where it stands alone
        alone = not root.name and product not in MVTEC_PRODUCTS
        subset = product if alone else root.name or folder.resolve().name
    kind = (groups.get("type") or layout.kind).lower()
    kind = AITEX_CODES.get(kind, "defect") if kind.isdigit() else kind
    good = kind in GOOD or subset == "noncrack" or layout.kind and mask and _is_empty(folder / mask)
    split = {"training": "train"}.get(groups.get("split", ""), groups.get("split", ""))
    return Row(subset, product, split, "good" if good else kind, name, "" if good else mask)


def read_mask(path: Path) -> np.ndarray:
    """Bool (H, W), True on defects. VisA and NEU write class numbers, most write 255, CrackForest Matlab."""
    if path.suffix == ".mat":
        from scipy.io import loadmat

        return loadmat(path)["groundTruth"][0, 0]["Segmentation"] > 1
    with Image.open(path) as image:
        grey = image if image.mode in ("L", "P", "1", "I", "I;16") else image.convert("L")
        values = np.asarray(grey).astype(int)
    return values > (127 if values.max(initial=0) > 127 else 0)


def _is_empty(mask: Path) -> bool:
    """Whether a mask marks nothing; a damaged one is taken for a defect's, and reported later."""
    try:
        return not read_mask(mask).any()
    except (OSError, ValueError):
        return False


def _visa_tables(rows: list[Row], files: set[str], folder: Path, split_csv, problems: list) -> list[Row]:
    """Rows with VisA's splits and defect types, which are published as tables."""
    by_image = {row.image: row for row in rows}
    for table in sorted(name for name in files if name.endswith("image_anno.csv")):
        root = PurePosixPath(table).parent.parent
        for line in _table(folder / table, ("image", "label", "mask")):
            image = (root / line["image"]).as_posix()
            if image in by_image and line["label"] != "normal":
                kind = ",".join(part.strip() for part in line["label"].split(","))
                by_image[image] = dataclasses.replace(by_image[image], defect_type=kind)
    roots = sorted({re.sub("[^/]+/Data/Images/.*", "", row.image) for row in rows if row.subset == "VisA"})
    for root in roots:
        table = Path(split_csv) if split_csv else folder / root / "split_csv" / "1cls.csv"
        if not (split_csv or table.is_file()):
            continue
        for line in _table(table, ("object", "split", "label", "image", "mask")):
            image, mask = root + line["image"], root + line["mask"] if line["mask"] else ""
            if image in by_image:
                by_image[image] = dataclasses.replace(by_image[image], split=line["split"])
            else:
                problems.append(Problem("missing", image, f"named in {table.name}"))
            if mask and mask not in files:
                problems.append(Problem("missing", mask, f"named in {table.name}"))
    return list(by_image.values())


def _table(path: Path, columns: tuple[str, ...]) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise DataError(f"{path} has the columns {reader.fieldnames}, VisA's are {','.join(columns)}.")
        return list(reader)


def _read(folder: Path, row: Row, check: bool) -> tuple[Row, str, Problem | None]:
    """The row with its size, the hash of the image ("" without ``check``), and what is wrong with it."""
    name, digest = row.image, ""
    try:
        data = (folder / name).read_bytes() if check else b""
        with Image.open(io.BytesIO(data) if check else folder / name) as image:
            row = dataclasses.replace(row, width=image.width, height=image.height)
            if check:
                image.load()
                digest = hashlib.sha256(data).hexdigest()
        if check and row.mask:
            name = row.mask
            mask = read_mask(folder / name)
            if mask.shape != (row.height, row.width):
                size = f"{mask.shape[1]} x {mask.shape[0]}"
                error = f"{size} pixels, its image has {row.width} x {row.height}"
                return row, digest, Problem("broken", name, error)
            if not mask.any():
                return row, digest, Problem("broken", name, "the mask of a defect is empty")
    except (OSError, ValueError, KeyError, SyntaxError) as error:  # of Pillow and scipy, on damaged files
        return row, digest, Problem("broken", name, str(error))
    return row, digest, None
