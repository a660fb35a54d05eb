"""What is on the disk: which files are there, whole, and the published ones."""

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from spgdd.errors import SpgddError, WeightsError
from spgdd.files import read_json, write_json
from spgdd.profiles import weights_folder
from spgdd.tensors import digest_of, is_standin, is_web_page, read_tensors
from spgdd.weights.catalog import Bundle, File, get_bundle, get_bundles, known_wrong, readable
from spgdd.weights.llama import recognise
from spgdd.weights.merge import read_report

RECORD = "verified.json"  # in the weights folder: what was verified, how, and size and time of each file then
_lock = threading.Lock()


@dataclass(frozen=True)
class FileStatus:
    """State of one file: missing, partial, unchecked, verified, accepted, stand-in or wrong.

    "accepted" has nothing published to compare with beyond what `detail` names.
    """

    path: str  # relative to the weights folder
    state: str
    size: int  # bytes there, or to be fetched where it is missing
    detail: str

    @property
    def usable(self) -> bool:
        return self.state in ("verified", "accepted", "unchecked", "stand-in")


def status(names: str | Iterable[str], root: str | Path | None = None) -> list[FileStatus]:
    """State of every file of the profiles or bundles named; reads no weights, so it answers at once."""
    return [row for bundle in get_bundles(names) for row in _bundle_status(bundle, weights_folder(root))]


def verify(names: str | Iterable[str], root: str | Path | None = None) -> list[FileStatus]:
    """As `status`, after reading every byte and comparing it with what is published (some seconds per GB)."""
    root, wrong = weights_folder(root), {}
    for file in (file for bundle in get_bundles(names) for file in _expected(bundle, root)):
        if (root / file.path).is_file() and not is_standin(root / file.path):
            try:
                recheck(root, file)
            except WeightsError as error:
                wrong[file.path] = {"state": "wrong", "detail": str(error)}
    return [replace(row, **wrong.get(row.path, {})) for row in status(names, root)]


def missing_bundles(names: str | Iterable[str], root: Path) -> list[Bundle]:
    """Bundles with something left to download; one that has to be merged is replaced by its recipe."""
    missing = []
    for bundle in get_bundles(names):
        if any(row.state not in ("verified", "accepted") for row in _bundle_status(bundle, root)):
            missing += [bundle] if bundle.files else missing_bundles(bundle.recipe, root)
    return missing


def check_file(path: Path, file: File, hub: str | None = None) -> dict:
    """Compare a complete file with what is published; returns what verified.json is to remember of it.

    `hub` is the hash that the hub states of what it served: SHA-256, or SHA-1 as git computes it. Raises
    WeightsError on a difference.
    """
    stat, stated = path.stat(), "stated by the hub"
    if published := file.wrong_size(stat.st_size):
        raise WeightsError(f"it has {stat.st_size:,} bytes, {published}")
    sha256 = digest_of(path)
    if wrong := known_wrong(sha256):
        raise WeightsError(f"it is {wrong}, not what is needed here")
    hub = hub if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", str(hub)) else ""
    record = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256, "hub": hub}
    git = partial(hashlib.sha1, b"blob %d\0" % stat.st_size, usedforsecurity=False)
    for kind, expected, who, algorithm in (("SHA-256", file.sha256, file.origin, None),
                                           ("SHA-256", hub if len(hub) == 64 else "", stated, None),
                                           ("MD5", file.md5, file.origin, "md5"),
                                           ("git hash", hub if len(hub) == 40 else "", stated, git)):
        if expected:
            found = digest_of(path, algorithm) if algorithm else sha256
            if found != expected:
                raise WeightsError(f"its {kind} is {found}, {who} is {expected}")
            return record | {"verified": True, "checked": f"{kind} as {who}"}
    _plausible(path, Path(file.path).suffix)
    known = "its size" if file.bytes else "nothing exact"
    return record | {"verified": False, "checked": f"no hash is published; {known} could be compared"}


