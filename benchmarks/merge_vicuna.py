"""Measure a full-size merge of Vicuna-7B v0 from stand-ins: memory, time, and five kills.

    python benchmarks/merge_vicuna.py FOLDER        # needs 55 GB there; about 15 minutes on two cores

Prints the peak of resident memory (VmHWM: everything, mapped file pages too) and of its parts (RssAnon: what
the system cannot drop; RssFile: mapped pages), read from /proc every 10 ms, and whether merges killed
(SIGKILL) at five random moments end with the same hashes as one that ran through. Linux only.

Measured on two cores of an AMD EPYC that other programs kept busy: 170 s, VmHWM 1.72 GB, RssAnon 1.64 GB, RssFile
0.35 GB, the same at 4 and at 12 of the 32 layers; killed after 20, 32, 58, 90 and 108 s with 3 to 12 of 28 shards done:
equal hashes each time.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from write_standins import standin

MERGE = (
    "import sys; from spgdd.weights.merge import merge_vicuna; merge_vicuna(*sys.argv[1:], progress=False)"
)


def memory(pid: int) -> dict[str, int]:
    """VmHWM, RssAnon and RssFile of a process in bytes; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {
        key: int(fields[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon", "RssFile") if key in fields
    }


def run(base: Path, delta: Path, out: Path, kill_after: float | None = None) -> tuple[float, dict[str, int]]:
    """Merge in a process of its own; returns seconds and the peak of each kind of memory."""
    start, peaks = time.monotonic(), {}
    process = subprocess.Popen([sys.executable, "-c", MERGE, base, delta, out])
    while process.poll() is None:
        for key, value in memory(process.pid).items():
            peaks[key] = max(peaks.get(key, 0), value)
        if kill_after is not None and time.monotonic() - start > kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the merge failed with status {process.returncode}")
    return time.monotonic() - start, peaks


def main(folder: Path) -> None:
    start = time.monotonic()
    standin(["llama-7b", "vicuna-7b-delta-v0"], folder)
    print(f"stand-ins written in {time.monotonic() - start:.0f} s")
    base, delta, out = (
        folder / "llama_ckpt/7b",
        folder / "vicuna_ckpt/7b_delta_v0",
        folder / "vicuna_ckpt/7b_v0",
    )
    seconds, peaks = run(base, delta, out)
    parts = ", ".join(f"{key} {value / 1e9:.2f} GB" for key, value in peaks.items())
    print(f"merged in {seconds:.0f} s; peak {parts}")
    whole = json.loads((out / "merge_report.json").read_text())
    shutil.rmtree(out)

    moments = random.Random(7)
    for moment in [moments.uniform(0.05, 0.95) * seconds for _ in range(5)]:
        shutil.rmtree(
            out, ignore_errors=True
        )  # each kill from a fresh start, so that it strikes at its moment
        run(base, delta, out, kill_after=moment)
        report = out / "merge_report.json"
        done = len(json.loads(report.read_text())["files"]) if report.exists() else 0
        left, peaks = run(base, delta, out)
        same = json.loads(report.read_text()) == whole
        print(
            f"killed after {moment:.0f} s with {done} shards done; continued in {left:.0f} s; "
            f"VmHWM {peaks['VmHWM'] / 1e9:.2f} GB; hashes {'equal' if same else 'DIFFER'}",
            flush=True,
        )
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
