"""What memory and words say of each patch, joined as one probability of a defect, and the map that it becomes."""

from math import log2
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spgdd.selfprompt.focuser import TEMPERATURE, enlarge, over_taps

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

    The words' are the sum of ``word_evidence`` over the taps, each by its ``trust``; the memory's are ``steepness`` x
    A_mem, and ``bias`` is what a normal patch has of both. The more normal images, the closer is the nearest patch of
    theirs, to a defect too: ``per_doubling`` gives back what each doubling of their number takes. Before training the
    words have no say: an untrained decoder is very sure of nothing.
    """

    def __init__(self, taps: int):
        super().__init__()
        self.steepness = nn.Parameter(torch.tensor([6.0]))
        self.bias = nn.Parameter(torch.tensor([-3.3]))
        self.trust = nn.Parameter(torch.zeros(taps))
        self.per_doubling = nn.Parameter(torch.zeros(1))

    def forward(self, fused: Tensor, words: Tensor, normals: int = 1) -> Tensor:
        """Log-odds (B, N) of a defect.

        From A_mem (B, N) on the patch grid, of a memory of so many ``normals``, and the words' evidence (B, L, N).
        """
        said = torch.einsum("bln,l->bn", words.clamp(-SURE, SURE), self.trust)
        return self.steepness * fused + said + self.bias + self.per_doubling * log2(normals)

    def tap_weights(self) -> Tensor:
        """Weights (L,) of the taps where the words are alone: those of ``trust``, equal before training."""
        positive = self.trust.clamp(min=0) + EPSILON
        return positive / positive.sum()


def probability(logits: Tensor) -> Tensor:
    """Log-odds -> probability within (EPSILON, 1 - EPSILON), so that no two pictures tie at the end."""
    return logits.sigmoid().clamp(EPSILON, 1 - EPSILON)


class Evidence(NamedTuple):
    """Patch values (B, C, G, G) float32 before they are enlarged.

    kind "distance": C = 1, to the nearest normal patch, 0 to 2 (AnomalyGPT's few-shot map). "log-odds": C = 1, of
    memory and words joined. "words": C = 2 L, the logits of normal and abnormal at each of L taps; ``tap_weights``
    (L,) are those of the taps, None: equal.
    """

    values: Tensor
    kind: str
    tap_weights: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Evidence":
        """Of some of the B images."""
        return self._replace(values=self.values[rows])

    def map(self, patch: int = 14) -> Tensor:
        """Anomaly map (B, 1, S, S) float32, higher where stranger: 0 to 2 of distances, else a probability.

        S = G * ``patch``. Values are enlarged first and turned into probabilities then, as AnomalyGPT does.
        """
        pixels = enlarge(self.values, patch)
        if self.kind == "words":
            return over_taps(pixels.unflatten(1, (-1, 2)).softmax(2), self.tap_weights)
        return probability(pixels) if self.kind == "log-odds" else pixels
