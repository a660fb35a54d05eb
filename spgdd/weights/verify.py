"""What is on the disk: which files are there, whole, and the published ones."""

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path

from spgdd.errors import WeightsError
from spgdd.profiles import weights_folder
from spgdd.tensors import TensorFile, is_standin, is_web_page, part_path, sha256_of, write_json
from spgdd.weights.catalog import Bundle, File, get_bundle, get_bundles, known_wrong, readable
from spgdd.weights.llama import recognise
from spgdd.weights.merge import MERGE_REPORT

RECORD = "verified.json"  # in the weights folder: what was verified, how, and size and time of each file then
_lock = threading.Lock()


@dataclass(frozen=True)
class FileStatus:
    """State of one file: missing, partial, unchecked, verified, accepted, stand-in or wrong.

    "accepted" has nothing published to compare with beyond what `detail` names.
    """

    path: str  # relative to the weights folder
    bundle: str
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
    root, found = weights_folder(root), {}
    for bundle in get_bundles(names):
        for file in _expected(bundle, root)[1]:
            path = root / file.path
            if path.is_file() and not is_standin(path):
                try:
                    recheck(root, file)
                except WeightsError as error:
                    found[file.path] = {"state": "wrong", "detail": str(error)}
    return [replace(row, **found.get(row.path, {})) for row in status(names, root)]


def missing_bundles(names: str | Iterable[str], root: str | Path | None) -> list[Bundle]:
    """Bundles with something left to download; one that has to be merged is replaced by its recipe."""
    missing = []
    for bundle in get_bundles(names):
        if all(row.state in ("verified", "accepted") for row in _bundle_status(bundle, weights_folder(root))):
            continue
        missing += [bundle] if bundle.files else missing_bundles(bundle.recipe, root)
    return missing


def check_file(path: Path, file: File, hub: dict | None = None) -> dict:
    """Compare a complete file with what is published; returns a record with "checked" and "verified".

    `hub` holds "sha256" or "git_sha1" as stated by the hub that served it. WeightsError on a difference.
    """
    size, hub = path.stat().st_size, dict(hub or {})
    if file.bytes is not None and size != file.bytes:
        raise WeightsError(f"it has {size:,} bytes, published are {file.bytes:,}")
    if file.about_bytes and file.about_bytes > 1e6 and abs(size / file.about_bytes - 1) > 0.02:
        raise WeightsError(f"it has {size:,} bytes, published are about {file.about_bytes:,}")
    sha256, *md5 = sha256_of(path, *(["md5"] if file.md5 else []))
    if wrong := known_wrong(sha256):
        raise WeightsError(f"it is {wrong}, not what is needed here")
    record = {"bytes": size, "mtime_ns": path.stat().st_mtime_ns, "sha256": sha256, "verified": True,
              "hub": hub}
    if file.sha256:
        kind, found, who, expected = "SHA-256", sha256, file.origin, file.sha256
    elif hub.get("sha256"):
        kind, found, who, expected = "SHA-256", sha256, "stated by the hub", hub["sha256"]
    elif file.md5:
        kind, found, who, expected = "MD5", md5[0], file.origin, file.md5
    elif hub.get("git_sha1"):
        content = path.read_bytes()
        found = sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        kind, who, expected = "git hash", "stated by the hub", hub["git_sha1"]
    else:
        _plausible(path)
        known = "its size" if file.bytes else "nothing exact"
        return record | {"verified": False, "checked": f"no hash is published; {known} could be compared"}
    if found != expected:
        raise WeightsError(f"its {kind} is {found}, {who} is {expected}")
    return record | {"checked": f"{kind} as {who}"}


def _plausible(path: Path) -> None:
    """A file without any published hash must at least be of its kind, and no error page of a web server."""
    if is_web_page(path) or not path.stat().st_size:
        raise WeightsError("it is empty or a web page")
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise WeightsError(f"it is no valid JSON ({error})") from error
    if path.suffix == ".safetensors":
        TensorFile(path)


