"""TADD_text.json from masks: what is said about a picture is measured on its mask and its pixels.

TADD's own text was not published. ``describe`` writes the same record format, {"image_name", "conversation"},
with the phrasings of ``words``. The readers of PandaGPT and AnomalyGPT take it; they append ".jpg" to every
other ending, and use the first question and answer alone.
"""

import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import ndimage

from spgdd.data.grammar import spoken_name
from spgdd.data.index import Index, Row
from spgdd.data.masks import read_mask
from spgdd.data.words import TOPICS, conversation
from spgdd.images import read_image
from spgdd.places import extent

GAP = 0.02  # pieces of a mask that are nearer than this share of the longer side are one defect
SPECK = 0.01  # pieces below this share of the mask are not counted as defects of their own


def describe(index: Index, seed: int = 0) -> list[dict]:
    """One record an image, good ones too, in the order of the index; the same seed gives the same text.

    Defective images without a mask are left out.
    """
    kinds = defaultdict(set)
    for row in index.rows:
        if row.defect_type != "good":
            kinds[row.subset, row.product].add(_kind(row))
    records = []
    for row in index.rows:
        if row.defect_type != "good" and not row.mask:
            continue
        rng = random.Random(f"{seed} {row.image}".encode("utf-8", "surrogateescape"))
        other = rng.choice(sorted(TOPICS))
        plain, mixed, late = ("verdict", "where"), ("verdict", other, "where"), (other, "where", "verdict")
        first = tuple(dict.fromkeys(rng.choice((plain, plain, mixed, late))))
        turns = len(first) + rng.choice((0, 1, 2))
        asked = sorted(kinds[row.subset, row.product])
        talk = conversation(sample_of(row, index.folder), rng, turns, asked, first)
        records.append({"image_name": row.image, "conversation": talk})
    return records


def sample_of(row: Row, folder: Path) -> dict:
    """What mask, folder name and pixels tell about an image, as ``words`` takes it."""
    sample = {"product": spoken_name(row.product), "family": "", "size": (row.width, row.height), "defects": []}
    if row.defect_type == "good":
        return sample
    mask = read_mask(folder / row.mask, folder / row.image)  # (H, W)
    pixels = np.asarray(read_image(folder / row.image), dtype=np.float32)  # (H, W, 3), 0..255
    sample["defects"] = measure(mask, pixels, _kind(row))
    y, x = np.nonzero(mask)
    sample["middle"] = extent(x, y, mask.shape)["place"]
    return sample


def _kind(row: Row) -> str:
    """The defect type; VisA's lists of several types say as little about one place as "combined"."""
    return "combined" if "," in row.defect_type else row.defect_type


def measure(mask: np.ndarray, pixels: np.ndarray, kind: str) -> list[dict]:
    """The defects in a mask, largest first: type, place of the centroid, box, area, contrast, shape.

    ``mask``: bool (H, W), not empty. ``pixels``: (H, W, 3), 0..255.
    """
    reach = max(1, round(GAP * max(mask.shape) / 2))
    halo = ndimage.maximum_filter(mask, 2 * reach + 1)  # pieces whose halos touch are one defect
    groups, count = ndimage.label(halo, structure=np.ones((3, 3)))
    groups[~mask] = 0
    areas = np.bincount(groups.ravel(), minlength=count + 1)[1:]  # (count,)
    defects = []
    for label in sorted(range(1, count + 1), key=lambda k: -areas[k - 1]):
        if areas[label - 1] < SPECK * areas.sum():
            continue
        y, x = np.nonzero(groups == label)
        defects.append({"type": kind, **extent(x, y, mask.shape), "shape": shape_of(x, y)})
        if (contrast := contrast_of(x, y, mask, pixels)) is not None:
            defects[-1]["contrast"] = contrast
    return defects


def shape_of(x: np.ndarray, y: np.ndarray) -> str:
    """Words for the shape of a set of pixels, from its principal axes and how much of its box it fills."""
    spread = np.cov(np.stack((x, y)), bias=True) + np.eye(2) / 12  # (2, 2); a pixel has an extent too
    (small, large), axes = np.linalg.eigh(spread)
    if large > 16 * small:
        angle = abs(math.degrees(math.atan2(axes[1, 1], axes[0, 1])))
        angle = min(angle, 180 - angle)
        course = "horizontal" if angle < 25 else "vertical" if angle > 65 else "diagonal"
        return f"long, thin and {course}"
    fill = len(x) / ((np.ptp(x) + 1) * (np.ptp(y) + 1))
    return "irregular" if fill < 0.45 else "compact" if large < 4 * small else "longish"


def contrast_of(x: np.ndarray, y: np.ndarray, mask: np.ndarray, pixels: np.ndarray) -> float | None:
    """0..1: how far the dark, middle, light or mean level of a channel differs from what surrounds it."""
    margin = max(4, (np.ptp(x) + np.ptp(y)) // 8)
    top, left = max(0, y.min() - margin), max(0, x.min() - margin)
    window = np.s_[top : y.max() + margin + 1, left : x.max() + margin + 1]
    around = pixels[window][~mask[window]]  # (n, 3)
    if not len(around):
        return None
    inside, outside = (
        np.vstack((np.percentile(part, (5, 50, 95), axis=0), part.mean(0))) for part in (pixels[y, x], around)
    )  # (4, 3) each
    return float(abs(inside - outside).max() / 255)
