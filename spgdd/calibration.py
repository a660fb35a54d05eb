"""From scores of normal pictures to a threshold: no defective picture is needed.

With enough pictures the threshold is an order statistic, which keeps the false-alarm rate whatever the
distribution (split conformal prediction). With few it is the upper prediction bound for one more draw from a
log-normal distribution, exp(mean + t * s * sqrt(1 + 1/n)): scores are positive with a long right tail. The
variance s^2 of so few is pooled with a prior (scaled inverse chi-square), PRIOR_SPREAD in log units, worth
PRIOR_WEIGHT pictures, so that two pictures that happen to agree are not taken as proof that all do.
"""

from dataclasses import dataclass
from math import ceil, exp, sqrt

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from spgdd.errors import SpgddError

PRIOR_SPREAD, PRIOR_WEIGHT = 0.3, 2
AREA = 0.01  # share of a normal picture that may lie above the outline of regions
ZERO_SHOT = 0.5  # abnormal probability from which a picture counts as defective when no normal one is known


@dataclass(frozen=True)
class Limits:
    """A score below ``low`` is normal, above ``high`` defective, between them unsure."""

    threshold: float
    low: float
    high: float
    outline: float  # map value that bounds a region


@dataclass(frozen=True)
class Calibration:
    """Scores of normal pictures that the memory had not seen; of a single one, scores of altered copies."""

    method: str  # "leave-one-out", "augmentations" (one picture) or "none" (no picture: fixed limits)
    pictures: int = 0  # how many different ones were scored
    scores: tuple[float, ...] = ()  # image scores
    outlines: tuple[float, ...] = ()  # per map, the value that AREA of its pixels exceed

    def limits(self, false_alarm_rate: float) -> Limits:
        """That share of normal pictures exceeds ``threshold``; unsure is within one standard error of it.

        Raises SpgddError unless 0 < false_alarm_rate < 0.5.
        """
        if not 0 < false_alarm_rate < 0.5:
            raise SpgddError(f"false_alarm_rate must lie between 0 and 0.5, received {false_alarm_rate}.")
        if self.method == "none":
            return Limits(ZERO_SHOT, ZERO_SHOT, ZERO_SHOT, ZERO_SHOT)
        threshold, factor = upper_bound(self.scores, self.pictures, false_alarm_rate)
        outline, _ = upper_bound(self.outlines, self.pictures, false_alarm_rate)
        low = threshold / factor
        return Limits(threshold, low, threshold * factor, min(outline, low))


def upper_bound(values: tuple[float, ...], pictures: int, rate: float) -> tuple[float, float]:
    """What one more normal picture exceeds with probability ``rate``, and the factor of one standard error.

    ``values`` come from ``pictures`` different pictures: copies of one picture tell less than their number.
    """
    values = np.sort(np.asarray(values, dtype=np.float64))
    floor = max(values.mean() / 10, 1e-6)  # a near-duplicate would stretch the spread
    logs = np.log(np.maximum(values, floor))
    freedom = pictures - 1 + PRIOR_WEIGHT
    squares = ((logs - logs.mean()) ** 2).sum() + PRIOR_WEIGHT * PRIOR_SPREAD**2
    spread = sqrt(squares / (len(logs) - 1 + PRIOR_WEIGHT))
    factor = exp(spread * sqrt(1 / pictures + stats.norm.isf(rate) ** 2 / (2 * freedom)))
    rank = ceil((len(values) + 1) * (1 - rate))
    if rank <= len(values) == pictures:
        return float(values[rank - 1]), factor
    return exp(logs.mean() + stats.t.isf(rate, freedom) * spread * sqrt(1 + 1 / pictures)), factor


def altered_copies(pixels: Tensor) -> list[Tensor]:
    """Eight copies of a uint8 picture (3, S, S) that show the same normal part, each altered in every way.

    Mirrored, moved by half a patch along a diagonal (the edge continued), 10 % darker or brighter, and with
    10 % less or more contrast.
    """
    steps = torch.arange(pixels.shape[-1])
    moved = [(steps + shift).clamp(0, len(steps) - 1) for shift in (-7, 7)]
    tones = ((0.9, 1.1), (1.1, 0.9), (0.9, 0.9), (1.1, 1.1))  # brightness, contrast
    copies = []
    for number, mirror in enumerate(((), (1,), (2,), (1, 2))):
        for turn in (0, 1):
            copy = pixels.flip(mirror)[:, moved[turn]][:, :, moved[(turn + number) % 2]].float()
            brightness, contrast = tones[(number + 2 * turn) % 4]
            copy = (copy.mean() + (copy - copy.mean()) * contrast) * brightness
            copies.append(copy.round().clamp(0, 255).to(torch.uint8))
    return copies
