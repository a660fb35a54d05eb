"""What tiles cost and bring: specks of a few pixels in photographs of 4000 x 3000 pixels, generated.

    python benchmarks/tiles.py [TILES ...]            # default 1 4 8; twenty minutes on two CPU cores

Real pictures: spgdd evaluate --data DIR --shots 1 --no-text --set tiles=2
"""

import sys
import time

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score

import spgdd
from miniworld.world import HELD_OUT_FAMILIES, photograph

SIZE = (4000, 3000)
DRAWN = 1000  # pixels that the mini world draws of a side; the rest is enlarged, as by a lens, and gets its own noise
DIAMETERS = (24, 48)  # pixels of the specks
NORMALS, GOOD = 2, 4
BUDGET = 2048


def photographs(family: str, count: int) -> list[Image.Image]:
    """Photographs of one good part of a family."""
    pictures = []
    for number in range(count):
        drawn = photograph(family, torch.tensor([5]), torch.tensor([number]), torch.tensor([-1]), DRAWN).images[0]
        large = Image.fromarray(drawn.permute(1, 2, 0).numpy()).resize(SIZE, Image.Resampling.BICUBIC)
        noise = np.random.default_rng(number).integers(-4, 5, (SIZE[1], SIZE[0], 1))
        pictures.append(Image.fromarray((np.asarray(large) + noise).clip(0, 255).astype(np.uint8)))
    return pictures


def with_speck(picture: Image.Image, diameter: int, seed: int) -> tuple[Image.Image, tuple[int, int]]:
    """The picture with a dark, or on a dark ground a bright, disc near its middle, and where it is."""
    rng = np.random.default_rng(seed)
    x, y = (int(side * (0.3 + 0.4 * rng.random())) for side in SIZE)
    ground = np.asarray(picture)[y - 20 : y + 20, x - 20 : x + 20].mean()
    picture, r = picture.copy(), diameter / 2
    ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill=(20,) * 3 if ground > 100 else (230,) * 3)
    return picture, (x, y)


def main(tiles: list[int]) -> None:
    diagnoser, sets = spgdd.load("mini"), []
    for family in HELD_OUT_FAMILIES:
        *good, last = photographs(family, NORMALS + GOOD + 1)
        bad = {d: [with_speck(picture, d, n) for n, picture in enumerate(good[NORMALS:])] for d in DIAMETERS}
        sets.append((family, good[:NORMALS], good[NORMALS:], bad))
        print(f"drawn: {family}", flush=True)
    for count in tiles:
        scores, labels, found, build, query = {d: [] for d in DIAMETERS}, {d: [] for d in DIAMETERS}, {}, [], []
        for family, normals, good, bad in sets:
            start = time.perf_counter()
            reference = diagnoser.reference(normals, family, budget=BUDGET, tiles=count)
            build.append(time.perf_counter() - start)
            fine = [look(diagnoser, picture, reference, query) for picture in good]
            for diameter, pictures in bad.items():
                some = [look(diagnoser, picture, reference, query) for picture, _ in pictures]
                # relative to the product's good ones, so that the products can be counted together
                scale = np.mean([d.score for d in fine])
                scores[diameter] += [d.score / scale for d in (*fine, *some)]
                labels[diameter] += [0] * len(fine) + [1] * len(some)
                hits = [near(d, place) for d, (_, place) in zip(some, pictures, strict=True)]
                found.setdefault(diameter, []).extend(hits)
        print(f"tiles {count}: reference of {NORMALS} {np.mean(build):.1f} s, a picture {np.median(query):.2f} s")
        for d in DIAMETERS:
            auroc = 100 * roc_auc_score(labels[d], scores[d])
            share = 100 * np.mean(found[d])
            print(f"   specks of {d} pixels: image AUROC {auroc:.1f}, the map's peak lies at {share:.0f} % of them")


def look(diagnoser, picture: Image.Image, reference, laps: list[float]):
    start = time.perf_counter()
    found = diagnoser.diagnose(picture, reference, max_new_tokens=1)
    laps.append(time.perf_counter() - start)
    return found


def near(diagnosis, place: tuple[int, int]) -> bool:
    row, column = np.unravel_index(diagnosis.anomaly_map.argmax(), diagnosis.anomaly_map.shape)
    return bool(np.hypot(column - place[0], row - place[1]) < 100)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [1, 4, 8])
