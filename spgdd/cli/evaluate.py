"""`spgdd evaluate`: the k-shot protocol over a folder of data sets or over the mini world.

    spgdd evaluate --data data/TADD --subsets MT CFD --shots 0 1 4 --json runs/evaluation.json

With switches of the method (``spgdd.evaluation.ablation``) it measures what each part brings.
"""

import json
from contextlib import ExitStack
from pathlib import Path

from typer import Option

from spgdd.cli.common import RATE, say
from spgdd.errors import SpgddError
from spgdd.files import check_outputs, whole_file, write_json
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
    from spgdd.evaluation.ablation import load_variant, read_variants
    from spgdd.evaluation.metrics import summarise
    from spgdd.evaluation.protocol import evaluate_each, folder_tasks
    from spgdd.evaluation.tables import report, write_runs

    seen = get_profile(model["profile"])
    shots, text = shots or (0, 1, 2, 4)[not seen.words :], text and model["language"] and seen.language is not None
    check_outputs([(json_file, [".json"]), (csv, [".csv"]), (plot, [".png", ".pdf", ".svg", ".jpg"])], [ablate])
    names = dict(pair(each, "--product") for each in product)
    common = {key: value_of(value) for key, value in (pair(each, "--set") for each in switches)}
    variants = read_variants(ablate) if ablate else {"": {}}
    if data == "miniworld":
        from miniworld.tasks import miniworld_tasks

        tasks = miniworld_tasks(subsets, draws, limit or 20)
    else:
        tasks = folder_tasks(data, subsets, names, limit, say)
    about = {"data": data, "profile": model["profile"], "limit": limit, "false_alarm_rate": false_alarm_rate}
    rows, runs = [], []
    table = {"settings": about | {"set": common, "variants": variants}, "runs": runs, "summary": rows}

    def shown() -> list[dict]:
        return [row | {"subset": row["variant"]} for row in rows if row["subset"] == "mean"] if ablate else rows

    with ExitStack() as outputs:  # whatever ends the evaluation, each of them gets what is done
        outputs.callback(lambda: runs and plot and save_plot(plot, shown()))
        outputs.callback(lambda: runs and csv and write_runs(csv, runs))
        outputs.callback(lambda: runs and say(*report(shown(), runs, text)))
        outputs.callback(lambda: json_file and write_json(json_file, table))
        for name, changed in variants.items():
            if name:
                say(f"{name}: {changed}")
            first = len(runs)
            try:
                # No name for the model: it leaves the memory before the next variant's is loaded.
                for run in evaluate_each(load_variant(common | changed, **model), tasks, shots, seeds, text,
                                         false_alarm_rate):  # fmt: skip
                    runs.append({"variant": name} | run)
            finally:
                rows += [{"variant": name} | row for row in summarise(runs[first:])]


def save_plot(path: Path, rows: list[dict]) -> None:
    from spgdd.ui.plots import plot_shots

    with whole_file(path) as file:
        plot_shots(rows).savefig(file, dpi=120, format=path.suffix[1:].lower())


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
