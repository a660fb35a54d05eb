"""The real network around a vision tower whose patch tokens are the patches' mean colours, and a text of its own."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from spgdd.imagebind.preprocess import MEAN, STD
from spgdd.imagebind.towers import ImageFeatures
from spgdd.model import SPGDD
from spgdd.profiles import get_profile
from spgdd.selfprompt import Evidence, Memory
from spgdd.selfprompt.memory import on_grid

GREY = (100, 110, 120)


def part(size=(300, 300), marks=(), seed=0):
    """A grey part with grain; ``marks`` are (x, y, half width, half height) in pixels, in red."""
    grain = np.random.default_rng(seed).normal(0, 6, (size[1], size[0], 3))
    picture = np.clip(np.array(GREY) + grain, 0, 255).astype(np.uint8)
    for x, y, dx, dy in marks:
        picture[int(y - dy) : int(y + dy), int(x - dx) : int(x + dx)] = (190, 60, 60)
    return Image.fromarray(picture)


class FakeModel(SPGDD):
    fingerprint = "eyes"

    def __init__(self, fit="squash", **profile):
        torch.nn.Module.__init__(self)
        plain = {"name": "fake", "fit": fit, "comparison": False, "score_share": 0.0, "joint": 1}
        self.profile = replace(get_profile("mini"), **plain | profile)
        self.standins = ()
        self.memory = Memory(taps=1, width=4)
        self.comparison = self.image_decoder = self.abnormal_prompts = None
        self.vision = SimpleNamespace(encode_image=self.encode_image, mean=MEAN, std=STD)
        self.language = SimpleNamespace(stream=self.stream)
        self.encoded = 0  # pictures
        self.asked = []  # (question, history)

    def encode_image(self, images):
        self.encoded += len(images)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        colours = F.avg_pool2d(images * std + mean, 14).flatten(2).transpose(1, 2)  # (B, N, 3)
        tokens = torch.cat([colours, torch.full((*colours.shape[:2], 1), 0.5)], dim=-1)
        return ImageFeatures(F.normalize(tokens.mean(1), dim=-1), tokens[:, None])

    def evidence(self, patches, product="object", bank=None, without=None):
        if bank is None:  # redness
            return Evidence(on_grid(patches[:, 0, :, 0])[:, None], "distance")
        return super().evidence(patches, product, bank, without)

    def prompt_tokens(self, anomaly_map, patches, entries=None):
        return anomaly_map.flatten(1).max(1).values.view(-1, 1, 1)

    def stream(self, embedding, question, history=(), prompt_tokens=None, max_new_tokens=128, **options):
        self.asked.append((question, tuple(history)))
        answer = "Yes, there is an anomaly." if prompt_tokens.max() > 0.1 else "No, there is no anomaly."
        for end in (3, len(answer)):
            yield SimpleNamespace(text=answer[:end], yes=float(answer.startswith("Yes")))
