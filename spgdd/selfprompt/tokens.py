"""Prompt tokens: what the language model is told of the map, and of the comparison with normal images."""

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (4, 16, 64, 256, 1024)  # of the prompt learner's convolutions in AnomalyGPT
CELLS = 3  # side of the grid of places that answers speak of: "top left" to "bottom right"
SPREAD = 0.02  # standard deviation of LLaMA's token embeddings, and of these tokens before training


class PromptLearner(nn.Module):
    """Anomaly map (B, 1, 224, 224), about 0 to 1 -> prompt tokens (B, 18, H) for a language model of width H.

    The first 9 tokens are learned and the same for every image; the other 9 describe the cells of a 3x3 grid
    over the map, row by row. ``channels`` are those of the five convolutions, by default AnomalyGPT's.
    """

    def __init__(self, hidden: int, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        self.base_prompts = nn.Parameter(torch.randn(CELLS**2, hidden) * SPREAD)
        channels = (1, *channels)
        stages: list[nn.Module] = []
        for inner, outer in zip(channels, channels[1:], strict=False):
            stages += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.meta_net = nn.Sequential(*stages, nn.Conv2d(channels[-1], hidden, 5))

    def forward(self, anomaly_map: Tensor) -> Tensor:
        # The last convolution, 5x5 with many channels, is a matrix product: cuDNN's kernel for its gradient is slow.
        seen, last = self.meta_net[:-1](anomaly_map), self.meta_net[-1]  # (B, C, 7, 7)
        windows = F.unfold(seen, last.kernel_size).transpose(1, 2)  # (B, 9, C * 25)
        cells = F.linear(windows, last.weight.flatten(1), last.bias)  # (B, 9, H)
        return torch.cat([self.base_prompts.expand(len(cells), -1, -1), cells], dim=1)


class MemoryTokens(nn.Module):
    """Memory tokens of the MSSPMM: T on the most anomalous patches, strangest first, then C on the bank as a whole.

    A token is a learned base, plus what it reports where there is a bank; without one the base alone says so. Both
    kinds look at the last tap, whose differences tell kinds of defects apart better than those of all taps together.

    (i) A patch's token reports the patch less its nearest entry. They are standardised before the subtraction and not
    after: a patch as in the bank reports nothing. It always carries its place, between learned vectors of 3x3 cells.
    (ii) A context token is a learned query that attends over the entries (multi-head attention, no biases).
    """

    def __init__(self, width: int, hidden: int, worst: int = 4, context: int = 4, heads: int = 4):
        super().__init__()
        self.worst, self.heads = worst, heads
        self.base = nn.Parameter(torch.randn(worst + context, hidden) * SPREAD)
        self.places = nn.Parameter(torch.randn(hidden, CELLS, CELLS) * SPREAD)
        self.difference = nn.Linear(width, hidden, bias=False)
        self.queries = nn.Parameter(torch.randn(context, width))
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.context = nn.Linear(width, hidden, bias=False)
        for layer in (self.difference, self.context):  # standardised inputs come out with about the spread of the base
            nn.init.normal_(layer.weight, std=SPREAD / width**0.5)

    def forward(
        self, patches: Tensor, anomaly_map: Tensor, entries: Tensor | None = None, nearest: Tensor | None = None
    ) -> Tensor:
        """Patch tokens (B, L, N, D) and their map (B, 1, 224, 224) -> (B, T + C, H) float32.

        ``entries`` (G, M, D) of G banks at the last tap, B / G images in a row for each; ``nearest`` (B, N) says which
        entry is the closest to each patch. The order of the entries does not matter. None: no bank.
        """
        patches, grid = patches[:, -1], isqrt(patches.shape[2])
        scores = F.adaptive_avg_pool2d(anomaly_map.float(), grid).flatten(1)  # (B, 1, 224, 224) -> (B, N)
        worst = scores.topk(self.worst, dim=1).indices  # (B, T)
        cells = torch.eye(CELLS**2, device=scores.device).unflatten(1, (CELLS, CELLS))[None]
        weights = F.interpolate(cells, (grid, grid), mode="bilinear")[0].flatten(1).T  # (N, 9), of the cells
        strange = self.base[: self.worst] + weights[worst] @ self.places.flatten(1).T  # (B, T, H)
        usual = self.base[self.worst :].expand(len(patches), -1, -1)  # (B, C, H)
        if entries is not None:
            turns = len(patches) // len(entries)  # images of a bank
            images = torch.arange(len(patches), device=patches.device)[:, None]
            match = entries[images // turns, nearest.gather(1, worst)]  # (B, T, D)
            strange = strange + self.difference(standardise(patches[images, worst]) - standardise(match))
            usual = usual + self.context(self.attend(entries)).repeat_interleave(turns, dim=0)
        return torch.cat([strange, usual], dim=1)

    def attend(self, entries: Tensor) -> Tensor:
        """What the queries find in each bank, before the projection to H: (G, M, D) -> (G, C, D)."""
        queries = self.queries.expand(len(entries), -1, -1)
        parts = (queries, *self.key_value(standardise(entries)).chunk(2, dim=-1))
        heads = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # each (G, heads, ., D/heads)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def standardise(tokens: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the channels, float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])
