"""The one writer of files: whole or not at all; how JSON objects are read back, and who works in a folder."""

import csv
import io
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from spgdd.errors import SpgddError

STALE = 24 * 3600  # seconds after which an unfinished file is taken for one of a killed process


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write bytes to, which gets its name when it is complete and on the disk; its folders are made.

    Links are followed, and what is no regular file, such as a device or a pipe, is written to as it is. Raises
    SpgddError with the reason where writing fails; what was there before is then still there.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            with open(target, "wb") as file:
                yield file
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        partial = target.with_name(f".{target.name[:50]}.{uuid.uuid4().hex[:12]}.part")  # others may write it too
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            with suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise SpgddError(f"{path}: cannot be written ({error.strerror or error}).") from error


@cache  # once a process
def remove_stale(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 12}.part"):
        with suppress(OSError):  # another process may be faster
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a text in UTF-8; what UTF-8 cannot say, as in some file names, is written as an escape."""
    with whole_file(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))
    return Path(path)


def write_json(path: str | os.PathLike, content, indent: int | None = 2) -> Path:
    """Write JSON values."""
    return write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_csv(path: str | os.PathLike, head: Iterable, rows: Iterable[Iterable]) -> Path:
    """Write a table with the names of its columns in the first line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return write_text(path, text.getvalue())


def read_json(path: str | os.PathLike, mend: str = "", error: type[SpgddError] = SpgddError) -> dict:
    """The JSON object in a file. Raises `error`, with `mend` at its end, where there is none or another value."""
    try:
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} instead of names with values")
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} is damaged ({reason}). {mend}".rstrip()) from reason
    return content


def require_room(folder: str | os.PathLike, needed: float = 0, mend: str = "Choose another folder.") -> None:
    """Make a folder. Raises SpgddError, with `mend` at its end, where it cannot be, or lacks room for so many bytes."""
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise SpgddError(f"{folder} cannot be made ({error.strerror}). {mend}") from error
    if needed > free:
        raise SpgddError(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free. {mend}")
    if needed and not os.access(folder, os.W_OK):
        raise SpgddError(f"{folder} cannot be written to. {mend}")


@contextmanager
def claimed(folder: str | os.PathLike, needed: int = 1) -> Iterator[None]:
    """The folder for this process alone while it lives, with room for so many bytes.

    Raises SpgddError that names the process which has it, or says what is wrong with the folder.
    """
    from filelock import FileLock, Timeout

    require_room(folder, needed)
    owner = Path(folder) / ".owner"
    try:
        lock = FileLock(owner.with_name(".lock")).acquire(timeout=0)
    except Timeout:
        holder = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise SpgddError(f"{folder} is in use by {holder}. Wait for its end, or choose another folder.") from None
    with lock:
        write_text(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield
        owner.unlink(missing_ok=True)


def check_outputs(outputs: Iterable[tuple], inputs: Iterable = ()) -> None:
    """Raises SpgddError where a file cannot be written, or should not, before there is anything to write.

    ``outputs``: paths, or None for none, each with the endings that its name may have (of a device or pipe any will
    do). None may be another of them or one of the ``inputs``.
    """
    known = [path for path in inputs if path]
    for path, endings in outputs:
        if not path:
            continue
        target = Path(os.path.realpath(path))
        try:
            if target.is_dir() or target.is_block_device():
                raise SpgddError(f"{path}: a {'folder' if target.is_dir() else 'disk'}; name the file to write.")
            if target.exists() and not target.is_file():
                continue
            if Path(path).suffix.lower() not in endings:
                raise SpgddError(f"{path}: the name must end with {' or '.join(endings)}.")
            for other in known:
                same = target.exists() and os.path.exists(other) and os.path.samefile(target, other)
                if same or os.path.realpath(other) == str(target):
                    raise SpgddError(f"{path}: would overwrite {other}; give another name.")
            with tempfile.TemporaryFile(dir=next(folder for folder in target.parents if folder.exists())):
                known.append(path)
        except OSError as error:
            raise SpgddError(f"{path}: cannot be written ({error.strerror or error}).") from error
