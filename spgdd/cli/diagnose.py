"""`spgdd diagnose`: pictures in, a line for each out."""

import argparse
import sys
from pathlib import Path

from spgdd import __version__
from spgdd.cli.common import add_model_options, complain, model_options
from spgdd.errors import ImageError, SpgddError


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
