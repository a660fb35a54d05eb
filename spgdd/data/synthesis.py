"""Self-supervised anomalies: a patch of one normal image blended into another, as in AnomalyGPT (after NSA).

    result = synthesise(image, source, PRODUCT_SETTINGS.get("screw", DEFAULT), numpy.random.default_rng(0))

Numbers are AnomalyGPT's, each product's in ``synthesis.yaml``; these oddities of the published code are mended:
- the source is an argument, not whatever image the same data-loader worker drew before;
- after resizing, full sizes are kept within twice the half-width bounds, not within the half-width bounds;
- two patches do not touch, so their labels do not overwrite each other; odd sizes are cloned without a shift;
- each patch has its own place, and only patches that can be seen in the label are kept and talked about.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from scipy import fft, ndimage

from spgdd.places import extent

TRIES = 200
MIN_VISIBLE = 20  # pixels of 224 x 224 with a label above 0.3, the threshold of the training loss


@dataclass(frozen=True)
class SynthesisSettings:
    """How patches of a product are cut, placed and labelled."""

    rows: tuple[float, float] = (0.03, 0.4)  # half height, as share of the image
    columns: tuple[float, float] = (0.03, 0.4)  # half width
    logistic: tuple[float, float] = (1 / 12, 24)  # steepness and centre of the label over the change
    background: tuple[int, int] | None = None  # grey level and tolerance; None if it is never seen
    resize: tuple[float, float] = (0.7, 1.3)


DEFAULT = SynthesisSettings(resize=(0.5, 2))  # every product of VisA, and any other
PRODUCT_SETTINGS = {
    product: SynthesisSettings(**{name: tuple(values) for name, values in fields.items()})
    for product, fields in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))["settings"].items()
}


@dataclass(frozen=True)
class Synthetic:
    image: np.ndarray  # uint8 (S, S, 3)
    label: np.ndarray  # float32 (S, S) in 0..1
    defects: list[dict]  # as ``words`` takes them


def synthesise(image: np.ndarray, source: np.ndarray, settings: SynthesisSettings, rng) -> Synthetic:
    """One or two patches of ``source`` blended into ``image``, both uint8 (S, S, 3).

    ``rng`` is a numpy Generator. Where no place is found (little object in the image), or the change cannot
    be seen (two even surfaces), ``defects`` is empty and the image unchanged.
    """
    result, defects = image, []
    label = np.zeros(image.shape[:2], np.float32)
    for _ in range(1 + int(rng.random() < 0.5)):
        patch = _cut(source, settings, rng)
        corner = None if patch is None else _place(result, patch, settings, rng)
        if corner is None:
            continue
        changed, mask = _paste(result, patch, corner, settings)
        if label[mask].any():  # touching patches would be seen as one
            continue
        own = intensity_label(result, changed, mask, settings.logistic)
        y, x = np.nonzero(own > 0.3)
        if len(x) < MIN_VISIBLE * own.size / 224**2:
            continue
        contrast = float(np.abs(changed - result.astype(float))[y, x].mean() / 255)
        defects.append({"type": "anomaly", **extent(x, y, own.shape), "contrast": contrast})
        result, label = changed, np.maximum(label, own)
    return Synthetic(result, label, defects)


def object_mask(image: np.ndarray, background: tuple[int, int] | None) -> np.ndarray:
    """Bool (H, W): pixels whose grey level differs from the background's by more than the tolerance."""
    if background is None:
        return np.ones(image.shape[:2], bool)
    far = np.abs(image.mean(2) - background[0]) > background[1]
    return ndimage.median_filter(far, 7)


