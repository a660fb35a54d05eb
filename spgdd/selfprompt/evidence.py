"""What speaks for a defect at each patch, and the map of pixels that it becomes."""

from typing import NamedTuple

from torch import Tensor

from spgdd.selfprompt.comparison import probability
from spgdd.selfprompt.focuser import enlarge, over_taps


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
