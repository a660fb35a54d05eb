"""A memory of 100 normal pictures under a budget against one of 4: time of a query, AUROC on held-out families.

    python benchmarks/memory.py            # ten minutes on two CPU cores

Prints the median time of a query's map with each, and the figures of the whole evaluation.
"""

import statistics
import sys
import time

import torch

import spgdd
from miniworld.tasks import miniworld_tasks
from spgdd.evaluation.ablation import ablate
from spgdd.evaluation.metrics import summarise
from spgdd.evaluation.protocol import evaluate, load_batches

BUDGET = 1024  # entries per depth and scale: the patches of four pictures


def main(products: int) -> None:
    torch.set_num_threads(2)
    diagnoser = spgdd.load("mini")
    ablate(diagnoser.model, budget=BUDGET)
    tasks = miniworld_tasks(products=products, limit=20, normals=100)
    few, many = (diagnoser.reference([p.source for p in tasks[0].normals[:count]], tasks[0].name) for count in (4, 100))
    (batch,) = load_batches(tasks[0].queries[:1], diagnoser.model.profile)
    (seen,) = diagnoser.model.look([batch[0].pixels])
    laps = {4: [], 100: []}
    with torch.inference_mode():
        for _ in range(60):  # in turns, so that other load hits both
            for count, reference in ((4, few), (100, many)):
                start = time.perf_counter()
                diagnoser.model.evidence(seen.patches[0], tasks[0].name, reference.bank).map()
                laps[count].append(time.perf_counter() - start)
    for count, reference in ((4, few), (100, many)):
        seconds = statistics.median(laps[count])
        print(f"{count:3} normals: {reference.bank.tokens.shape[2]} entries, a map takes {1000 * seconds:.1f} ms")
    print(f"ratio {statistics.median(laps[100]) / statistics.median(laps[4]):.2f}")
    for row in summarise(evaluate(diagnoser, tasks, (4, 100), (0,), text=False)):
        figures = {name: round(row["metrics"][name]["mean"], 1) for name in ("image_auroc", "pixel_auroc", "pro")}
        print(f"{row['shots']:3} normals  {row['subset']:<8} {figures}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
