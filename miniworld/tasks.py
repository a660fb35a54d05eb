"""Products of the mini world to evaluate on."""

import zlib
from collections.abc import Sequence

import torch

from miniworld import world
from spgdd.data.grammar import TYPES, VOCABULARY
from spgdd.errors import DataError
from spgdd.evaluation.protocol import Picture, Task

BATCH = 32  # photographs taken at once


def miniworld_tasks(families: Sequence[str] = (), products: int = 5, limit: int = 20, normals: int = 16) -> list[Task]:
    """Generated products that no training run has seen: ``products`` of each family, the same on every call.

    ``families``: by default those held out from training. ``limit`` pictures of each product are drawn good
    and as many damaged (one too faint to be seen counts as good), ``normals`` more are there to draw shots
    from. Of the defect types, the held-out ones occur but are not asked for by name.
    """
    if unknown := set(families) - set(world.FAMILIES):
        raise DataError(f"no family {', '.join(sorted(unknown))}; the mini world has {', '.join(world.FAMILIES)}.")
    tasks, asked = [], frozenset(TYPES) - set(world.HELD_OUT_TYPES)
    for family in families or world.HELD_OUT_FAMILIES:
        generator = torch.Generator().manual_seed(zlib.crc32(family.encode()))
        possible = torch.tensor(world.possible_types(family))
        name = VOCABULARY["product_names"].get(family, [family.replace("_", " ")])[0]
        for number in range(products):
            count = normals + 2 * limit
            # Training draws seeds below 2**31.
            seeds = torch.randint(2**31, 2**32, (1 + count,), generator=generator)
            kinds = possible[torch.randint(len(possible), (count,), generator=generator)]
            kinds[: normals + limit] = -1
            pictures = []
            for part in torch.arange(count).split(BATCH):
                shots = world.photograph(family, seeds[:1].expand(len(part)), seeds[1:][part], kinds[part])
                for i, sample in enumerate(world.ground_truth(family, name, shots)):
                    defects = sample["defects"]
                    pictures.append(Picture(
                        f"{family} {number} photo {part[i]}",
                        shots.images[i].permute(1, 2, 0).numpy(),
                        defects[0]["type"] if defects else "good",
                        shots.masks[i].any(0).numpy() if defects else None,
                        tuple(dict.fromkeys(defect["place"] for defect in defects)),
                    ))  # fmt: skip
            tasks.append(Task(family, f"{family} {number}", name, pictures[:normals], pictures[normals:], asked))
    return tasks