def recheck(root: Path, file: File) -> dict:
    """`check_file` on a file under its final name; remembers the record, or forgets it on a difference."""
    try:
        record = check_file(root / file.path, file, read_record(root).get(file.path, {}).get("hub"))
    except WeightsError:
        remember(root, file.path, None)
        raise
    remember(root, file.path, record)
    return record


def read_record(root: Path) -> dict[str, dict]:
    try:
        return json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent, or damaged by hand: files count as unchecked until verified again


def remember(root: Path, path: str, record: dict | None) -> None:
    """Remember (or with None forget) what was found about one file."""
    with _lock:
        records = read_record(root)
        records.pop(path, None)
        if record:
            records[path] = record
        write_json(root / RECORD, records)


def _expected(bundle: Bundle, root: Path) -> tuple[dict | None, tuple[File, ...]]:
    """(merge report or None, files): the published files, or those of a finished merge in their place."""
    path = root / bundle.folder / MERGE_REPORT
    if not (bundle.recipe and path.is_file()):
        return None, bundle.files
    report = json.loads(path.read_text(encoding="utf-8"))
    return report, tuple(File(f"{bundle.folder}/{name}", (), item["bytes"], sha256=item["sha256"],
                              origin="recorded by the merge")
                         for name, item in report["files"].items())


def _bundle_status(bundle: Bundle, root: Path) -> list[FileStatus]:
    report, files = _expected(bundle, root)
    if report and not report["complete"]:
        return [FileStatus(bundle.folder, bundle.name, "partial", 0, "merge interrupted: run it again")]
    folder = root / bundle.folder
    weights = [file for file in files if file.path.endswith((".bin", ".safetensors"))]
    if bundle.recipe and not any((root / file.path).exists() for file in weights):
        if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
            return [_other_layout(bundle, folder)]
        if not files:
            size = sum(get_bundle(name).size for name in bundle.recipe)
            command = f"`spgdd weights merge-vicuna {bundle.contents['size']}`"
            return [FileStatus(bundle.folder, bundle.name, "missing", size,
                               f"made by {command} from {' and '.join(bundle.recipe)}")]
    record = read_record(root)
    return [_file_status(file, bundle, root, record.get(file.path)) for file in files]


def _other_layout(bundle: Bundle, folder: Path) -> FileStatus:
    """A copy of Vicuna v0 sharded in another way than the published one: judged by its tensors."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        found = recognise(folder)
    except WeightsError as error:
        return FileStatus(bundle.folder, bundle.name, "wrong", size, str(error))
    if found.kind == "vicuna-v0" and found.size == bundle.contents["size"]:
        state = "stand-in" if is_standin(folder) else "accepted"
        return FileStatus(bundle.folder, bundle.name, state, size, "Vicuna v0 by its names and shapes; for a "
                          "copy in these shards there are no published hashes")
    return FileStatus(bundle.folder, bundle.name, "wrong", size, found.text)


def _file_status(file: File, bundle: Bundle, root: Path, record: dict | None) -> FileStatus:
    path = root / file.path
    row = FileStatus(file.path, bundle.name, "missing", file.size, "")
    if path.is_file():
        stat = path.stat()
        row = replace(row, size=stat.st_size)
        if is_standin(path):
            return replace(row, state="stand-in", detail="random values, no trained weights")
        if file.bytes is not None and stat.st_size != file.bytes:
            return replace(row, state="wrong", detail=f"{stat.st_size:,} bytes, published are {file.bytes:,}")
        if record and (record["bytes"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            state = "verified" if record["verified"] else "accepted"
            return replace(row, state=state, detail=record["checked"])
        return replace(row, state="unchecked", detail="present, not compared with what is published yet")
    if part_path(path).is_file():
        have = readable(part_path(path).stat().st_size)
        return replace(row, state="partial", detail=f"{have} of {readable(file.size)}")
    detail = "comes with this repository: `git checkout -- pretrained_ckpt/mini`" if not file.sources else ""
    return replace(row, detail=detail)
