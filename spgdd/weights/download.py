"""Downloads that end in a verified file or a reason.

huggingface_hub's `http_get` fetches, resumes and shows progress, with its token (HF_TOKEN), endpoint
(HF_ENDPOINT), proxies, timeout (HF_HUB_DOWNLOAD_TIMEOUT) and offline mode (HF_HUB_OFFLINE). Made here: verification,
the turns of the mirrors, and partial files, since `hf_hub_download` deletes its own when it is interrupted.
"""

import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from io import BufferedWriter, FileIO
from math import inf
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError: of httpx in 1.x, of httpx2 in 2.x
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.tqdm import silent_tqdm

from spgdd.errors import SpgddError, WeightsError
from spgdd.files import claimed
from spgdd.profiles import weights_folder
from spgdd.tensors import is_standin
from spgdd.weights.catalog import File
from spgdd.weights.plan import plan
from spgdd.weights.verify import FileStatus, check_file, recheck, remember, status

WAITS = (1, 2, 4, 8, 16)  # seconds between attempts at one source, after failures in a row without a new byte


def download(names: str | Sequence[str], root: str | Path | None = None, workers: int = 3,
             progress: bool = True) -> list[FileStatus]:
    """Fetch what is missing for the profiles or bundles named, and return the state of all their files.

    Files that are there already are verified and kept; stand-ins are replaced. `workers` files are fetched at
    a time. Raises SpgddError when the disk is too small or another download runs in `root`, and WeightsError at the
    end with a line per file that no source could deliver; what was fetched of it stays for the next call.
    """
    root = weights_folder(root)
    todo = plan(names, root)
    if todo.files or todo.unchecked:
        with claimed(root, todo.fetch_bytes + 10**8 if todo.files else 1):
            problems = _fetch_all(todo.unchecked + todo.files, root, workers, progress)
        if problems:
            raise WeightsError("Not all was downloaded; run it again to continue.", *problems)
    return status(names, root)


def _fetch_all(files: list[File], root: Path, workers: int, progress: bool) -> list[str]:
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        jobs = {file.path: pool.submit(fetch, file, root, WAITS, progress, stop) for file in files}
        try:
            wait(jobs.values())
        finally:  # after Ctrl-C: let the threads end at the next chunk, keep what they have
            stop.set()
            pool.shutdown(cancel_futures=True)
    problems = []
    for path, job in jobs.items():
        try:
            job.result()
        except SpgddError as error:
            problems.append(f"{path}: {error}")
    return problems


def fetch(file: File, root: Path, waits: Sequence[float] = WAITS, progress: bool = True,
          stop: threading.Event | None = None) -> None:
    """Bring one file under its final name, verified, or raise WeightsError with the reason of each source."""
    target, part, stop = root / file.path, file.partial(root), stop or threading.Event()
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
    reasons = []
    for source in file.sources:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            record = _from_source(source, file, part, waits, progress, stop)
            part.replace(target)
            return remember(root, file.path, record)
        except _Refused as refusal:
            reasons.append(f"{source}: {refusal}")
        except OSError as error:
            raise WeightsError(f"cannot be written ({error.strerror or error})") from error
    raise WeightsError("; ".join(reasons) or "missing; it is part of this repository: restore it with git")


class _Refused(Exception):
    """This source will not give the file; the next one is tried."""


def _from_source(source: str, file: File, part: Path, waits: Sequence[float], progress: bool,
                 stop: threading.Event) -> dict:
    """Fetch until verified; returns what is to be remembered of the file."""
    failures = furthest = wrong = 0
    while failures <= len(waits):
        stop.wait((0, *waits)[failures])
        try:
            return check_file(part, file, _transfer(source, file, part, progress, stop))
        except WeightsError as error:
            part.unlink()
            reason, furthest, wrong = str(error), 0, wrong + 1
            if wrong == 2:
                raise _Refused(f"sent a wrong file twice: {error}") from None
        except HfHubHTTPError as error:
            code = error.response.status_code
            reason = f"the server answered {code}"
            if code in (401, 403):
                raise _Refused(f"access denied ({code}): accept the licence on its page and set HF_TOKEN") from None
            if code == 416:  # it has no such part, so what is here is of another file
                part.unlink(missing_ok=True)
            elif code not in (408, 425, 429) and code < 500:
                raise _Refused(reason + ": no such file there" * (code in (404, 410))) from None
        except HTTPError as error:
            reason = f"the connection broke ({type(error).__name__}: {error})"
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None):  # of the disk; what http_get itself finds wrong has no number
                raise
            part.unlink(missing_ok=True)
            reason = f"sent other bytes than it was asked for ({str(error).partition(chr(10))[0]})"
        have = part.stat().st_size if part.exists() else 0
        failures = 0 if have > furthest else failures + 1
        furthest = max(furthest, have)
    raise _Refused(f"{reason} ({failures} failures in a row)")


def _transfer(source: str, file: File, part: Path, progress: bool, stop: threading.Event) -> str | None:
    """Continue the partial file to its end. Returns the hash that the hub states, if the source is there."""
    (url, headers), hub = address(source), source.startswith("hf:")
    try:
        stated = get_hf_file_metadata(url, token=None if hub else False)
        size = stated.size if hub or stated.location == url else None  # of a redirect it is that of the answer
    except (HTTPError, ValueError):
        if hub:
            raise
        size = None  # a server that knows no HEAD; whether it has the file, http_get will find out
    if size is not None and (published := file.wrong_size(size)):
        raise _Refused(f"announces a file of {size:,} bytes, {published}")
    with _Partial(FileIO(part, "ab")) as out:
        out.limit, out.stop = min(file.most, inf if size is None else size), stop
        if out.tell() > out.limit or not (file.sha256 or file.md5 or hub and stated.etag):
            out.truncate(out.seek(0))  # without a hash nothing would show that halves of two versions were put together
        http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=file.bytes or size,
                 displayed_filename=file.path, tqdm_class=None if progress else silent_tqdm)
        out.flush()
        os.fsync(out.fileno())
    return stated.etag if hub else None


class _Partial(BufferedWriter):
    """A partial file that takes no more bytes than the whole has, and none once the download is stopped."""

    def write(self, data) -> int:
        if self.stop.is_set():
            raise _Refused("stopped")
        if self.tell() + len(data) > self.limit:
            raise ValueError(f"more than the {self.limit:,.0f} of the file")
        return super().write(data)


def address(source: str) -> tuple[str, dict]:
    """(link, headers of the request) of a source as the catalogues write it."""
    if not source.startswith("hf:"):
        return source, {"Accept-Encoding": "identity"}
    kind, repository, revision, path = re.fullmatch(r"hf:(?:(space|dataset)s/)?([^@]+)@([^/]+)/(.+)", source).groups()
    url = hf_hub_url(repository, path, repo_type=kind, revision=revision)
    return url, build_hf_headers() | {"Accept-Encoding": "identity"}
