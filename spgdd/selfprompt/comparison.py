"""The comparison of a picture with the memory and with the words, joined as one probability of a defect."""

import torch
from torch import Tensor, nn

from spgdd.selfprompt.focuser import TEMPERATURE

EPSILON = 1e-6  # probabilities keep this distance from 0 and 1
SURE = 20.0  # the words' log-odds count up to here


def word_evidence(decoded: Tensor, anchors: Tensor) -> Tensor:
    """Log-odds (B, L, N) of abnormal against normal of decoded patches (B, L, N, J) and anchors (B, 2, J) or (2, J)."""
    anchors = anchors.expand(len(decoded), 2, -1)
    difference = (anchors[:, 1] - anchors[:, 0])[:, None, :, None]  # (B, 1, J, 1)
    length = torch.linalg.vector_norm(decoded, dim=-1, dtype=torch.float32).clamp(min=1e-12)
    return (decoded @ difference.to(decoded.dtype))[..., 0].float() / length / TEMPERATURE


class Comparison(nn.Module):
    """Two independent witnesses: their log-odds add up (naive Bayes).

    The words' are the mean over the taps of ``word_evidence``; the memory's are ``steepness`` x A_mem, and ``bias`` is
    what a normal patch has of both.
    """

    def __init__(self):
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor([8.0]))
        self.bias = nn.Parameter(torch.tensor([-3.3]))

    def forward(self, fused: Tensor, words: Tensor) -> Tensor:
        """Log-odds (B, N) of a defect from A_mem on the patch grid (B, N) and the words' evidence (B, L, N)."""
        return self.steepness * fused + words.clamp(-SURE, SURE).mean(1) + self.bias


def probability(logits: Tensor) -> Tensor:
    """Log-odds -> probability within (EPSILON, 1 - EPSILON), so that no two pictures tie at the end."""
    return logits.sigmoid().clamp(EPSILON, 1 - EPSILON)
