"""`spgdd diagnose`: pictures in, a line for each out."""

import json
from pathlib import Path

from typer import Argument, Option

from spgdd import __version__
from spgdd.cli.common import RATE, TILES, complain
from spgdd.errors import ImageError, SpgddError
from spgdd.files import write_json


def diagnose(
    images: list[str] = Argument(help="pictures, folders of pictures, or quoted patterns"),
    normal: list[str] = Option((), help="pictures of good parts of the same product; without, nothing is calibrated"),
    memory: str = Option(None, help="what `spgdd memory build` made of such pictures, instead of --normal"),
    tiles: int = TILES,
    product: str = Option(None, help='what is seen, for example "metal nut"'),
    question: str = Option(None, help="default: is there any anomaly in the image?"),
    false_alarm_rate: float = RATE,
    max_new_tokens: int = Option(128, help="longest answer"),
    json_file: str = Option(None, "--json", help="write the results as JSON; - prints it and nothing else"),
    report: str = Option(None, help="write a page, result.html, with pictures and heat maps"),
    timings: bool = Option(False, "--timings", help="put the seconds per stage into the JSON"),
    **model,
) -> int:
    """Compare pictures with normal ones. A line for each: verdict, score, regions, answer.

    A bad picture costs a line on stderr and the exit status, not the others.
    """
    from tqdm import tqdm

    from spgdd.diagnosis import load
    from spgdd.report import Report

    for target in (json_file, report):
        if target and Path(target).is_dir():
            raise SpgddError(f"{target}: a folder; name the file to write.")
    if memory and (normal or tiles):
        raise SpgddError("--memory holds the normal pictures and the tiles: leave --normal and --tiles out.")
    errors, results, page = [], [], Report() if report else None
    found = pictures(images, errors)
    normals = pictures(normal, errors, check=True)
    if normal and not normals:
        raise ImageError("none of the normal pictures can be used, so nothing was diagnosed.")
    if found:
        diagnoser, reference = load(**model), None
        if memory:
            reference = diagnoser.load_reference(memory)
        elif normals:
            reference = diagnoser.reference(normals, product or "object", tiles=tiles)
    try:
        for image in tqdm(found, unit="picture", disable=None if len(found) > 1 else True):
            try:
                diagnosis = diagnoser.diagnose(image, reference, product, question, max_new_tokens=max_new_tokens,
                                               false_alarm_rate=false_alarm_rate, tiles=tiles)  # fmt: skip
            except ImageError as error:
                note(errors, image, error)
                continue
            results.append(diagnosis.to_dict(timings))
            if page:
                page.add(diagnosis)
            if json_file != "-":
                tqdm.write(summary(diagnosis))
    finally:  # whatever ends the batch, what is done is kept
        known = {"memory": memory} if memory else {"normals": [str(path) for path in normals]}
        table = {"spgdd": __version__, "profile": model["profile"], **known, "results": results, "errors": errors}
        if json_file == "-":
            print(json.dumps(table, indent=2, ensure_ascii=False))
        elif json_file:
            write_json(json_file, table)
        if page:
            page.errors += [error["error"] for error in errors]
            page.save(report)
    return int(bool(errors))


def summary(diagnosis) -> str:
    """A diagnosis in one line: picture, verdict, score and threshold, regions, answer."""
    from spgdd.report import number, places

    verdict = diagnosis.verdict if diagnosis.calibration.scores else f"{diagnosis.verdict} (not calibrated)"
    numbers = f"{number(diagnosis.score)} / {number(diagnosis.threshold)}"
    notes = [f"({note})" for note in diagnosis.notes]
    text = " ".join(diagnosis.text.split())
    return "  ".join([diagnosis.image, verdict, numbers, places(diagnosis), text, *notes])


def pictures(paths: list[str], errors: list[dict], check: bool = False) -> list[Path]:
    """The pictures that the paths name; what is not there (with ``check``: not readable) becomes an error."""
    from spgdd.images import list_images, read_image

    found = []
    for path in paths:
        try:
            files = list_images(path)
        except ImageError as error:
            note(errors, path, error)
            continue
        for file in files:
            try:
                if check:
                    read_image(file)
                found.append(file)
            except ImageError as error:
                note(errors, file, error)
    return found


def note(errors: list[dict], image: str | Path, error: ImageError) -> None:
    errors.append({"image": str(image), "error": str(error)})
    complain(error)