def _cut(source: np.ndarray, settings: SynthesisSettings, rng: np.random.Generator) -> np.ndarray | None:
    """A patch of the source, resized, with some object in it; None after too many tries."""
    size = source.shape[0]
    objects = object_mask(source, settings.background)
    bounds = np.array((settings.rows, settings.columns)) * size  # (2, 2): axis, lower and upper half-width
    for _ in range(TRIES):
        half = np.clip((0.03 + rng.gamma(2, 0.05, 2)) * size, bounds[:, 0], bounds[:, 1]).astype(int)
        centre = rng.integers(bounds[:, 0].astype(int), size - bounds[:, 0].astype(int))
        (top, left), (bottom, right) = np.maximum(centre - half, 0), np.minimum(centre + half, size)
        if objects[top:bottom, left:right].any():
            factor = np.clip(rng.normal(1, 0.5), *settings.resize)
            shape = np.array((bottom - top, right - left)) * factor
            shape = np.clip(shape, 2 * bounds[:, 0], np.minimum(2 * bounds[:, 1], size)).astype(int)
            patch = Image.fromarray(source[top:bottom, left:right])
            return np.asarray(patch.resize((int(shape[1]), int(shape[0])), Image.Resampling.BICUBIC))
    return None


def _place(image: np.ndarray, patch: np.ndarray, settings: SynthesisSettings, rng: np.random.Generator):
    """Corner (row, column) where the patch's object overlaps the image's object by more than a quarter."""
    objects, own = object_mask(image, settings.background), object_mask(patch, settings.background)
    for _ in range(TRIES if own.any() else 0):
        y, x = rng.integers(0, np.array(image.shape[:2]) - patch.shape[:2] + 1)
        there = objects[y : y + patch.shape[0], x : x + patch.shape[1]]
        if (there & own).sum() > 0.25 * own.sum():
            return int(y), int(x)
    return None


def _paste(image: np.ndarray, patch: np.ndarray, corner: tuple[int, int], settings: SynthesisSettings):
    """The image with the patch blended in, and the bool mask (S, S) of what may have changed."""
    window = np.s_[corner[0] : corner[0] + patch.shape[0], corner[1] : corner[1] + patch.shape[1]]
    there = image[window]
    either = object_mask(there, settings.background) | object_mask(patch, settings.background)
    changed, mask = image.copy(), np.zeros(image.shape[:2], bool)
    changed[window] = np.where(either[..., None], poisson_blend(there, patch), there)
    mask[window] = either
    return changed, mask


def poisson_blend(there: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Seamless clone of a rectangle, uint8 (h, w, 3): the patch's gradients with the image's border.

    The correction ``there - patch`` on the border is continued harmonically inside (Perez et al. 2003,
    eq. 4), which on a rectangle is solved exactly by sine transforms.
    """
    gap = there.astype(float) - patch  # (h, w, 3)
    inside = np.zeros_like(gap[1:-1, 1:-1])  # right-hand side: what the border gives to its inner neighbours
    inside[0] += gap[0, 1:-1]
    inside[-1] += gap[-1, 1:-1]
    inside[:, 0] += gap[1:-1, 0]
    inside[:, -1] += gap[1:-1, -1]
    waves = [2 - 2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1)) for n in inside.shape[:2]]
    spectrum = fft.dstn(inside, type=1, axes=(0, 1)) / (waves[0][:, None, None] + waves[1][None, :, None])
    gap[1:-1, 1:-1] = fft.idstn(spectrum, type=1, axes=(0, 1))
    return np.clip(patch + gap, 0, 255).round().astype(np.uint8)


def intensity_label(before: np.ndarray, after: np.ndarray, mask: np.ndarray, logistic) -> np.ndarray:
    """Float32 (S, S) in 0..1: how clearly each pixel changed, a logistic curve of the smoothed difference."""
    difference = np.abs(after.astype(float) - before).mean(2) * mask
    changed = ndimage.median_filter(difference > 1, 5)
    y, x = np.ogrid[-5:6, -5:6]
    smooth = ndimage.median_filter(difference * changed, footprint=x**2 + y**2 <= 25)
    steepness, middle = logistic
    return (changed / (1 + np.exp(-steepness * (smooth - middle)))).astype(np.float32)
