"""From scores of normal pictures to a threshold: no defective picture is needed.

Scores are compared as log-odds of their share of the largest possible one, in which normal pictures of a product
are about normally distributed. The threshold is the upper prediction bound for one more draw (Student's t), with
the variance of so few pictures pooled with a prior (scaled inverse chi-square), so that two pictures that happen to
agree are not taken as proof that all do. From enough pictures on it is an order statistic, which keeps the
false-alarm rate whatever the distribution (split conformal prediction).
"""

from dataclasses import dataclass
from math import ceil, sqrt
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from scipy import special, stats
from torch import Tensor

from spgdd.ranges import check_ranges

METHODS = ("leave-one-out", "augmentations", "none")
ENOUGH = 2  # pictures expected above a threshold before it is an order statistic
# Standard errors between the threshold and "defective": WIDE / pictures, from 1 to WIDEST. Chosen on photographs, where
# good ones of a surface or light that a few normal pictures do not show score far above any threshold made of these.
WIDE, WIDEST = 16, 4
AREA = 0.01  # share of a normal picture that may lie above the outline of regions
COPIES = ((12, 0.9, 1.1), (20, 1.1, 1.1), (20, 0.9, 0.9), (12, 1.1, 0.9))  # pixels of 224 cut off, brightness, contrast


class Prior(NamedTuple):
    """What is known of log-odds before any picture of the product, measured by benchmarks/calibration.py."""

    spread: float  # standard deviation of a product's normal pictures
    weight: float  # pictures that this is worth
    shift: float  # how much higher an unseen picture scores than copies of the only known one
    error: float  # standard deviation of that between products


# By the largest score that there can be: distances of the memory alone, probabilities of the learned comparison.
PRIORS = {2.0: Prior(0.18, 2.0, 0.14, 0.24), 1.0: Prior(0.84, 2.8, 0.08, 0.95)}
UNMEASURED = 0.5  # their weight for eyes other than mini's: two pictures that happen to agree are still no proof


class Limits(NamedTuple):
    """A score below ``low`` is normal, above ``high`` defective, between them unsure."""

    threshold: float
    low: float
    high: float
    outline: float  # map value that bounds a region

    def verdict(self, score: float) -> str:
        return "normal" if score < self.low else "defective" if score > self.high else "unsure"


# Of abnormal probabilities where no normal picture is known. At 0.5 three of four good pictures would be defective;
# mini's maps part good and defective ones best at 0.7, on generated pictures as on photographs.
ZERO_SHOT = Limits(threshold=0.7, low=0.6, high=0.8, outline=0.5)


@dataclass(frozen=True)
class Calibration:
    """Scores of normal pictures that the memory had not seen; of a single one, scores of altered copies."""

    method: str  # "leave-one-out", "augmentations" (one picture) or "none" (no picture: fixed limits)
    pictures: int = 0  # how many different ones were scored
    scores: tuple[float, ...] = ()  # image scores
    outlines: tuple[float, ...] = ()  # per map, the value that AREA of its pixels exceed
    largest: float = 2.0  # that a score can be: 1 for probabilities, 2 for distances
    measured: bool = True  # whether PRIORS was measured with the eyes that these scores are of

    def __post_init__(self):
        """Raises ValueError for what no calibration can be: it may come from a file."""
        if self.method not in METHODS or self.largest not in PRIORS:
            raise ValueError(f"calibration {self.method!r} up to {self.largest!r} is unknown")
        if not len(self.scores) == len(self.outlines) >= self.pictures >= (self.method != "none"):
            raise ValueError(f"{len(self.scores)} scores of {self.pictures} pictures")
        if not all(0 <= value <= self.largest for value in (*self.scores, *self.outlines)):
            raise ValueError(f"a score that is not between 0 and {self.largest:g}")

    @property
    def guess(self) -> bool:
        """Whether the pictures are too few to tell."""
        return 0 < self.pictures < 4

    def limits(self, false_alarm_rate: float) -> Limits:
        """That share of normal pictures exceeds ``threshold``; unsure is from one standard error below it to ``WIDE``
        of them above it, so that "defective" can be relied on where few pictures are known.

        Raises SpgddError unless 0 < false_alarm_rate < 0.5.
        """
        check_ranges(false_alarm_rate=false_alarm_rate)
        if self.method == "none":
            return ZERO_SHOT
        known = self.pictures, false_alarm_rate, self.largest, self.measured
        bounds, (outline, _, _) = upper_bound(self.scores, *known), upper_bound(self.outlines, *known)
        return Limits(*bounds, min(outline, bounds[1]))


def upper_bound(
    values: tuple[float, ...], pictures: int, rate: float, largest: float, measured: bool = True
) -> tuple[float, float, float]:
    """What one more normal picture exceeds with probability ``rate``; one standard error below it, and some above.

    ``values``, 0 to ``largest``, are of ``pictures`` different pictures, or of copies of a single one.
    """
    prior, values = PRIORS[largest], np.sort(np.asarray(values, dtype=np.float64))
    prior = prior if measured else prior._replace(weight=UNMEASURED)
    floor = max(values.mean() / 10, 1e-6 * largest)  # a near-duplicate would stretch the spread
    odds = special.logit(np.clip(values, floor, (1 - 1e-6) * largest) / largest)
    middle, freedom = odds.mean(), pictures - 1 + prior.weight
    if pictures == 1:
        spread, error = prior.spread, prior.error
        threshold = middle + prior.shift + stats.norm.isf(rate) * sqrt(spread**2 + error**2)
    else:
        squares = ((odds - middle) ** 2).sum() + prior.weight * prior.spread**2
        spread = sqrt(squares / freedom)
        error = spread / sqrt(pictures)
        threshold = middle + stats.t.isf(rate, freedom) * sqrt(spread**2 + error**2)
    if pictures * rate >= ENOUGH:
        threshold = odds[ceil((pictures + 1) * (1 - rate)) - 1]
    margin = sqrt(error**2 + (stats.norm.isf(rate) * spread) ** 2 / (2 * freedom))
    wide = min(max(WIDE / pictures, 1), WIDEST)
    return tuple(float(largest * special.expit(threshold + errors * margin)) for errors in (0, -1, wide))


def altered_copies(pixels: Tensor) -> list[Tensor]:
    """Four copies of a uint8 picture (3, S, S) that show the same normal part a little nearer and in other light.

    Each is cut to one of the corners and enlarged again, so that no border is made up, and is 10 % darker or brighter
    with 10 % less or more contrast.
    """
    size, copies = pixels.shape[-1], []
    for number, (cut, brightness, contrast) in enumerate(COPIES):
        cut = cut * size // 224
        top, left = (cut * place for place in divmod(number, 2))
        part = pixels[None, :, top : top + size - cut, left : left + size - cut].float()
        copy = F.interpolate(part, size=(size, size), mode="bicubic", align_corners=False)[0]
        copy = (copy.mean() + (copy - copy.mean()) * contrast) * brightness
        copies.append(copy.round().clamp(0, 255).byte())
    return copies
