"""What is known of a folder of data sets: a row for each picture that can be used, and what is wrong with others."""

import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

from spgdd.data.masks import AmbiguousMask, read_mask
from spgdd.errors import DataError, ImageError
from spgdd.files import write_csv, write_json
from spgdd.images import read_image

LARGE = 0.5  # share of a picture above which a mask is doubtful
SHOWN = 5  # problems of a kind that a summary lists


@dataclass(frozen=True)
class Row:
    """One picture; paths are relative to the indexed folder, ``mask`` is "" where nothing is marked.

    ``mask`` may be a folder of masks, see ``spgdd.data.masks``. Width and height are those that people see.
    """

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
    kind: str  # missing, broken, ambiguous, doubtful, duplicate, unused, skipped
    path: str
    detail: str
    count: int = 1  # of files

    def __str__(self) -> str:
        return f"{self.kind}: {self.path} ({self.detail})"

    @classmethod
    def of(cls, error: Exception, path: str, folder: Path) -> "Problem":
        """An error of reading ``path`` below ``folder``."""
        detail = re.sub(rf"^{re.escape(str(folder / path))}(/\S*)?: ", "", str(error))
        return cls("ambiguous" if isinstance(error, AmbiguousMask) else "broken", path, detail)


@dataclass(frozen=True)
class Index:
    folder: Path
    rows: list[Row]
    problems: list[Problem]

    def checked(self, rows: Iterable[Row] | None = None) -> "Index":
        """An index of these rows, by default all, whose pictures and masks could be decoded; the others are problems.

        A defective picture whose mask cannot be used stays, without it.
        """
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(self._check, self.rows if rows is None else rows))
        kept = [row for row, _ in results if row]
        return Index(self.folder, kept, self.problems + [problem for _, problem in results if problem])

    def _check(self, row: Row) -> tuple[Row | None, Problem | None]:
        try:
            read_image(self.folder / row.image)
        except ImageError as error:
            return None, Problem.of(error, row.image, self.folder)
        if not row.mask:
            return row, None
        try:
            share = read_mask(self.folder / row.mask, self.folder / row.image).mean()
        except DataError as error:
            return replace(row, mask=""), Problem.of(error, row.mask, self.folder)
        if not share:
            return replace(row, mask=""), Problem("broken", row.mask, "the mask of a defect is empty")
        if share > LARGE:
            return row, Problem("doubtful", row.mask, f"marks {share:.0%} of the picture")
        return row, None

    def summary(self) -> list[str]:
        """Lines that say how many pictures and masks there are, and what is wrong with others."""
        bad = [row for row in self.rows if row.defect_type != "good"]
        masked = sum(bool(row.mask) for row in bad)
        products = len({(row.subset, row.product) for row in self.rows})
        counts = Counter()
        for problem in self.problems:
            counts[problem.kind] += problem.count
        lines = [
            f"{self.folder}: {len(self.rows)} pictures of {products} products, {len(bad)} of them defective; "
            f"{masked} masks, {len(bad) - masked} defective pictures without one; {counts['skipped']} pictures skipped"
        ]
        for kind in counts:
            those = [problem for problem in self.problems if problem.kind == kind]
            lines += map(str, those[:SHOWN])
            if len(those) > SHOWN:
                lines.append(f"{kind}: and {len(those) - SHOWN} more; `spgdd tadd index` lists all")
        return lines

    def save(self, path: str | Path) -> None:
        """Write the table as .csv, or the table and the problems as .json."""
        if Path(path).suffix.lower() == ".json":
            parts = {"rows": self.rows, "problems": self.problems}
            write_json(path, {name: list(map(asdict, part)) for name, part in parts.items()}, indent=1)
        else:
            write_csv(path, [field.name for field in fields(Row)], map(astuple, self.rows))
