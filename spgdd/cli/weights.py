"""`spgdd weights`: the files of a profile, found, fetched, proved, merged and tried."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from typer import Argument, Option

from spgdd.cli.common import DEVICE, LANGUAGE, QUANTIZE, ROOT, accepted, say
from spgdd.profiles import weights_folder
from spgdd.weights import catalog

PROFILES, PARTS = catalog.names()
NAMES = Argument(help=f"profiles: {', '.join(PROFILES)}; parts: {', '.join(PARTS)}")


def show_states(root: Path = ROOT) -> None:
    """Every profile and part: what is there."""
    from spgdd.weights.verify import status

    for title, names in (("Profiles", PROFILES), ("Parts", PARTS)):
        say(title)
        for name in names:
            rows = status(name, root)
            states = ", ".join(sorted({row.state for row in rows}))
            say(f"  {name:<24}{catalog.readable(sum(row.size for row in rows)):>9}  {states}")


def show(names: list[str] = NAMES, language: bool = LANGUAGE) -> None:
    """Files, links, sizes, hashes and licences."""
    for bundle in catalog.get_bundles(names if language else catalog.without_language(names)):
        say(f"{bundle.name}: {bundle.title}, {catalog.readable(bundle.size)}", f"  licence: {bundle.licence}",
            f"  notebooks: {', '.join(bundle.notebooks)}")  # fmt: skip
        if not bundle.files:
            say(f"  merged on this machine from {' and '.join(bundle.recipe)}")
        for file in bundle.files:
            known = f"SHA-256 {file.sha256}" if file.sha256 else f"MD5 {file.md5}" if file.md5 else (
                "no hash published" if file.sources else "part of this repository")
            size = catalog.readable(file.size) if file.size else "small"
            say(f"  {file.path} ({size}; {known})", *(f"      {source}" for source in file.sources))


def download(
    names: list[str] = NAMES,
    yes: bool = Option(False, "--yes", help="do not ask; you have read the licences with `show`"),
    root: Path = ROOT,
    language: bool = LANGUAGE,
) -> int:
    """Fetch what is missing: resumed, verified, mirrors in turn."""
    from spgdd.weights import download, plan

    names = names if language else catalog.without_language(names)
    todo = plan.plan(names, root)
    say(*str(todo).splitlines())
    if todo.files and not yes and not accepted("Accept these licences and start?"):
        return 1
    return _print_rows(download.download(names, root))


def verify(names: list[str] = NAMES, root: Path = ROOT, language: bool = LANGUAGE) -> int:
    """Read every byte and compare with what is published."""
    from spgdd.weights.verify import verify

    return _print_rows(verify(names if language else catalog.without_language(names), root))


def merge_vicuna(
    size: Literal["7b", "13b"],
    base: Path = Option(None, help="folder of LLaMA (default: llama_ckpt/SIZE in the weights folder)"),
    delta: Path = Option(None, help="folder of the delta (default: vicuna_ckpt/SIZE_delta_v0 there)"),
    out: Path = Option(None, help="folder to write (default: vicuna_ckpt/SIZE_v0 there)"),
    root: Path = ROOT,
) -> None:
    """Vicuna v0 = LLaMA + delta, in little memory."""
    from spgdd.weights.merge import merge_vicuna

    root = weights_folder(root)
    out = out or root / f"vicuna_ckpt/{size}_v0"
    report = merge_vicuna(base or root / f"llama_ckpt/{size}", delta or root / f"vicuna_ckpt/{size}_delta_v0", out)
    say(f"Vicuna v0 is complete in {out}: {len(report['files'])} files, hashes in merge_report.json.")


def check(
    profile: Literal[tuple(PROFILES)],
    root: Path = ROOT,
    device: str = DEVICE,
    quantize: Literal["8bit", "4bit"] = QUANTIZE,
) -> int:
    """Vicuna talks, PandaGPT sees, the diagnosis model answers."""
    from spgdd.cli.checks import run_checks

    failed = False
    for each in run_checks(profile, root, device=device, quantize=quantize):
        say(*str(each).splitlines())
        failed = failed or each.passed is False
    return int(failed)


def _print_rows(rows: Iterable) -> int:
    """Print file states; returns 1 where a file cannot be used."""
    rows = list(rows)
    for row in rows:
        detail = f"  ({row.detail})" if row.detail else ""
        say(f"{row.state:<11}{catalog.readable(row.size):>9}  {row.path}{detail}")
    return int(not all(row.usable for row in rows))
