"""The prompt learner: an anomaly map becomes tokens of the language model (network of AnomalyGPT)."""

import torch
from torch import Tensor, nn

PLACES = 9  # the convolutions leave a 3x3 grid, and as many learned tokens stand before it
CHANNELS = (4, 16, 64, 256, 1024)


class PromptLearner(nn.Module):
    """Anomaly map (B, 1, 224, 224), about 0 to 1 -> prompt tokens (B, 18, H) for a language model of width H.

    The first 9 tokens are learned and the same for every image; the other 9 describe the cells of a 3x3 grid
    over the map, row by row. ``channels`` are those of the five convolutions, by default AnomalyGPT's.
    """

    def __init__(self, hidden: int, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        self.base_prompts = nn.Parameter(torch.randn(PLACES, hidden) * 0.02)  # spread of LLaMA embeddings
        channels = (1, *channels)
        stages: list[nn.Module] = []
        for inner, outer in zip(channels, channels[1:], strict=False):
            stages += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.meta_net = nn.Sequential(*stages, nn.Conv2d(channels[-1], hidden, 5))

    def forward(self, anomaly_map: Tensor) -> Tensor:
        cells = self.meta_net(anomaly_map).flatten(2).transpose(1, 2)  # (B, H, 3, 3) -> (B, 9, H)
        return torch.cat([self.base_prompts.expand(len(cells), -1, -1), cells], dim=1)