def _plausible(path: Path, suffix: str) -> None:
    """A file without any published hash must at least be of its kind, and no error page of a web server."""
    if is_web_page(path) or not path.stat().st_size:
        raise WeightsError("it is empty or a web page")
    try:
        if suffix == ".json":
            json.loads(path.read_bytes())
        elif suffix in (".safetensors", ".bin", ".pt", ".pth"):
            read_tensors(path)
        elif suffix == ".zip":
            zipfile.ZipFile(path).close()
    except (ValueError, zipfile.BadZipFile, WeightsError) as error:
        raise WeightsError(f"it is damaged, or no {suffix} file") from error


def recheck(root: Path, file: File) -> None:
    """`check_file` on a file under its final name; remembers what was found, or forgets it on a difference."""
    record = None
    try:
        record = check_file(root / file.path, file, _records(root).get(file.path, {}).get("hub"))
    finally:
        remember(root, file.path, record)


def remember(root: Path, path: str, record: dict | None) -> None:
    """Remember (or with None forget) what was found about one file."""
    with _lock:
        records = _records(root) | {path: record}
        write_json(root / RECORD, {path: record for path, record in records.items() if record})


def _records(root: Path) -> dict[str, dict]:
    try:
        return {path: dict(record) for path, record in read_json(root / RECORD).items()}
    except (SpgddError, TypeError, ValueError):
        return {}  # absent, or damaged: files count as unchecked until they are verified again


def _expected(bundle: Bundle, root: Path) -> Sequence[File]:
    """The published files, or those of a merge in their place."""
    report = read_report(root / bundle.folder) if bundle.recipe else None
    return bundle.files if report is None else [
        File(f"{bundle.folder}/{name}", (), item["bytes"], sha256=item["sha256"], origin="recorded by the merge")
        for name, item in report["files"].items()]


def _bundle_status(bundle: Bundle, root: Path) -> list[FileStatus]:
    folder, files = root / bundle.folder, _expected(bundle, root)
    report = read_report(folder) if bundle.recipe else None
    if report and not report["complete"]:
        return [FileStatus(bundle.folder, "partial", 0, "merge interrupted: run it again")]
    there = [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    if bundle.recipe and there and not {root / file.path for file in files}.intersection(there):
        return [_copy_status(bundle, folder)]
    if not files:
        size, parts = sum(get_bundle(name).size for name in bundle.recipe), " and ".join(bundle.recipe)
        command = f"`spgdd weights merge-vicuna {bundle.contents['size']}`"
        return [FileStatus(bundle.folder, "missing", size, f"made by {command} from {parts}")]
    records = _records(root)
    return [_file_status(file, root, records.get(file.path, {})) for file in files]


def _copy_status(bundle: Bundle, folder: Path) -> FileStatus:
    """A copy of Vicuna v0 sharded in another way than the published one: judged by its tensors."""
    state, size = "wrong", sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        found = recognise(folder)
        detail = found.text
        if found.kind == "vicuna-v0" and found.size == bundle.contents["size"]:
            state = "stand-in" if is_standin(folder) else "accepted"
            detail = "Vicuna v0 by its names and shapes; for a copy in these shards there are no published hashes"
    except WeightsError as error:
        detail = str(error)
    return FileStatus(bundle.folder, state, size, detail)


def _file_status(file: File, root: Path, record: dict) -> FileStatus:
    path, part = root / file.path, file.partial(root)
    if not path.is_file():
        if part.is_file():
            done = f"{readable(part.stat().st_size)} of {readable(file.size)}"
            return FileStatus(file.path, "partial", file.size, done)
        restore = "" if file.sources else "comes with this repository: `git checkout -- pretrained_ckpt/mini`"
        return FileStatus(file.path, "missing", file.size, restore)
    stat = path.stat()
    as_checked = (record.get("bytes"), record.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
    if is_standin(path):
        state, detail = "stand-in", "random values, no trained weights"
    elif published := file.wrong_size(stat.st_size):
        state, detail = "wrong", f"{stat.st_size:,} bytes, {published}"
    elif as_checked and record.get("sha256") == (file.sha256 or record.get("sha256")):
        state, detail = "verified" if record.get("verified") is True else "accepted", str(record.get("checked"))
    else:
        state, detail = "unchecked", "present, not compared with what is published yet"
    return FileStatus(file.path, state, stat.st_size, detail)
