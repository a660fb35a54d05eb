"""Data sets from their publishers: verified where a direct link exists, instructions where not.

The links, sizes, hashes and licences are data, in ``datasets.json``.
"""

import errno
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

from spgdd.errors import DataError
from spgdd.files import claimed

MOST_BYTES = 20  # times an archive's size; pictures hardly shrink, their masks do
MOST_FILES = 1_000_000  # of an archive
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # not an archive's fault
CATALOG = json.loads(Path(__file__).with_name("datasets.json").read_text(encoding="utf-8"))
DATASETS = {entry["name"]: entry for entry in CATALOG}


def about(name: str, root: str | Path = "data/TADD") -> str:
    """Title, licence, size, page, and what to do by hand where there is no direct link."""
    entry = _entry(name)
    size = _size(entry)
    lines = [entry["title"], f"  licence: {entry['licence']}", f"  page:    {entry['page'] or 'unknown'}"]
    lines += [f"  size:    {size / 1e9:.1f} GB to download, and about as much again unpacked"] if size else []
    if "steps" in entry:
        lines.append(f"  by hand: {entry['steps'].format(folder=Path(root) / entry['folder'])}")
    return "\n".join(lines)


def download(name: str, root: str | Path = "data/TADD") -> Path:
    """Fetch, verify and unpack a data set; returns its folder.

    Raises DataError with the steps if it has no link, SpgddError if the disk is too small for archive and content.
    """
    from spgdd.weights.catalog import File
    from spgdd.weights.download import fetch

    entry = _entry(name)
    if "files" not in entry:
        raise DataError(f"{name} cannot be downloaded from here.", *about(name, root).splitlines())
    folder = Path(os.path.normpath(Path(root) / entry["folder"]))
    with claimed(folder, 2 * _size(entry) + 1):
        for file in entry["files"]:
            options = {key: value for key, value in file.items() if key not in ("name", "sources")}
            fetch(File(file["name"], tuple(file["sources"]), **options), folder)
            unpack(folder / file["name"])
    return folder


def unpack(archive: Path) -> None:
    """Unpack a .zip, .tar, .tar.gz or .tar.xz beside itself; the standard library refuses paths to elsewhere.

    Each file appears under its name when all are unpacked. Raises DataError, and removes the archive, where it is
    damaged or holds far more than an archive of pictures does.
    """
    if archive.suffix != ".zip" and ".tar" not in archive.suffixes:
        return
    left = {"bytes": MOST_BYTES * archive.stat().st_size, "files": MOST_FILES}

    def counted(member, size: int):
        left["bytes"] -= size
        left["files"] -= 1
        if min(left.values()) < 0:
            raise ValueError(f"more than {MOST_BYTES} times its size, or than {MOST_FILES} files")
        return member

    partial = archive.with_name(f".{archive.name}.unpacking")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as file:
                file.extractall(partial, [counted(info, info.file_size) for info in file.infolist()])
        else:
            with tarfile.open(archive) as file:
                file.extractall(partial, filter=lambda info, to: tarfile.data_filter(counted(info, info.size), to))
        for path in sorted(partial.rglob("*")):
            target = archive.parent / path.relative_to(partial)
            if path.is_dir() and not path.is_symlink():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)
    except Exception as error:  # what a damaged archive raises, nobody knows
        if getattr(error, "errno", None) in DISK:
            raise DataError(f"{archive} cannot be unpacked ({error.strerror}). It was kept.") from error
        archive.unlink()
        raise DataError(f"{archive} is damaged or no archive of pictures ({error}). It was removed; "
                        "run the command again.") from error  # fmt: skip
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _size(entry: dict) -> int:
    """Bytes to download, as far as they are published."""
    return sum(file.get("bytes", file.get("about_bytes", 0)) for file in entry.get("files", ()))


def _entry(name: str) -> dict:
    if name not in DATASETS:
        raise DataError(f"There is no data set called {name!r}. Known are: {', '.join(DATASETS)}.")
    return DATASETS[name]
