"""The prior of spgdd.calibration, measured on training families, and the false alarms that follow from it.

    python benchmarks/calibration.py train [PROFILE]          # ten minutes on two CPU cores
    python benchmarks/calibration.py held-out [PROFILE]
    python benchmarks/calibration.py DIR [PROFILE]            # a folder of data sets

The others show whether the promise is kept on families that no training saw, and on photographs; nothing is chosen
on those.
"""

import sys
from dataclasses import replace

import numpy as np
from scipy import optimize, special, stats

import spgdd
from miniworld.tasks import miniworld_tasks
from miniworld.world import FAMILIES, HELD_OUT_FAMILIES
from spgdd.calibration import PRIORS, Calibration, upper_bound
from spgdd.evaluation.protocol import evaluate, folder_tasks

RATES = (0.01, 0.05, 0.1)
SHOTS, SEEDS = (1, 2, 4, 8), (0, 1, 2)
PRODUCTS = 1  # of each family
GOOD = 24  # pictures of a product that no reference knows; of photographs PHOTOGRAPHS
PHOTOGRAPHS = 100


def measure(which: str, profile: str) -> list[tuple[int, str, Calibration, np.ndarray]]:
    """Shots, family or subset, calibration and the scores of unseen good pictures, of each product and shot set."""
    if which in ("train", "held-out"):
        families = [name for name in FAMILIES if (name in HELD_OUT_FAMILIES) == (which == "held-out")]
        tasks, count = miniworld_tasks(families, PRODUCTS, GOOD), GOOD
    else:
        tasks, count = folder_tasks(which, limit=PHOTOGRAPHS), PHOTOGRAPHS
    tasks = [replace(task, queries=[p for p in task.queries if p.kind == "good"][:count]) for task in tasks]
    rows = []
    for run in evaluate(spgdd.load(profile), tasks, SHOTS, SEEDS, text=False):
        about = {name: tuple(v) if isinstance(v, list) else v for name, v in run["calibration"].items()}
        rows.append(
            (run["shots"], run["subset"], Calibration(**about), np.array([p["score"] for p in run["pictures"]]))
        )
    return rows


def fit(rows: list[tuple]) -> None:
    """Print the prior under which the unseen pictures are likeliest, given the scores of the known ones."""
    largest = rows[0][2].largest

    def odds(scores) -> np.ndarray:
        return special.logit(np.clip(np.asarray(scores) / largest, 1e-6, 1 - 1e-6))

    pairs = {one: [(odds(c.scores), odds(x)) for k, _, c, x in rows if (k == 1) == one] for one in (True, False)}

    def surprise(logs) -> float:
        spread, weight = np.exp(logs)
        total = 0
        for y, x in pairs[False]:
            freedom = len(y) - 1 + weight
            variance = (((y - y.mean()) ** 2).sum() + weight * spread**2) / freedom * (1 + 1 / len(y))
            total -= stats.t.logpdf(x, freedom, y.mean(), np.sqrt(variance)).mean()
        return total

    spread, weight = np.exp(optimize.minimize(surprise, (-1.0, 1.0), method="Nelder-Mead").x)
    moved = np.array([x.mean() - y.mean() for y, x in pairs[True]])
    print(f"fitted  spread {spread:.3f}  weight {weight:.1f}  shift {moved.mean():.3f}  error {moved.std(ddof=1):.3f}")
    print(f"in use  {PRIORS[largest]}")


def alarms(rows: list[tuple], rate: float) -> float:
    """Percentage of unseen normal pictures above the threshold, mean over the runs."""
    return 100 * np.mean([(x > upper_bound(c.scores, c.pictures, rate, c.largest)[0]).mean() for _, _, c, x in rows])


def main(which: str, profile: str = "mini") -> None:
    rows = measure(which, profile)
    fit(rows)
    print("false alarms in percent; asked:" + "".join(f"{100 * rate:8g}" for rate in RATES))
    for shots in SHOTS:
        those = [row for row in rows if row[0] == shots]
        groups = {name: [row for row in those if row[1] == name] for name in dict.fromkeys(row[1] for row in those)}
        for name, group in (groups | {"all": those}).items():
            print(f"  {shots:2} shots  {name:<22}" + "".join(f"{alarms(group, rate):8.1f}" for rate in RATES))


if __name__ == "__main__":
    main(*sys.argv[1:])
