"""The learned comparison: what the memory and the words say about each patch becomes one probability of a defect."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.selfprompt.focuser import TEMPERATURE
from spgdd.selfprompt.memory import on_grid

WIDTH = 32  # channels of the small network
EPSILON = 1e-6  # probabilities keep this distance from 0 and 1


def word_evidence(decoded: Tensor, anchors: Tensor) -> Tensor:
    """Log-odds (B, L, N) of abnormal against normal of decoded patches (B, L, N, J) and anchors (B, 2, J) or (2, J)."""
    anchors = anchors.expand(len(decoded), 2, -1)
    difference = (anchors[:, 1] - anchors[:, 0])[:, None, :, None]  # (B, 1, J, 1)
    length = torch.linalg.vector_norm(decoded, dim=-1, dtype=torch.float32).clamp(min=1e-12)
    return (decoded @ difference.to(decoded.dtype))[..., 0].float() / length / TEMPERATURE


class Comparison(nn.Module):
    """Joins the memory's map and the words' map as log-odds, and corrects the sum by a small convolutional network.

    The network sees, for every patch, the distance to the memory at each tap and scale, the words' log-odds at each
    tap, and those of the memory's best entries there: what looks like damage in a good part too (a thread, a grain) is
    explained away. It sees them as they are and relative to the picture's mean and spread. At first it adds nothing.
    """

    def __init__(self, taps: int, scales: int):
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor([12.0]))  # log-odds per unit of A_mem
        self.trust = nn.Parameter(torch.tensor([0.1]))  # weight of the words' mean log-odds
        self.bias = nn.Parameter(torch.tensor([-4.0]))
        channels = 2 * (taps * scales + 2 * taps)
        self.net = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, 1, 1),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, distances: Tensor, fused: Tensor, words: Tensor, expected: Tensor) -> Tensor:
        """Log-odds (B, N) of a defect.

        ``distances`` (B, L, S, N) and ``fused`` (B, N) as ``Memory`` gives them; ``words`` (B, L, N) log-odds of the
        query's patches and ``expected`` (B, L, N) of the memory's best entries.
        """
        words, expected = words.clamp(-20, 20), expected.clamp(-20, 20)
        plain = self.steepness * fused + self.trust * words.mean(1) + self.bias
        evidence = torch.cat([distances.flatten(1, 2) * 5, words / 5, expected / 5], dim=1)  # (B, C, N)
        relative = F.layer_norm(evidence, evidence.shape[-1:])
        correction = self.net(on_grid(torch.cat([evidence, relative], dim=1)))  # (B, 1, G, G)
        return plain + correction.flatten(1)


def probability(logits: Tensor) -> Tensor:
    """Log-odds -> probability within (EPSILON, 1 - EPSILON), so that no two pictures tie at the end."""
    return logits.sigmoid().clamp(EPSILON, 1 - EPSILON)
