"""Does the notebooks' first cell leave Colab's own packages as they are? Needs a package index; under a minute.

    python scripts/check_colab.py

Lets pip resolve what `pip install -e ".[colab]"` asks for, without installing it, held to the versions that Colab's
GPU runtime brings (colab_runtime.txt). Fails when that is impossible, or when more would be new than Colab lacks.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
LACKING = {"ftfy"}  # what Colab does not have
OF_TORCH = ("nvidia-", "cuda-", "triton")  # Colab's torch is another build, with its own libraries for the GPU
PYTHONS = ("3.12", "3.13")  # of Colab's pinned and its newest runtime


def runtime() -> dict[str, str]:
    """What Colab brings of all that spgdd needs: name as in PyPI's addresses, version."""
    lines = (HERE / "colab_runtime.txt").read_text(encoding="utf-8").splitlines()
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"] + project["optional-dependencies"]["colab"]


def would_be_new(python: str) -> set[str]:
    """Names that pip would add to Colab's runtime. Raises CalledProcessError where the two cannot stand together."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", report,
            "--python-version", python, "--only-binary=:all:", "--target", folder,
            "--constraint", HERE / "colab_runtime.txt", *requirements(),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        chosen = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {canonical(package["metadata"]["name"]) for package in chosen}
    return {name for name in names if not name.startswith(OF_TORCH)} - set(runtime())


def main() -> int:
    status = 0
    for python in PYTHONS:
        new = would_be_new(python)
        print(f"Python {python}: pip adds {', '.join(sorted(new)) or 'nothing'} and changes nothing that Colab brings")
        if new != LACKING:
            print(f"but Colab should lack {', '.join(sorted(LACKING))} alone: mend the extra `colab` in pyproject.toml")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
