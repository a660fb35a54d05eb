"""What profiles without a language part cost: loading, a diagnosis, pictures a second. On stand-ins of full size.

    python benchmarks/eyes.py FOLDER [PROFILE ...] [--device cuda] [--dtype float16]

FOLDER gets the stand-ins that it lacks (imagebind 4.8 GB, dinov2-small and -base 0.4 GB). Loading is compared with
reading as many bytes from a file that nothing has in memory; peak memory is without pages mapped to files.

Measured on one busy core of an AMD EPYC: imagebind in bfloat16 loads in 7.9 s where reading takes 6.0 s, 1.56 GB of
memory, and 2.6 s a further diagnosis; in float32 0.3 GB and 7.3 s. dinov2-small encodes a picture in 0.7 processor
seconds (bfloat16 0.4), dinov2-base in 2.3, imagebind in 3.7 (bfloat16 1.0).
"""

import argparse
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import spgdd
from spgdd.evaluation.protocol import Picture, Task, evaluate
from spgdd.profiles import get_profile
from write_standins import standin

NORMALS = 4
TURNS = 5  # warm diagnoses
PICTURES = 100  # of an evaluation


def private() -> float:
    """GB of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e9


@contextmanager
def peak() -> Iterator[list[float]]:
    """The largest ``private`` within, as its only element."""
    found, done = [private()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], private())

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    done.set()
    thread.join()


def forget(path: Path) -> None:
    """Drop the file from the operating system's cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path, size: int) -> float:
    """Seconds to read so many bytes of the file from the disk."""
    forget(path)
    buffer, start = bytearray(1 << 24), time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while size > 0:
            size -= file.readinto(buffer)
    return time.perf_counter() - start


def photographs(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (600, 800, 3), np.uint8)) for _ in range(count)]


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure(name: str, folder: Path, device: str, dtype: torch.dtype | None) -> None:
    profile = get_profile(name)
    standin(name, folder, progress=False)
    path = max((folder / file for file in profile.files()), key=lambda file: file.stat().st_size)
    spgdd.load(profile, root=folder, device=device, dtype=dtype)  # libraries are imported
    forget(path)
    with peak() as memory:
        before, start = private(), time.perf_counter()
        diagnoser = spgdd.load(profile, root=folder, device=device, dtype=dtype)
        for weights in diagnoser.model.vision.parameters():
            weights.flatten()[::512].sum()  # a mapped page is read when it is touched
        synchronise(device)
        seconds = time.perf_counter() - start
    needed = sum(weights.numel() for weights in diagnoser.model.vision.parameters()) * 4
    plain = read(path, needed)
    print(f"{name} on {device}, {next(diagnoser.model.vision.parameters()).dtype}: loaded in {seconds:.1f} s, reading "
          f"{needed / 1e9:.2f} GB takes {plain:.1f} s; memory without mapped pages {memory[0] - before:.2f} GB more "
          f"than before, peak {memory[0]:.2f} GB")  # fmt: skip

    normals, query = photographs(NORMALS), photographs(NORMALS + 1)[-1]
    start = time.perf_counter()
    reference = diagnoser.reference(normals)
    first = diagnoser.diagnose(query, reference)
    print(f"  {NORMALS} normal pictures and the first diagnosis: {time.perf_counter() - start:.2f} s ({first.verdict})")
    laps = []
    for _ in range(TURNS):
        synchronise(device)
        start = time.perf_counter()
        diagnoser.diagnose(query, reference)
        synchronise(device)
        laps.append(time.perf_counter() - start)
    print(f"  a further one: median {1000 * np.median(laps):.0f} ms, best {1000 * min(laps):.0f}")

    if profile.backbone:
        shown = [Picture(str(number), np.asarray(image)) for number, image in enumerate(photographs(PICTURES))]
        task, start = Task("noise", "noise", "noise", shown[:NORMALS], shown), time.perf_counter()
        evaluate(diagnoser, [task], (1,), (0, 1, 2), progress=False)
        seconds = time.perf_counter() - start
        print(f"  evaluation of {PICTURES} with three choices of a normal one: {PICTURES / seconds:.2f} a second")
    if device.startswith("cuda"):
        used, taken = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
        print(f"  GPU memory: {used:.2f} GB used, {taken:.2f} GB taken")
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("profiles", nargs="*", default=["imagebind", "dinov2-small", "dinov2-base"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda text: getattr(torch, text))
    options = parser.parse_args()
    for each in options.profiles:
        measure(each, options.folder, options.device, options.dtype)
