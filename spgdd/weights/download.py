"""Downloads that end in a verified file or a reason: resumed at any byte, mirrors in turn.

Addresses, token (HF_TOKEN), endpoint (HF_ENDPOINT), proxies, offline mode (HF_HUB_OFFLINE) and session are
those of huggingface_hub. The bytes are fetched here, because its `hf_hub_download` (seen in 2.4) deletes a
partial file when it is interrupted, and starts anew.
"""

import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_url, is_offline_mode
from huggingface_hub.utils import build_hf_headers, get_session
from tqdm.auto import tqdm

from spgdd.errors import WeightsError
from spgdd.profiles import weights_folder
from spgdd.tensors import is_standin, part_path, write_json
from spgdd.weights.catalog import File, readable
from spgdd.weights.plan import plan
from spgdd.weights.verify import FileStatus, check_file, recheck, remember, status


@dataclass(frozen=True)
class Patience:
    """How long to insist before the next mirror is tried."""

    attempts: int = 6  # failures in a row without a new byte
    first_wait: float = 1.0  # seconds after the first failure; doubles with each
    longest_wait: float = 60.0  # seconds, also where the server asks for more
    timeout: float = 30.0  # seconds without a byte that count as a failure


PATIENCE = Patience()


def download(names: str | Sequence[str], root: str | Path | None = None, patience: Patience = PATIENCE,
             workers: int = 3, progress: bool = True) -> list[FileStatus]:
    """Fetch what is missing for the profiles or bundles named, and return the state of all their files.

    Files that are there already are verified and kept; stand-ins are replaced. `workers` files are fetched at
    a time. Raises WeightsError when the disk is too small, when another download runs in `root`, and at the
    end with a line per file that no source could deliver; what was fetched of it stays for the next call.
    """
    root = weights_folder(root)
    todo = plan(names, root)
    if todo.files or todo.unchecked:
        if todo.files and todo.fetch_bytes + 1e8 > todo.free_bytes:
            raise WeightsError(f"{readable(todo.fetch_bytes)} are to be fetched, {readable(todo.free_bytes)} "
                               "are free on the disk. Make room, or give another root.")
        root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(root / ".download.lock", timeout=0):
                problems = _fetch_all(todo.unchecked + todo.files, root, patience, workers, progress)
        except Timeout:
            raise WeightsError(f"Another download is running in {root}. Wait for it or stop it.") from None
        if problems:
            raise WeightsError("\n".join(["Not all was downloaded; run it again to continue.", *problems]))
    return status(names, root)


def _fetch_all(files: list[File], root: Path, patience: Patience, workers: int, progress: bool) -> list[str]:
    stop, problems = threading.Event(), []

    def one(file: File) -> None:
        try:
            fetch(file, root, patience, progress, stop)
        except WeightsError as error:
            problems.append(f"{file.path}: {error}")
        except OSError as error:
            problems.append(f"{file.path}: cannot be written ({error.strerror or error})")

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(one, files))
        except BaseException:  # Ctrl-C: let the threads end at the next chunk, keep what they have
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return problems


def fetch(file: File, root: Path, patience: Patience = PATIENCE, progress: bool = True,
          stop: threading.Event | None = None) -> None:
    """Bring one file under its final name, verified, or raise WeightsError with the reason of each source."""
    target, stop = root / file.path, stop or threading.Event()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        try:
            recheck(root, file)
            return
        except WeightsError as error:
            if not is_standin(target):
                raise WeightsError(f"a file is there, but {error}. Move it away and try again.") from error
    if is_offline_mode():
        raise WeightsError("missing, and offline mode is on (HF_HUB_OFFLINE). Copy it by hand as "
                           "pretrained_ckpt/README.md describes, or switch offline mode off.")
    reasons, unit = [], {"unit": "B", "unit_scale": True}
    with tqdm(total=file.size or None, desc=file.path, disable=not progress, **unit) as bar:
        for source in file.sources:
            try:
                record = _from_source(source, file, target, patience, bar, stop)
            except _Refused as refusal:
                reasons.append(f"{source}: {refusal}")
                continue
            part_path(target).replace(target)
            _note(target).unlink(missing_ok=True)
            remember(root, file.path, record)
            bar.set_postfix_str(record["checked"])
            return
    raise WeightsError("; ".join(reasons) or "missing; it is part of this repository: restore it with git")


class _Refused(Exception):
    """This source will not give the file; the next one is tried."""


