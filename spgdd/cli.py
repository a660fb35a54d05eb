"""The command ``spgdd``: one sub-command per job. Nothing heavy is imported before a job starts.

    spgdd diagnose part.png --normal good/ --product "metal nut" --json result.json --report result.html

Exit status: 0 all well, 1 something could not be done (a line on stderr says what), 2 wrong usage.
"""

import argparse
import io
import os
import sys
from pathlib import Path

from spgdd import __version__
from spgdd.errors import ImageError, SpgddError
from spgdd.evaluation.commands import add_commands as add_evaluate
from spgdd.memory_commands import add_commands as add_memory
from spgdd.tadd.commands import add_commands as add_tadd
from spgdd.training.commands import add_commands as add_train
from spgdd.weights.commands import add_commands as add_weights


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="spgdd", description="Find, show and explain product defects.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it before all else
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_diagnose, add_memory, add_evaluate, add_train, add_weights, add_tadd):
        add(commands).add_argument("--debug", action="store_true", help="show where an error comes from")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        return options.run(options)
    except SpgddError as error:
        if options.debug:
            raise
        complain(error)
        return 1
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:  # whoever reads stdout, `head` for example, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def complain(message) -> None:
    print(f"spgdd: {message}", file=sys.stderr)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, from where, on what."""
    add = parser.add_argument
    add("--profile", default="mini", help="mini (default), anomalygpt-7b, spgdd-7b or spgdd-13b")
    add("--root", type=Path, metavar="DIR", help="folder of the weights (default: pretrained_ckpt)")
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    add("--quantize", choices=("8bit", "4bit"), help="shrink the language model on a GPU (needs bitsandbytes)")


def model_options(options: argparse.Namespace) -> dict:
    """What ``add_model_options`` read, as ``spgdd.load`` takes it."""
    return {name: getattr(options, name) for name in ("profile", "root", "device", "quantize")}


def add_diagnose(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "diagnose", help="diagnose pictures",
        description="Compare pictures with normal ones. A line for each: verdict, score, regions, answer.",
        epilog='example: spgdd diagnose parts/ --normal good/ --product "metal nut" --report result.html',
    )  # fmt: skip
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a picture, a folder of pictures or a quoted pattern")
    good = "pictures of good parts of the same product; without any, verdicts are not calibrated"
    add("--normal", nargs="+", action="extend", default=[], metavar="DIR_OR_FILE", help=good)
    add("--memory", metavar="FILE", help="what `spgdd memory build` made of such pictures, instead of --normal")
    add("--tiles", type=int, metavar="N", help="see pictures also in N x N parts: small defects in large pictures")
    add("--product", metavar="NAME", help='what is seen, for example "metal nut"')
    add("--question", metavar="TEXT", help="default: is there any anomaly in the image?")
    share = "share of good parts that may exceed the threshold (default: 0.05)"
    add("--false-alarm-rate", type=_rate, default=0.05, metavar="SHARE", help=share)
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    add("--json", metavar="FILE", help="write the results as JSON; - prints it and nothing else")
    add("--report", metavar="FILE.html", help="write a page with pictures and heat maps")
    add("--timings", action="store_true", help="put the seconds per stage into the JSON")
    add_model_options(parser)
    parser.set_defaults(run=diagnose)
    return parser


def diagnose(options: argparse.Namespace) -> int:
    """Diagnose all pictures; a bad one costs a line on stderr and the exit status, not the others."""
    from tqdm import tqdm

    from spgdd.diagnosis import load

    for target in (options.json, options.report):
        if target and Path(target).is_dir():
            raise SpgddError(f"{target}: a folder; name the file to write.")
    if options.memory and (options.normal or options.tiles):
        raise SpgddError("--memory holds the normal pictures and the tiles: leave --normal and --tiles out.")
    errors, results, reported = [], [], []
    images = _pictures(options.images, errors)
    normals = _pictures(options.normal, errors, check=True)
    if options.normal and not normals:
        raise ImageError("none of the normal pictures can be used, so nothing was diagnosed.")
    if images:
        diagnoser = load(**model_options(options))
        reference = None
        if options.memory:
            reference = diagnoser.load_reference(options.memory)
        elif normals:
            reference = diagnoser.reference(normals, options.product or "object", tiles=options.tiles)
    try:
        for image in tqdm(images, unit="picture", disable=None if len(images) > 1 else True):
            try:
                found = diagnoser.diagnose(
                    image, reference, options.product, options.question,
                    max_new_tokens=options.max_new_tokens, false_alarm_rate=options.false_alarm_rate,
                    tiles=options.tiles,
                )  # fmt: skip
            except ImageError as error:
                _note(errors, image, error)
                continue
            results.append(found.to_dict(options.timings))
            if options.report:
                reported.append(found)
            if options.json != "-":
                tqdm.write(summary(found))
    finally:  # whatever ends the batch, what is done is kept
        _write(options, normals, results, errors, reported)
    return 1 if errors else 0


def summary(diagnosis) -> str:
    """A diagnosis in one line: picture, verdict, score and threshold, regions, answer."""
    from spgdd.report import places

    verdict = diagnosis.verdict if diagnosis.calibration.scores else f"{diagnosis.verdict} (not calibrated)"
    numbers = f"{diagnosis.score:.3f} / {diagnosis.threshold:.3f}"
    notes = [f"({note})" for note in diagnosis.notes]
    text = " ".join(diagnosis.text.split())
    return "  ".join([diagnosis.image, verdict, numbers, places(diagnosis), text, *notes])


def _write(options: argparse.Namespace, normals: list, results: list, errors: list, reported: list) -> None:
    import json

    from spgdd.report import save_report, write_text

    known = {"memory": options.memory} if options.memory else {"normals": [str(path) for path in normals]}
    table = {"spgdd": __version__, "profile": options.profile, **known, "results": results, "errors": errors}
    text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
    elif options.json:
        write_text(options.json, text)
    if options.report:
        save_report(options.report, reported, [error["error"] for error in errors])


def _pictures(paths: list[str], errors: list[dict], check: bool = False) -> list[Path]:
    """The pictures that the paths name; what is not there (with ``check``: not readable) becomes an error."""
    from spgdd.images import list_images, read_image

    found = []
    for path in paths:
        try:
            files = list_images(path)
        except ImageError as error:
            _note(errors, path, error)
            continue
        for file in files:
            try:
                if check:
                    read_image(file)
                found.append(file)
            except ImageError as error:
                _note(errors, file, error)
    return found


def _note(errors: list[dict], image: str | Path, error: ImageError) -> None:
    errors.append({"image": str(image), "error": str(error)})
    complain(error)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 0.5:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 0.5")
    return value
