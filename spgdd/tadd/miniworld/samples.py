"""One product before the camera several times: pictures, masks and what is known, ready to look at or to save."""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from spgdd.errors import DataError
from spgdd.tadd.miniworld.world import FAMILIES, TYPES, describe, photograph, possible_types

ATTEMPTS = 20  # photographs tried for one that shows its defect


class Sample(NamedTuple):
    image: np.ndarray  # (S, S, 3) uint8
    mask: np.ndarray  # (S, S) bool, True on defects
    known: dict  # for spgdd.tadd.words: product, family, size, defects


def draw_product(
    family: str, seed: int, kinds: Sequence[str], name: str | None = None, size: int = 224
) -> list[Sample]:
    """Photographs of one product, the ``seed``-th of its family: one for each of ``kinds``, "good" or a defect type.

    Where a defect comes out too faint to be seen, another photograph is taken. ``name`` is what the product is
    called; by default its family. The same arguments give the same pictures. Raises DataError for a family or a
    kind that does not exist, a defect that the family cannot have, and one that stays invisible.
    """
    if family not in FAMILIES:
        raise DataError(f"no family {family!r}; the mini world has {', '.join(FAMILIES)}.")
    possible = ["good", *(TYPES[i] for i in possible_types(family))]
    if wrong := set(kinds) - set(possible):
        raise DataError(f"no {', '.join(sorted(wrong))} on a {family}; choose from {', '.join(possible)}.")
    wanted = torch.tensor([TYPES.index(kind) if kind != "good" else -1 for kind in kinds], dtype=torch.int64)
    product = 100_003 * seed + zlib.crc32(family.encode())  # families of one seed share no colours
    samples: dict[int, Sample] = {}
    left = torch.arange(len(kinds))
    for attempt in range(ATTEMPTS):
        photos = product + left + 1000 * attempt
        shots = photograph(family, torch.full_like(left, product), photos, wanted[left], size)
        known = describe(family, name or family.replace("_", " "), shots)
        for row in (shots.types == wanted[left]).nonzero()[:, 0].tolist():
            image = shots.images[row].permute(1, 2, 0).numpy()  # (3, S, S) -> (S, S, 3)
            samples[left[row].item()] = Sample(image, shots.masks[row].any(0).numpy(), known[row])
        left = left[shots.types != wanted[left]]
        if not len(left):
            return [samples[i] for i in range(len(kinds))]
    unseen = sorted({kinds[i] for i in left.tolist()})
    raise DataError(f"{', '.join(unseen)} on {family} {seed} stays invisible; choose another seed.")
