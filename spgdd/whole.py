"""Whether a picture shows, as a whole, what the normal ones show: the same light, sharpness and look.

A map compares patches, and a dead lamp, a lens cap or another product before the camera may leave each of them close to
some normal one. So the picture is measured as a whole too, and is not judged where it is unlike all normal pictures.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from spgdd.model import Seen

# Each measure: least and largest distance to the nearest normal picture that may be called unlike, and how many times
# the largest one among the normal pictures it must be. Chosen on seven sets of photographs and on generated products.
LEAST = torch.tensor([0.6, 0.7, 1.0, 0.15, 0.04])
TIMES = torch.tensor([1.7, 2.0, 2.0, 1.7, 2.0])
MOST = torch.tensor([1.5, 1.8, 1.6, 0.5, 0.3])
ADDED = torch.tensor([1.0, 0.5, 0.5, 1.0])  # a defect on an even surface adds contrast and edges: that counts less
SINGLE = 1.5  # times LEAST where there is but one normal picture, of which nothing can be learned
WORDS = (("darker", "brighter"), ("weaker in contrast", "stronger in contrast"), ("less sharp", "sharper"),
         ("less clipped to black and white", "more clipped to black or white"))  # fmt: skip


class Whole(NamedTuple):
    """K pictures as wholes."""

    light: Tensor  # (K, 4): logarithms of brightness, contrast and sharpness, and the share of black and white pixels
    look: Tensor  # (K, D) unit vectors: the mean patch token of the second tap

    @classmethod
    def of(cls, pixels: Tensor, seen: Seen) -> "Whole":
        """One picture: pixels (3, S, S) uint8 of its whole view, and what the tower made of it."""
        grey = pixels.float().mean(0)  # (S, S), 0..255
        near = F.avg_pool2d(grey[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]
        sharpness = (grey - near).abs().mean()
        clipped = ((grey <= 6) | (grey >= 249)).float().mean()
        light = torch.stack([(grey.mean() + 2).log(), (grey.std() + 1).log(), (sharpness + 0.2).log(), clipped])
        tokens = seen.patches[0, 0]  # (L, N, D)
        return cls(light[None], F.normalize(tokens[min(1, len(tokens) - 1)].float().mean(0), dim=0)[None].cpu())

    def distances(self, others: "Whole") -> Tensor:
        """Of each picture to each other one, by each of the five measures: (K, K', 5)."""
        light = self.light[:, None] - others.light
        light = torch.where(light > 0, ADDED * light, -light)
        return torch.cat([light, 1 - (self.look @ others.look.T)[..., None]], dim=2)

    def limits(self) -> Tensor:
        """How far from the nearest of these normal pictures another normal one may be, by each measure: (5,)."""
        if len(self.look) == 1:
            return torch.minimum(SINGLE * LEAST, MOST)
        apart = self.distances(self)
        apart[torch.eye(len(apart), dtype=torch.bool)] = torch.inf
        return torch.minimum(torch.maximum(LEAST, TIMES * apart.amin(1).amax(0)), MOST)

    def unlike(self, normals: "Whole") -> list[str]:
        """How this one picture differs from all normal ones, in words; nothing where it is like them."""
        distances = self.distances(normals)[0]  # (K, 5)
        found = (distances.amin(0) > normals.limits()).tolist()
        nearest = normals.light.gather(0, distances[:, :4].argmin(0, keepdim=True))[0]  # (4,), by each measure of light
        more = (self.light[0] > nearest).tolist()
        return [words[more[i]] for i, words in enumerate(WORDS) if found[i]] + ["of another look"] * found[-1]

    def groups(self) -> int:
        """Into how many groups normal pictures fall that look unlike each other, as of several surfaces."""
        like = (self.distances(self) <= LEAST).all(2)
        return int(connected_components(np.asarray(like), directed=False)[0])
