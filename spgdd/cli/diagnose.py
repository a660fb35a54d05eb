"""`spgdd diagnose`: pictures in, a line for each out."""

from contextlib import ExitStack

from typer import Argument, Option

from spgdd import __version__
from spgdd.cli.common import RATE, TILES, complain, note, pictures, save_json
from spgdd.errors import ImageError, SpgddError, printable
from spgdd.files import check_outputs


def diagnose(
    images: list[str] = Argument(help="pictures, folders of pictures, or quoted patterns"),
    normal: list[str] = Option((), help="pictures of good parts of the same product; without, nothing is calibrated"),
    memory: str = Option(None, help="what `spgdd memory build` made of such pictures, instead of --normal"),
    tiles: int = TILES,
    product: str = Option(None, help='what is seen, for example "metal nut"'),
    question: str = Option(None, help="default: is there any anomaly in the image?"),
    false_alarm_rate: float = RATE,
    max_new_tokens: int = Option(128, help="longest answer"),
    json_file: str = Option(None, "--json", help="write the results, result.json; - prints them and nothing else"),
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

    if memory and (normal or tiles):
        raise SpgddError("--memory holds the normal pictures and the tiles: leave --normal and --tiles out.")
    errors = []
    found = pictures(images, errors)
    normals = pictures(normal, errors, check=True)
    if normal and not normals:
        raise ImageError("none of the normal pictures can be used, so nothing was diagnosed.")
    files = [(json_file if json_file != "-" else None, [".json"]), (report, [".html", ".htm"])]
    check_outputs(files, [*found, *normals, memory])
    if found:
        diagnoser, reference = load(**model), None
        if memory:
            reference = diagnoser.load_reference(memory)
        elif normals:
            reference = diagnoser.reference(normals, product or "object", tiles=tiles)
    known = {"memory": memory} if memory else {"normals": [str(path) for path in normals]}
    table = {"spgdd": __version__, "profile": model["profile"], **known, "results": [], "errors": errors}
    page = Report()
    with ExitStack() as outputs:  # whatever ends the batch, what is done is kept
        if report:
            outputs.callback(lambda: page.save(report))
            outputs.callback(lambda: page.errors.extend(error["error"] for error in errors))
        if json_file:
            outputs.callback(lambda: save_json(json_file, table))
        for image in tqdm(found, unit="picture", disable=None if len(found) > 1 else True):
            try:
                diagnosis = diagnoser.diagnose(image, reference, product, question, max_new_tokens=max_new_tokens,
                                               false_alarm_rate=false_alarm_rate, tiles=tiles)  # fmt: skip
            except ImageError as error:
                note(errors, image, error)
                continue
            if json_file != "-":
                tqdm.write(printable(summary(diagnosis)))
            table["results"].append(diagnosis.to_dict(timings))
            if report:
                page.add(diagnosis)
    if errors:
        complain(f"{len(errors)} file(s) could not be used.")
    return int(bool(errors))


def summary(diagnosis) -> str:
    """A diagnosis in one line: picture, verdict, score and threshold, regions, answer."""
    from spgdd.report import number, places

    verdict = diagnosis.verdict if diagnosis.calibration.scores else f"{diagnosis.verdict} (not calibrated)"
    numbers = f"{number(diagnosis.score)} / {number(diagnosis.threshold)}"
    notes = [f"({note})" for note in diagnosis.notes]
    text = " ".join(diagnosis.text.split())
    return "  ".join([diagnosis.image, verdict, numbers, places(diagnosis), text, *notes])
