"""A model with the interface of ``spgdd.model.SPGDD`` whose patch tokens are the patches' mean colours."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from spgdd.imagebind.preprocess import MEAN, STD
from spgdd.imagebind.towers import ImageFeatures
from spgdd.selfprompt.focuser import enlarge
from spgdd.selfprompt.memory import Memory


class FakeModel:
    def __init__(self, fit="squash"):
        self.profile = SimpleNamespace(name="fake", fit=fit)
        self.standins = ()
        self.memory = Memory(taps=1, width=4)
        self.language = SimpleNamespace(generate=self.generate)
        self.encoded = 0  # pictures
        self.asked = []  # (question, history)

    def encode(self, images):
        self.encoded += len(images)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        colours = F.avg_pool2d(images * std + mean, 14).flatten(2).transpose(1, 2)  # (B, N, 3)
        tokens = torch.cat([colours, torch.full((*colours.shape[:2], 1), 0.5)], dim=-1)
        return ImageFeatures(F.normalize(tokens.mean(1), dim=-1), tokens[:, None])

    def anomaly_map(self, features, product="object", bank=None):
        if bank is not None:
            return self.memory.anomaly_map(features.patches, bank).detach()
        return enlarge(features.patches[:, 0, :, :1].transpose(1, 2).unflatten(2, (16, 16)))  # redness

    def prompt_tokens(self, anomaly_map, features):
        return anomaly_map.flatten(1).max(1).values.view(-1, 1, 1)

    def generate(self, embedding, question, history=(), prompt_tokens=None, max_new_tokens=128):
        self.asked.append((question, tuple(history)))
        answer = "Yes, there is an anomaly." if prompt_tokens.max() > 0.1 else "No, there is no anomaly."
        return SimpleNamespace(text=answer)
