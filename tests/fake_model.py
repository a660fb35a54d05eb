"""A model with the interface of ``spgdd.model.SPGDD`` whose patch tokens are the patches' mean colours."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from spgdd.imagebind.preprocess import MEAN, STD
from spgdd.imagebind.towers import ImageFeatures
from spgdd.profiles import get_profile
from spgdd.selfprompt.focuser import enlarge
from spgdd.selfprompt.memory import Memory, MemoryBank, on_grid

GREY = (100, 110, 120)


def part(size=(300, 300), marks=(), seed=0):
    """A grey part with grain; ``marks`` are (x, y, half width, half height) in pixels, in red."""
    grain = np.random.default_rng(seed).normal(0, 6, (size[1], size[0], 3))
    picture = np.clip(np.array(GREY) + grain, 0, 255).astype(np.uint8)
    for x, y, dx, dy in marks:
        picture[int(y - dy) : int(y + dy), int(x - dx) : int(x + dx)] = (190, 60, 60)
    return Image.fromarray(picture)


class FakeModel:
    def __init__(self, fit="squash", **profile):
        plain = {"name": "fake", "fit": fit, "comparison": False, "score_share": 0.0, "joint": 1}
        self.profile = replace(get_profile("mini"), **plain | profile)
        self.standins = ()
        self.memory = Memory(taps=1, width=4)
        self.comparison = self.image_decoder = self.abnormal_prompts = None
        self.language = SimpleNamespace(generate=self.generate)
        self.encoded = 0  # pictures
        self.asked = []  # (question, history)

    def encode(self, images):
        self.encoded += len(images)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        colours = F.avg_pool2d(images * std + mean, 14).flatten(2).transpose(1, 2)  # (B, N, 3)
        tokens = torch.cat([colours, torch.full((*colours.shape[:2], 1), 0.5)], dim=-1)
        return ImageFeatures(F.normalize(tokens.mean(1), dim=-1), tokens[:, None])

    def build_bank(self, patches, product, **options):
        return replace(self.memory.build(patches, **options), product=product, profile="fake", imagebind="eyes")

    def load_bank(self, path):
        return MemoryBank.load(path, "fake", "eyes")

    @torch.no_grad()
    def anomaly_map(self, features, product="object", bank=None, without=None):
        if bank is None:
            return enlarge(features.patches[:, 0, :, :1].transpose(1, 2).unflatten(2, (16, 16)))  # redness
        barred = None if without is None else bank.origin == without[:, None, None, None]
        distances, _ = self.memory.compare(features.patches, bank.tokens[None], barred)
        return enlarge(on_grid(self.memory.fuse(distances))[:, None])

    def prompt_tokens(self, anomaly_map, patches, entries=None):
        return anomaly_map.flatten(1).max(1).values.view(-1, 1, 1)

    def generate(self, embedding, question, history=(), prompt_tokens=None, max_new_tokens=128):
        self.asked.append((question, tuple(history)))
        answer = "Yes, there is an anomaly." if prompt_tokens.max() > 0.1 else "No, there is no anomaly."
        return SimpleNamespace(text=answer, yes=float(answer.startswith("Yes")))
