"""What a download would fetch, under which licences, and whether this machine has the room."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from spgdd.errors import WeightsError
from spgdd.profiles import PROFILES, weights_folder
from spgdd.weights.catalog import Bundle, File, readable
from spgdd.weights.verify import missing_bundles, status


@dataclass(frozen=True)
class Plan:
    """What a download would do; `str(plan)` is for people: licences, sizes, disk and memory."""

    bundles: list[Bundle]
    files: list[File]  # to fetch
    unchecked: list[File]  # there, and compared with what is published before anything is fetched
    fetch_bytes: int
    free_bytes: int
    notes: list[str]

    def __str__(self) -> str:
        there = [f"{len(self.unchecked)} file(s) are there and will be verified."] * bool(self.unchecked)
        if not self.files:
            return " ".join(["Nothing to download: all is there.", *there])
        lines = [f"{x.title} ({readable(x.size)})\n    licence: {x.licence}" for x in self.bundles]
        fetch, free = readable(self.fetch_bytes), readable(self.free_bytes)
        return "\n".join([*lines, f"{len(self.files)} file(s), {fetch} to fetch; {free} free on the disk.",
                          *there, *self.notes])


def plan(names: str | Sequence[str], root: str | Path | None = None) -> Plan:
    """Licences, sizes, free disk and memory for the profiles or bundles named; fetches nothing.

    Raises WeightsError where other weights lie in a folder to be filled.
    """
    names, root = [names] if isinstance(names, str) else names, weights_folder(root)
    bundles = missing_bundles(names, root)
    refuse_other_weights(bundles, root)
    states = {row.path: row.state for row in status([bundle.name for bundle in bundles], root)}
    files = [file for bundle in bundles for file in bundle.files]
    unchecked = [file for file in files if states.get(file.path) == "unchecked"]
    missing = [file for file in files if states.get(file.path) not in ("verified", "accepted", "unchecked")]
    begun = sum(file.partial(root).stat().st_size for file in missing if file.partial(root).exists())
    existing = next(folder for folder in [root.absolute(), *root.absolute().parents] if folder.exists())
    ram = psutil.virtual_memory().total
    notes = [f"To run it in 16 bits: about {need} GB of GPU memory, or of RAM without a GPU; this machine has "
             f"{readable(ram)} of RAM{': too little without a GPU.' if ram < need * 1e9 else '.'}"
             for need in {PROFILES[name].gpu_gb for name in names if name in PROFILES}]
    return Plan(bundles, missing, unchecked, max(sum(file.size for file in missing) - begun, 0),
                shutil.disk_usage(existing).free, notes)


def refuse_other_weights(bundles: Iterable[Bundle], root: Path) -> None:
    """Raise WeightsError where another Vicuna lies in a folder to be filled: a loader might take that one."""
    for bundle in bundles:
        known = {root / file.path for file in bundle.files}
        others = [path.name for path in sorted((root / bundle.folder).glob("*.*"))
                  if path.suffix in (".bin", ".safetensors") and path not in known]
        if others and bundle.recipe:
            raise WeightsError(f"{root / bundle.folder} holds other weights ({others[0]}). Move or delete it "
                               "first, so that the two are not mixed up.")
