"""Synthetic anomalies: the blend solves Poisson's equation, the label says where, the words say so too."""

import random

import numpy as np
import pytest
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from conftest import check
from spgdd.data.index import MVTEC_PRODUCTS
from spgdd.data.synthesis import (
    DEFAULT,
    PRODUCT_SETTINGS,
    SynthesisSettings,
    intensity_label,
    object_mask,
    poisson_blend,
    synthesise,
)
from spgdd.data.words import conversation
from spgdd.places import place_of


def texture(seed: int, size: int = 224) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(40, 200, (size // 8, size // 8, 3)), np.ones((8, 8, 1)))
    return (coarse + rng.integers(0, 30, (size, size, 3))).astype(np.uint8)


def disc(seed: int, radius: int = 60) -> np.ndarray:
    """A dark textured disc on a light background."""
    y, x = np.mgrid[:224, :224] - 112
    image = np.full((224, 224, 3), 200, np.uint8)
    inside = x**2 + y**2 < radius**2
    image[inside] = texture(seed)[inside] // 2
    return image


def test_blend_solves_poissons_equation():
    rng = np.random.default_rng(0)
    there, patch = rng.integers(90, 130, (2, 12, 9, 3)).astype(np.uint8)
    height, width = 10, 7
    matrix, right = lil_matrix((height * width, height * width)), np.zeros((height * width, 3))
    for y in range(1, 11):
        for x in range(1, 8):
            k = (y - 1) * width + x - 1
            matrix[k, k] = 4
            for v, u in ((y, x + 1), (y + 1, x), (y, x - 1), (y - 1, x)):
                right[k] += patch[y, x].astype(float) - patch[v, u]
                if 1 <= v <= height and 1 <= u <= width:
                    matrix[k, (v - 1) * width + u - 1] = -1
                else:
                    right[k] += there[v, u]
    solved = np.stack([spsolve(matrix.tocsr(), right[:, c]) for c in range(3)], 1).reshape(height, width, 3)
    blended = poisson_blend(there, patch)
    check("poisson_blend", blended[1:-1, 1:-1], np.clip(solved, 0, 255), atol=0.5001, rtol=0)
    assert (blended[0] == there[0]).all() and (blended[:, -1] == there[:, -1]).all()


def test_label_is_the_logistic_of_the_change():
    before = np.full((60, 60, 3), 100, np.uint8)
    after, mask = before.copy(), np.zeros((60, 60), bool)
    after[10:40, 10:40], mask[10:40, 10:40] = 124, True
    label = intensity_label(before, after, mask, (1 / 12, 24))
    assert label[25, 25] == pytest.approx(0.5) and label.dtype == np.float32
    assert label[:8].max() == 0 and intensity_label(before, after, mask, (1, 3))[25, 25] > 0.99


@pytest.mark.parametrize("name", ["leather", "screw", "any"])
def test_synthesis_is_deterministic_and_true(name):
    settings = PRODUCT_SETTINGS.get(name, DEFAULT)
    make = disc if settings.background else texture
    counts = []
    for seed in range(12):
        image, source = make(2 * seed), make(2 * seed + 1)
        kept = image.copy()
        result = synthesise(image, source, settings, np.random.default_rng(seed))
        again = synthesise(image, source, settings, np.random.default_rng(seed))
        assert (result.image == again.image).all() and (result.label == again.label).all()
        assert (image == kept).all()
        counts.append(len(result.defects))
        assert 0 <= result.label.min() and result.label.max() <= 1
        changed = (result.image != image).any(2)
        assert not changed.any() if not result.defects else changed[result.label > 0.3].mean() > 0.8
        for defect in result.defects:
            x0, y0, x1, y1 = defect["box"]
            inside = np.zeros_like(result.label)
            inside[y0:y1, x0:x1] = result.label[y0:y1, x0:x1] > 0.3
            y, x = np.nonzero(inside)
            if len(result.defects) == 1:
                assert defect["area"] == pytest.approx(len(x) / 224**2)
                assert defect["place"] == place_of((x.mean() + 0.5) / 224, (y.mean() + 0.5) / 224)
        sample = {"product": name, "family": "", "defects": result.defects}
        talk = conversation(sample, random.Random(seed), first=("verdict",))
        assert talk[1]["value"].startswith("Yes, " if result.defects else "No, ")
        if settings.background:  # the change lies on the object, before or after
            objects = object_mask(image, settings.background) | object_mask(source, settings.background)
            assert (objects | ~changed).mean() > 0.9
    assert sum(count > 0 for count in counts) >= 9 and 2 in counts


def test_no_object_no_anomaly():
    empty = np.full((224, 224, 3), 200, np.uint8)
    result = synthesise(empty, disc(1), PRODUCT_SETTINGS["screw"], np.random.default_rng(0))
    assert result.defects == [] and (result.image == empty).all() and result.label.max() == 0


def test_published_parameters():
    """Half-width bounds, logistic, background and resize of the published tables."""
    assert MVTEC_PRODUCTS <= set(PRODUCT_SETTINGS)
    wide, narrow = (0.03, 0.4), (0.03, 0.2)
    assert PRODUCT_SETTINGS["bottle"] == SynthesisSettings(wide, wide, (1 / 12, 24), (200, 60), (0.7, 1.3))
    assert PRODUCT_SETTINGS["screw"] == SynthesisSettings((0.03, 0.12), (0.03, 0.12), (1, 3), (200, 60), (0.7, 1.3))
    assert PRODUCT_SETTINGS["zipper"] == SynthesisSettings(wide, narrow, (1 / 6, 15), (200, 60), (0.7, 1.3))
    assert PRODUCT_SETTINGS["carpet"] == SynthesisSettings(wide, wide, (1 / 3, 7), None, (0.5, 2))
    assert DEFAULT == SynthesisSettings(wide, wide, (1 / 12, 24), None, (0.5, 2))


def test_half_sizes_follow_the_published_law():
    """Most anomalies are small: the median side is that of 2 (0.03 + Gamma(2, 0.05)) times the factor."""
    sides = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        result = synthesise(texture(seed), texture(seed + 99), PRODUCT_SETTINGS["leather"], rng)
        sides += [d["box"][2] - d["box"][0] for d in result.defects]
    assert 30 < np.median(sides) < 75 and max(sides) <= 0.8 * 224 + 1
