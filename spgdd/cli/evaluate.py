"""`spgdd evaluate`: the k-shot protocol over a folder of data sets or over the mini world.

    spgdd evaluate --data data/TADD --subsets MT CFD --shots 0 1 4 --json runs/evaluation.json

With switches of the method (``spgdd.evaluation.ablation``) it measures what each part brings.
"""

import json
from pathlib import Path

from typer import Option

from spgdd.cli.common import RATE
from spgdd.errors import DataError, SpgddError
from spgdd.files import whole_file, write_json
from spgdd.profiles import get_profile


def evaluate(
    data: str = Option(help="a folder of data sets (`spgdd tadd index` lists it) or miniworld"),
    subsets: list[str] = Option((), help="only these (of the mini world: families)"),
    product: list[str] = Option((), help='what a subset or product is called, for example MT="magnetic tile"'),
    shots: list[int] = Option((), help="numbers of normal pictures (default: 1 2 4; with words 0 too)"),
    seeds: list[int] = Option((0, 1, 2), help="of the shot sets"),
    limit: int = Option(None, help="at most so many good and so many defective pictures of a product"),
    draws: int = Option(5, help="products of each family of the mini world"),
    text: bool = Option(True, help="ask the language model too"),
    false_alarm_rate: float = RATE,
    switches: list[str] = Option((), "--set", help="gates=false, scales=[1,3], budget=1000, tiles=2: change the model"),
    ablate: Path = Option(None, help="evaluate variants: a .json file of names to their switches, as of --set"),
    json_file: Path = Option(None, "--json", help="write every figure and every picture's result"),
    csv: Path = Option(None, help="write one line per product, number of shots and seed"),
    plot: Path = Option(None, help="draw AUROC over shots beside published figures"),
    **model,
) -> None:
    """Measure how good the diagnoses are, with k normal pictures."""
    from spgdd.evaluation import protocol
    from spgdd.evaluation.metrics import summarise
    from spgdd.evaluation.tables import MAP, TEXT, fewer_masks, table, write_csv

    seen = get_profile(model["profile"])
    shots, text = shots or (0, 1, 2, 4)[not seen.words :], text and model["language"] and seen.language is not None
    names = dict(pair(each, "--product") for each in product)
    common = {key: value_of(value) for key, value in (pair(each, "--set") for each in switches)}
    variants = read_variants(ablate) if ablate else {"": {}}
    if data == "miniworld":
        from miniworld.tasks import miniworld_tasks

        tasks = miniworld_tasks(subsets, draws, limit or 20)
    else:
        tasks = protocol.folder_tasks(data, subsets, names, limit)
    runs, rows = [], []
    for name, changed in variants.items():
        if name:
            print(f"{name}: {changed}", flush=True)
        found = protocol.evaluate(load_variant(common | changed, **model), tasks, shots, seeds, text, false_alarm_rate)
        runs += [{"variant": name} | run for run in found]
        rows += [{"variant": name} | row for row in summarise(found)]
    shown = [row | {"subset": row["variant"]} for row in rows if row["subset"] == "mean"] if ablate else rows
    for title, columns in {"maps and their verdicts": MAP, "text": TEXT if text else {}}.items():
        if columns:
            print(f"\n{title}, in percent, mean and standard deviation over the shot sets\n{table(shown, columns)}")
    for line in fewer_masks(runs):
        print(line)
    if json_file:
        about = {"data": data, "profile": model["profile"], "limit": limit, "false_alarm_rate": false_alarm_rate}
        about |= {"set": common, "variants": variants}
        write_json(json_file, {"settings": about, "summary": rows, "runs": runs}, indent=1)
    if csv:
        write_csv(csv, runs)
    if plot:
        from spgdd.ui.plots import plot_shots

        with whole_file(plot) as file:
            plot_shots(shown).savefig(file, dpi=120, format=plot.suffix[1:] or "png")


def load_variant(switches: dict, profile: str, **options):
    """A Diagnoser with a model changed by ``spgdd.evaluation.ablation``."""
    from spgdd.diagnosis import load
    from spgdd.evaluation.ablation import ablate, with_delta

    delta = switches.pop("delta", None)
    diagnoser = load(profile=with_delta(get_profile(profile), delta) if delta else profile, **options)
    if switches:
        ablate(diagnoser.model, **switches)
    return diagnoser


def pair(text: str, option: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not (key and value):
        raise SpgddError(f"{option} takes KEY=VALUE, received {text!r}.")
    return key, value


def value_of(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_variants(path: Path) -> dict[str, dict]:
    try:
        variants = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(variants, dict) or not all(isinstance(value, dict) for value in variants.values()):
        raise DataError(f'{path}: give an object such as {{"full": {{}}, "no gates": {{"gates": false}}}}.')
    return variants