class _Interrupted(Exception):
    """This attempt failed; what arrived is kept, the source tried again (after `wait` seconds if given)."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def _note(target: Path) -> Path:  # beside a partial file: which version of the file it is the beginning of
    return target.with_name(target.name + ".part.json")


def _from_source(source: str, file: File, target: Path, patience: Patience, bar: tqdm,
                 stop: threading.Event) -> dict:
    """Fetch until verified; returns the record for the registry."""
    part, failures, wrong, furthest = part_path(target), 0, 0, 0
    while True:
        try:
            hub = _transfer(source, file, target, patience.timeout, bar, stop)
            try:
                return check_file(part, file, hub)
            except WeightsError as error:
                _discard(target)
                wrong, furthest = wrong + 1, 0
                if wrong == 2:
                    raise _Refused(f"sent a wrong file twice: {error}") from None
                raise _Interrupted(str(error)) from None
        except _Interrupted as interruption:
            have = part.stat().st_size if part.exists() else 0
            failures = 0 if have > furthest else failures + 1
            furthest = max(furthest, have)
            if failures >= patience.attempts:
                raise _Refused(f"{interruption} ({failures} failures in a row)") from None
            wait = patience.first_wait * 2**failures if interruption.wait is None else interruption.wait
            stop.wait(min(wait, patience.longest_wait))


def _transfer(source: str, file: File, target: Path, timeout: float, bar: tqdm,
              stop: threading.Event) -> dict:
    """One request that continues the partial file. Returns the hashes that the hub states."""
    part = part_path(target)
    note = json.loads(_note(target).read_text()) if _note(target).exists() else {}
    hashed = file.sha256 or file.md5  # then parts may come from any source, the whole is verified
    have = part.stat().st_size if part.exists() and (hashed or note.get("etag")) else 0
    total = file.bytes or note.get("bytes")
    if total is not None and have == total:
        return note.get("hub", {})
    url, headers = address(source)
    if have:
        headers["Range"] = f"bytes={have}-"
    session = get_session()
    # huggingface_hub 1.x works with httpx, 2.x with httpx2: the same classes under another name
    http_error = sys.modules[type(session).__module__.partition(".")[0]].HTTPError
    try:
        with session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code not in (200, 206):
                raise _refusal(response, target)
            start, total, version = _announced(response, source)
            expected = file.bytes or file.about_bytes or 0
            if total is not None and (total != expected if file.bytes else
                                      expected > 1e6 and abs(total / expected - 1) > 0.02):
                raise _Refused(f"announces a file of {total:,} bytes, published are {expected:,}")
            if start > have or (start and not hashed and note["etag"] != version["etag"]):
                _discard(target)
                raise _Interrupted("the server has another version of the file than was begun")
            write_json(_note(target), version)
            _receive(response, part, start, total, bar, stop)
    except http_error as error:
        raise _Interrupted(f"the connection broke ({type(error).__name__}: {error})") from None
    return version["hub"]


def _receive(response, part: Path, start: int, total: int | None, bar: tqdm, stop: threading.Event) -> None:
    bar.total, bar.n = total or bar.total, start
    with open(part, "r+b" if start else "wb") as out:
        out.seek(start)
        for chunk in response.iter_raw():
            out.write(chunk)
            bar.update(len(chunk))
            if stop.is_set():
                raise _Refused("stopped")
            if total is not None and out.tell() > total:
                out.truncate(0)
                raise _Interrupted(f"the server sent more than the {total:,} bytes it announced")
        received = out.tell()
        out.flush()
        os.fsync(out.fileno())
    if total is not None and received < total:
        raise _Interrupted(f"the server stopped after {received:,} of {total:,} bytes")


def address(source: str) -> tuple[str, dict]:
    """(link, headers of the request) of a source as the catalogues write it."""
    if not source.startswith("hf:"):
        return source, {"Accept-Encoding": "identity"}
    kind, repository, revision, path = re.fullmatch(r"hf:(?:(space|dataset)s/)?([^@]+)@([^/]+)/(.+)", source).groups()
    url = hf_hub_url(repository, path, repo_type=kind, revision=revision)
    return url, build_hf_headers() | {"Accept-Encoding": "identity"}


def _announced(response, source: str) -> tuple[int, int | None, dict]:
    """(first byte that will arrive, size of the whole file, note on its version)."""
    start, total = 0, response.headers.get("content-length")
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
        if not found:
            raise _Interrupted("the server sent a part without saying which")
        start, total = found.groups()
    etag, hub = response.headers.get("etag", ""), {}
    if source.startswith("hf:"):  # the hub's own answers state the hash, not those of its storage hosts
        chain = (*response.history, response)
        own = [x.headers for x in chain if x.url.host == chain[0].url.host]
        stated = [headers.get("x-linked-etag") or headers.get("etag") for headers in own]
        etag = next((text.removeprefix("W/").strip('"') for text in stated if text), etag)
        if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag):
            hub = {"sha256" if len(etag) == 64 else "git_sha1": etag}
    total = int(total) if total else None
    return int(start), total, {"etag": etag, "bytes": total, "hub": hub}


def _refusal(response, target: Path) -> Exception:
    code = response.status_code
    if code == 416:
        _discard(target)
        return _Interrupted("the server has no such part of the file")
    if code in (408, 425, 429) or code >= 500:
        wait = response.headers.get("retry-after", "")
        return _Interrupted(f"the server answered {code}", float(wait) if wait.isdigit() else None)
    if code in (401, 403):
        return _Refused(f"access denied ({code}): accept the licence on its page and set HF_TOKEN")
    return _Refused(f"the server answered {code}" + (": no such file there" if code in (404, 410) else ""))


def _discard(target: Path) -> None:
    for path in (part_path(target), _note(target)):
        path.unlink(missing_ok=True)
