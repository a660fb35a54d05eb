"""Photographs of the mini world a second, as training draws them: half of each product good, half damaged.

    python benchmarks/mini_world.py [THREADS]      # default 2; 8 pictures of each family, the best of 5 rounds

Measured on two cores: 163 images/s with half of them good, 334 all good, 136 all damaged; the first
picture, with the noise atlas, takes 1.0 s. Other work on the same cores costs more than its share.
"""

import os
import sys
import time

import torch

from miniworld import FAMILIES, photograph, possible_types

COUNT, ROUNDS = 8, 5


def seconds(family: str, share_good: float) -> float:
    """The best of ROUNDS for COUNT pictures of a family, defect types at random."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(2**31, (2, COUNT), generator=generator)
    possible = torch.tensor(possible_types(family))
    types = possible[torch.randint(len(possible), (COUNT,), generator=generator)]
    types[: round(share_good * COUNT)] = -1
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        photograph(family, *seeds, types)
        times.append(time.perf_counter() - begin)
    return min(times)


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    begin = time.perf_counter()
    photograph("nut", *torch.zeros(3, 1, dtype=torch.int64))
    print(f"first picture, with the noise atlas: {time.perf_counter() - begin:.1f} s")
    for name, share_good in (("half of them good", 0.5), ("all good", 1.0), ("all damaged", 0.0)):
        times = {family: seconds(family, share_good) for family in FAMILIES}
        slowest = max(times, key=times.get)
        rate = COUNT * len(times) / sum(times.values())
        print(f"{name}: {rate:.0f} images/s; slowest {slowest}, {COUNT / times[slowest]:.0f}")
    print(f"{threads} threads, load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or [2]))
