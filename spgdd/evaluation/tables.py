"""Figures of an evaluation as text, as CSV, and published ones to set beside them."""

import json
from pathlib import Path

import yaml

from spgdd.files import write_csv

COLUMNS = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8"))
MAP, TEXT = COLUMNS["map"], COLUMNS["text"]  # heading of a column: its metric
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))["figures"]


def report(rows: list[dict], runs: list[dict], text: bool) -> list[str]:
    """Lines of text: the figures of maps and verdicts, those of the ``text``, and what they are without."""
    lines = []
    for title, columns in {"maps and their verdicts": MAP, **({"text": TEXT} if text else {})}.items():
        lines += ["", f"{title}, in percent, mean and standard deviation over the shot sets"]
        lines += table(rows, columns).split("\n")
    return lines + fewer_masks(runs)


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows of ``summarise`` as aligned text; "-" where a figure is not defined."""
    width = max(len(row["subset"]) for row in rows) + 1
    lines = ["shots " + "subset".ljust(width) + "".join(f"{heading.strip():>13}" for heading in columns)]
    for row in rows:
        cells = (_cell(row["metrics"].get(metric)) for metric in columns.values())
        lines.append(f"{row['shots']:<6}{row['subset']:<{width}}" + "".join(f"{text:>13}" for text in cells))
    return "\n".join(lines)


def fewer_masks(runs: list[dict]) -> list[str]:
    """A line for each product whose figures of pixels and places are over a part of its defective pictures."""
    notes = {}
    for run in runs:
        bad = [picture for picture in run["pictures"] if picture["kind"] != "good"]
        if without := sum(not picture["places"] for picture in bad):
            notes[run["subset"], run["product"]] = (
                f"{run['subset']}/{run['product']}: pixels and places of {len(bad) - without} of {len(bad)} defective "
                "pictures; the others have no mask"
            )
    return list(notes.values())


def _cell(value: dict | None) -> str:
    """ "70.5 ± 1.2" """
    if not value or value["mean"] is None:
        return "-"
    return f"{value['mean']:.1f}" + ("" if value["std"] is None else f" ± {value['std']:.1f}")


def write_runs(path: str | Path, runs: list[dict]) -> Path:
    """Write a line for each run of ``evaluate``."""
    keys = ["variant"] * bool(runs[0].get("variant")) + ["subset", "product", "shots", "seed"]
    metrics = list(runs[0]["metrics"])
    rows = ([*(run[key] for key in keys), *(run["metrics"][metric] for metric in metrics)] for run in runs)
    return write_csv(path, [*keys, *metrics], rows)
