"""`spgdd evaluate`: the k-shot protocol over a folder of data sets or over the mini world.

    spgdd evaluate --data data/TADD --subsets MT CFD --shots 0 1 4 --json runs/evaluation.json

With switches of the method (``spgdd.evaluation.ablation``) it measures what each part brings.
"""

import argparse
import csv
import json
from pathlib import Path

MAP = {
    "image AUROC": "image_auroc", "AP": "image_ap", "F1-max": "image_f1_max", "pixel AUROC": "pixel_auroc",
    "AP ": "pixel_ap", "PRO": "pro", "overkill": "map_overkill", "miss": "map_miss", "unsure": "map_unsure",
    "false alarms": "map_above_threshold", "place": "map_place",
}  # fmt: skip
TEXT = {
    "accuracy": "text_accuracy", "balanced": "text_balanced", "overkill": "text_overkill", "miss": "text_miss",
    "unparsed": "text_unparsed", "cut off": "text_cut", "place": "text_place", "kind": "text_kind",
}  # fmt: skip


def add_commands(subparsers) -> argparse.ArgumentParser:
    """Add the `evaluate` command to the sub-parsers of `spgdd`; it sets `run(args) -> exit status`."""
    from spgdd.cli.common import add_model_options

    about = "measure how good the diagnoses are, with k normal pictures"
    parser = subparsers.add_parser("evaluate", help=about, description=about, epilog="All figures are percentages.")
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="a folder of data sets (`spgdd tadd index` lists it) or miniworld")
    add("--subsets", nargs="+", default=[], metavar="NAME", help="only these (of the mini world: families)")
    add("--product", action="append", default=[], metavar="KEY=NAME",
        help='what a subset or product is called, for example MT="magnetic tile"; may be repeated')  # fmt: skip
    add("--shots", nargs="+", type=int, default=[0, 1, 2, 4], metavar="K", help="default: 0 1 2 4")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="shot sets; default: 0 1 2")
    add("--limit", type=int, metavar="N", help="at most N good and N defective pictures of a product")
    add("--draws", type=int, default=5, metavar="N", help="products of each family of the mini world (default: 5)")
    add("--text", action=argparse.BooleanOptionalAction, default=True, help="ask the language model too")
    add("--false-alarm-rate", type=float, default=0.05, metavar="SHARE", help="of the verdicts (default: 0.05)")
    change = "change the model or its references: gates=false, scales=[1,3], budget=1000, tiles=2; may be repeated"
    add("--set", action="append", default=[], metavar="SWITCH=VALUE", help=change)
    add("--ablate", type=Path, metavar="FILE.json", help="evaluate variants: a name to its switches, as of --set")
    add("--json", type=Path, metavar="FILE", help="write every figure and every picture's result")
    add("--csv", type=Path, metavar="FILE", help="write one line per product, number of shots and seed")
    add("--plot", type=Path, metavar="FILE.png", help="draw AUROC over shots beside published figures")
    add_model_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    from spgdd.cli.common import model_options
    from spgdd.evaluation.metrics import summarise
    from spgdd.evaluation.protocol import evaluate, folder_tasks

    names = dict(_pair(text, "--product") for text in args.product)
    settings = {key: _value(value) for key, value in (_pair(text, "--set") for text in args.set)}
    variants = _read_variants(args.ablate) if args.ablate else {"": {}}
    if args.data == "miniworld":
        from miniworld.tasks import miniworld_tasks

        tasks = miniworld_tasks(args.subsets, args.draws, args.limit or 20)
    else:
        tasks = folder_tasks(args.data, args.subsets, names, args.limit)
    runs = []
    for name, switches in variants.items():
        if name:
            print(f"{name}: {switches}", flush=True)
        diagnoser = load_variant(settings | switches, **model_options(args))
        found = evaluate(diagnoser, tasks, args.shots, args.seeds, args.text, args.false_alarm_rate)
        runs += [{"variant": name} | run for run in found]
    rows = []
    for name in variants:
        rows += [{"variant": name} | row for row in summarise([run for run in runs if run["variant"] == name])]
    shown = [row | {"subset": row["variant"]} for row in rows if row["subset"] == "mean"] if args.ablate else rows
    for title, columns in {"maps and their verdicts": MAP, "text": TEXT if args.text else {}}.items():
        if columns:
            print(f"\n{title}, in percent, mean and standard deviation over the shot sets\n{table(shown, columns)}")
    for path in filter(None, (args.json, args.csv, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        about = {name: getattr(args, name) for name in ("data", "profile", "limit", "false_alarm_rate")}
        about |= {"set": settings, "variants": variants}
        text = json.dumps({"settings": about, "summary": rows, "runs": runs}, indent=1, ensure_ascii=False)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.csv:
        write_csv(runs, args.csv)
    if args.plot:
        plot(shown).savefig(args.plot, dpi=120)
    return 0


def load_variant(switches: dict, profile: str, **options):
    """A Diagnoser with a model changed by ``spgdd.evaluation.ablation``."""
    from spgdd.diagnosis import load
    from spgdd.evaluation.ablation import ablate, with_delta
    from spgdd.profiles import get_profile

    switches = dict(switches)
    delta = switches.pop("delta", None)
    diagnoser = load(with_delta(get_profile(profile), delta) if delta else profile, **options)
    if switches:
        ablate(diagnoser.model, **switches)
    return diagnoser


def _pair(text: str, option: str) -> tuple[str, str]:
    from spgdd.errors import SpgddError

    key, equals, name = text.partition("=")
    if not (key and equals and name):
        raise SpgddError(f"{option} takes KEY=VALUE, received {text!r}.")
    return key, name


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_variants(path: Path) -> dict[str, dict]:
    from spgdd.errors import DataError

    try:
        variants = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(variants, dict) or not all(isinstance(value, dict) for value in variants.values()):
        raise DataError(f'{path}: give an object such as {{"full": {{}}, "no gates": {{"gates": false}}}}.')
    return variants


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Summary rows as aligned text; "-" where a figure is not defined."""
    width = max(len(row["subset"]) for row in rows) + 1
    lines = ["shots " + "subset".ljust(width) + "".join(f"{heading.strip():>13}" for heading in columns)]
    for row in rows:
        cells = (cell(row["metrics"].get(metric)) for metric in columns.values())
        lines.append(f"{row['shots']:<6}{row['subset']:<{width}}" + "".join(f"{text:>13}" for text in cells))
    return "\n".join(lines)


def cell(value: dict | None) -> str:
    """ "70.5 ± 1.2" """
    if not value or value["mean"] is None:
        return "-"
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def write_csv(runs: list[dict], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        metrics = list(runs[0]["metrics"])
        keys = ["variant"] * bool(runs[0].get("variant")) + ["subset", "product", "shots", "seed"]
        writer.writerow([*keys, *metrics])
        for run in runs:
            figures = [run["metrics"][metric] for metric in metrics]
            writer.writerow([run[key] for key in keys] + figures)


def plot(rows: list[dict]):
    """A matplotlib figure: image and pixel AUROC over shots, each subset and their mean, beside published ones.

    Published figures are those of the evaluated data sets, else those on MVTec-AD, which is said.
    """
    from matplotlib.figure import Figure

    published = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))["figures"]
    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    shared = {data for data in ("MVTec-AD", "VisA") if data in subsets} or {"MVTec-AD"}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("image_auroc", "pixel_auroc"), strict=True):
        for subset in subsets:
            these = [row for row in rows if row["subset"] == subset and row["metrics"][metric]["mean"] is not None]
            values = [row["metrics"][metric] for row in these]
            bold = {"color": "black", "linewidth": 2.5} if subset == "mean" else {"linewidth": 1, "alpha": 0.7}
            axes.errorbar(
                [row["shots"] for row in these], [v["mean"] for v in values], [v["std"] or 0 for v in values],
                marker="o", capsize=3, label=f"{subset}, this run", **bold,
            )  # fmt: skip
        for line, known in zip((":", "--", "-.") * 2, (f for f in published if f["data"] in shared), strict=False):
            label = f"{known['method']}, published, {known['data']}"
            axes.plot(known["shots"], known[metric], line, color="grey", marker=".", label=label)
        axes.set(xlabel="normal pictures (shots)", ylabel=f"{metric.split('_')[0]} AUROC (%)")
    figure.axes[1].legend(bbox_to_anchor=(1, 1), loc="upper left", fontsize="small")
    return figure
