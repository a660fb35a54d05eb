"""Is this machine ready for the course? Half a minute; the last line says so, exit status 1 if not.

    python scripts/preflight.py      # make preflight installs first

Looks at Python, packages, memory and disk, and diagnoses a picture. Each fault comes with its mend. Needs nothing
installed to say what is missing.
"""

import re
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ROOT / "data/mini/ring"
MEMORY_GB, DISK_GB, SECONDS = 4, 2, 30
INSTALL = f'{sys.executable} -m pip install -e ".[notebooks]"'

Finding = tuple[bool, str, str]  # whether it is well, what was found, and what mends it


def python() -> Iterator[Finding]:
    here = ".".join(map(str, sys.version_info[:3]))
    yield (3, 11) <= sys.version_info < (3, 14), f"Python {here}", "install Python 3.11, 3.12 or 3.13 (docs/install.md)"


def packages() -> Iterator[Finding]:
    """Whatever pyproject.toml asks for and is missing or too old; one line when there is nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [each for each in project["dependencies"] + extras["notebooks"] + extras["colab"] if "spgdd[" not in each]
    faults = [fault for fault in map(fault_of, wanted) if fault]
    yield not faults, f"packages: {', '.join(faults) or f'all {len(wanted)} are there'}", INSTALL


def fault_of(requirement: str) -> str:
    """What is wrong with a package, or ''."""
    name = re.match(r"[\w.-]+", requirement).group()
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"no {name}"
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ""  # a package that others need is missing, too, and is named
    return "" if Requirement(requirement).specifier.contains(found) else f"{name} is {found}, needed: {requirement}"


def memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    yield free >= MEMORY_GB, f"memory: {free:.1f} GB free", f"close programs until {MEMORY_GB} GB are free"


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(ROOT).free / 1e9
    yield free >= DISK_GB, f"disk: {free:.1f} GB free", f"make room: notebooks write up to {DISK_GB} GB under runs/"


def writing() -> Iterator[Finding]:
    trial = ROOT / "runs" / "preflight"
    try:
        trial.mkdir(parents=True, exist_ok=True)
        trial.rmdir()
        yield True, "runs/ can be written to", ""
    except OSError as error:
        yield False, f"runs/ cannot be written to: {error}", "move the checkout to a folder that is yours"


def device() -> Iterator[Finding]:
    import torch

    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, and the course needs none"
    yield True, f"torch {torch.__version__}: {found}", ""


def diagnosis() -> Iterator[Finding]:
    """A chipped ring must be called defective, with its answer in words."""
    import spgdd

    begin = time.perf_counter()
    good, doubtful = sorted((PARTS / "train/good").iterdir()), sorted((PARTS / "test/chipped_edge").iterdir())[0]
    found = spgdd.load("mini").diagnose(doubtful, good, product="ring")
    seconds = time.perf_counter() - begin
    said = f"diagnosis: a chipped ring is {found.verdict}. {found.text}"
    yield found.verdict == "defective", said, "git checkout data pretrained_ckpt/mini"
    yield seconds <= SECONDS, f"diagnosis: {seconds:.0f} s", f"over {SECONDS} s: other programs keep the processor busy"


def main() -> int:
    faults = 0
    for look in (python, disk, writing, packages, memory, device, diagnosis):
        try:
            findings = list(look())
        except Exception as error:  # whatever it is, it is one more thing to mend
            findings = [(False, f"{look.__name__}: {error!r}", "see docs/install.md, else fill in the bug form")]
        for well, found, mend in findings:
            print(f"{'ok  ' if well else 'NO  '} {found}" + ("" if well else f"\n     mend: {mend}"), flush=True)
            faults += not well
        if faults and look is packages:
            break  # the rest needs them
    print("\nReady for the course." if not faults else "\nNot ready: mend what is marked NO, and run this again.")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
