"""Time of a 1-shot evaluation without text against that of encoding its pictures alone.

    python benchmarks/evaluation.py DIR [LIMIT]

DIR holds data sets in MVTec's layout; at most LIMIT good and LIMIT defective pictures of a product are used.
"""

import sys
import time
from dataclasses import replace

import torch

import spgdd
from spgdd.evaluation.protocol import evaluate, folder_tasks, load_batches


def clocks(work) -> tuple[float, float]:
    """Seconds on the wall and of the processor that ``work()`` takes."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main(folder: str, limit: int | None) -> None:
    diagnoser, tasks = spgdd.load("mini"), folder_tasks(folder, limit=limit)

    @torch.inference_mode()
    def encode():
        for task in tasks:
            unmarked = [replace(picture, mask=None) for picture in task.queries]
            for batch in load_batches(unmarked, diagnoser.model.profile):
                diagnoser.model.look([loaded.pixels for loaded in batch])

    encode()  # warms the file cache
    alone = clocks(encode)
    whole = clocks(lambda: evaluate(diagnoser, tasks, (1,), (0,), text=False))
    for clock, first, second in zip(("wall", "processor"), alone, whole, strict=True):
        print(f"{clock}: encoding alone {first:.1f} s, evaluation {second:.1f} s, ratio {second / first:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
