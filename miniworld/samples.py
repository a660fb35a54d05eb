"""One product before the camera several times: pictures, masks and what is known, to look at or as a folder."""

import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from miniworld.world import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    HELD_OUT_TYPES,
    TYPES,
    ground_truth,
    photograph,
    possible_types,
)
from spgdd.data.words import conversation, names_of
from spgdd.errors import DataError
from spgdd.files import whole_file, write_json

ATTEMPTS = 20  # photographs tried for one that shows its defect
QUALITY = 88  # of JPEG files
PICTURES = 8  # photographs of each product of a world


class Sample(NamedTuple):
    image: np.ndarray  # (S, S, 3) uint8
    mask: np.ndarray  # (S, S) bool, True on defects
    known: dict  # for spgdd.data.words: product, family, size, defects


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
        known = ground_truth(family, name or family.replace("_", " "), shots)
        for row in (shots.types == wanted[left]).nonzero()[:, 0].tolist():
            image = shots.images[row].permute(1, 2, 0).numpy()  # (3, S, S) -> (S, S, 3)
            samples[left[row].item()] = Sample(image, shots.masks[row].any(0).numpy(), known[row])
        left = left[shots.types != wanted[left]]
        if not len(left):
            return [samples[i] for i in range(len(kinds))]
    unseen = sorted({kinds[i] for i in left.tolist()})
    raise DataError(f"{', '.join(unseen)} on {family} {seed} stays invisible; choose another seed.")


def write_world(
    folder: str | Path, products: int, seed: int = 0, families: Sequence[str] = (), held_out: bool = False
) -> list[dict]:
    """Draw a data set of products, PICTURES photographs of each, and its TADD_text.json; returns the records.

    By default what training may see is drawn; with ``held_out`` the families and defect types kept from it. The
    families take turns. The same arguments give the same files. Raises DataError for an unknown family.
    """
    families = families or (HELD_OUT_FAMILIES if held_out else [f for f in FAMILIES if f not in HELD_OUT_FAMILIES])
    if unknown := set(families) - set(FAMILIES):
        raise DataError(f"no family {', '.join(sorted(unknown))}; the mini world has {', '.join(FAMILIES)}.")
    types = [kind for kind in TYPES if held_out or kind not in HELD_OUT_TYPES]
    shots = (shot for i in range(products) for shot in _photographs(families[i % len(families)], i, seed, types))
    return write_folder(folder, tqdm(shots, "drawing", products * PICTURES, unit="picture"), types)


def _photographs(family: str, number: int, seed: int, types: Sequence[str]) -> Iterator[tuple[str, Sample]]:
    """Name and picture of half good and half damaged photographs of a product; all but one of the good for training.

    Each product has a folder of its own, ``0007/hex_nut``, so that two nuts are not taken for one. A defect too
    faint to be seen leaves a good picture.
    """
    rng = random.Random(f"world {seed} {number}")
    name = rng.choice(names_of({"product": family.replace("_", " "), "family": family}))
    possible = [i for i in possible_types(family) if TYPES[i] in types]
    kinds = torch.tensor([-1] * (PICTURES // 2) + rng.choices(possible, k=PICTURES // 2))
    photos = torch.tensor([rng.randrange(2**31) for _ in kinds])  # evaluations draw theirs above
    shots = photograph(family, torch.full_like(photos, rng.randrange(2**31)), photos, kinds)
    for row, known in enumerate(ground_truth(family, name, shots)):
        kind = known["defects"][0]["type"].replace(" ", "_") if known["defects"] else "good"
        split = "train" if row < PICTURES // 2 - 1 else "test"
        image = shots.images[row].permute(1, 2, 0).numpy()  # (3, S, S) -> (S, S, 3)
        path = f"{number:04}/{name.replace(' ', '_')}/{split}/{kind}/{row:03}.jpg"
        yield path, Sample(image, shots.masks[row].any(0).numpy(), known)


def write_folder(folder: str | Path, pictures: Iterable[tuple[str, Sample]], kinds: Sequence[str]) -> list[dict]:
    """Save named pictures in MVTec's layout, PRODUCT/SPLIT/TYPE/NAME.jpg, with masks and TADD_text.json.

    ``kinds`` are the defect types that may be asked about, also of good pictures. Returns the records.
    """
    folder, records = Path(folder), []
    for name, sample in pictures:
        path = folder / name
        with whole_file(path) as file:
            Image.fromarray(sample.image).save(file, "JPEG", quality=QUALITY)
        if sample.mask.any():
            with whole_file(path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png") as file:
                Image.fromarray(sample.mask).save(file, "PNG", optimize=True)
        records.append(record(name, sample, kinds))
    write_json(folder / "TADD_text.json", records, indent=1)
    return records


def record(name: str, sample: Sample, kinds: Sequence[str]) -> dict:
    """What TADD_text.json says about a picture."""
    return {"image_name": name, "conversation": conversation(sample.known, random.Random(name), kinds=kinds)}
