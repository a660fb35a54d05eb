"""`spgdd weights ...`: the weights functions as commands."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from spgdd.profiles import weights_folder
from spgdd.weights import catalog


def add_commands(subparsers) -> argparse.ArgumentParser:
    """Add `weights` to the sub-parsers of `spgdd`; every action sets `run(options)` -> exit status."""
    parser = subparsers.add_parser("weights", help="list, download, verify, merge and rehearse weights")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    profiles, parts = catalog.names()
    everything = f"profiles: {', '.join(profiles)}; parts: {', '.join(parts)}"

    def action(name: str, run, help: str, names: bool = True) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help)
        if names:
            sub.add_argument("names", nargs="+", metavar="NAME", help=everything)
        sub.add_argument("--root", help="weights folder (default: $SPGDD_WEIGHTS or pretrained_ckpt)")
        sub.set_defaults(run=run)
        return sub

    action("list", _list, "every profile and part: what is there", names=False)
    action("show", _show, "files, links, sizes, hashes and licences")
    action("download", _download, "fetch what is missing: resumed, verified, mirrors in turn").add_argument(
        "--yes", action="store_true", help="do not ask; you have read the licences with `show`")
    action("verify", _verify, "read every byte and compare with what is published")
    merge = action("merge-vicuna", _merge, "Vicuna v0 = LLaMA + delta, in little memory", names=False)
    merge.add_argument("size", choices=("7b", "13b"))
    for option, where in (("--base", "llama_ckpt/SIZE"), ("--delta", "vicuna_ckpt/SIZE_delta_v0"),
                          ("--out", "vicuna_ckpt/SIZE_v0")):
        merge.add_argument(option, help=f"folder (default: {where} in the weights folder)")
    check = action("check", _check, "Vicuna talks, PandaGPT sees, the diagnosis model answers", names=False)
    check.add_argument("profile", choices=profiles)
    check.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    check.add_argument("--quantize", choices=("8bit", "4bit"))
    return parser


def _list(args) -> int:
    from spgdd.weights.verify import status

    profiles, bundles = catalog.names()
    for title, names in (("Profiles", profiles), ("Parts", bundles)):
        print(title)
        for name in names:
            rows = status(name, args.root)
            states = ", ".join(sorted({row.state for row in rows}))
            print(f"  {name:<24}{catalog.readable(sum(row.size for row in rows)):>9}  {states}")
    return 0


def _show(args) -> int:
    for bundle in catalog.get_bundles(args.names):
        print(f"{bundle.name}: {bundle.title}, {catalog.readable(bundle.size)}\n  licence: {bundle.licence}\n"
              f"  notebooks: {', '.join(bundle.notebooks)}")
        if not bundle.files:
            print(f"  merged on this machine from {' and '.join(bundle.recipe)}")
        for file in bundle.files:
            known = f"SHA-256 {file.sha256}" if file.sha256 else f"MD5 {file.md5}" if file.md5 else (
                "no hash published" if file.sources else "part of this repository")
            print(f"  {file.path} ({catalog.readable(file.size) if file.size else 'small'}; {known})")
            for source in file.sources:
                print(f"      {source}")
    return 0


def _download(args) -> int:
    from spgdd.weights.download import download
    from spgdd.weights.plan import plan

    todo = plan(args.names, args.root)
    print(todo)
    if todo.files and not args.yes and input("Accept these licences and start? [y/N] ").lower() != "y":
        return 1
    return _print_rows(download(args.names, args.root))


def _verify(args) -> int:
    from spgdd.weights.verify import verify

    return _print_rows(verify(args.names, args.root))


def _merge(args) -> int:
    from spgdd.weights.merge import merge_vicuna

    root = weights_folder(args.root)
    out = Path(args.out or root / f"vicuna_ckpt/{args.size}_v0")
    report = merge_vicuna(args.base or root / f"llama_ckpt/{args.size}",
                          args.delta or root / f"vicuna_ckpt/{args.size}_delta_v0", out)
    print(f"Vicuna v0 is complete in {out}: {len(report['files'])} files, hashes in merge_report.json.")
    return 0


def _check(args) -> int:
    from spgdd.cli.checks import climb

    failed = False
    for rung in climb(args.profile, args.root, device=args.device, quantize=args.quantize):
        print(rung)
        failed = failed or rung.passed is False
    return int(failed)


def _print_rows(rows: Iterable) -> int:
    """Print file states; returns 1 where a file cannot be used."""
    rows = list(rows)
    for row in rows:
        detail = f"  ({row.detail})" if row.detail else ""
        print(f"{row.state:<11}{catalog.readable(row.size):>9}  {row.path}{detail}")
    return int(not all(row.usable for row in rows))
