"""ImageBind with all six senses: audio, depth, thermal and IMU beside the image and the text that SPGDD-GPT uses.

    from imagebind_senses import WHOLE, AllSenses
    model = load_imagebind("imagebind_huge.pth", WHOLE, MODALITIES, kind=AllSenses)
    model.encode("audio", spectrograms)

The published file holds all of them, so stand-ins for it do too, and tests compare each with the published outputs.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spgdd.imagebind import HUGE, ImageBind, ImageBindConfig, TowerConfig
from spgdd.imagebind.towers import GridPreprocessor, LayerNorm, Trunk, VisionStem

LOGIT_SCALES = {"audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
PATCH_GRIDS = {"audio": (12, 19), "depth": (14, 14), "thermal": (14, 14)}  # rows and columns of 16 px patches
IMU_CHANNELS, IMU_SAMPLES, IMU_WINDOW = 6, 2000, 8


@dataclass(frozen=True)
class SensesConfig(ImageBindConfig):
    others: Mapping[str, TowerConfig] = field(default_factory=dict, hash=False)  # audio, depth, thermal, imu


WHOLE = SensesConfig(
    **vars(HUGE),
    others={
        "audio": TowerConfig(768, 12, 12),
        "depth": TowerConfig(384, 12, 8),
        "thermal": TowerConfig(768, 12, 12),
        "imu": TowerConfig(512, 6, 8),
    },
)


class BiasedAttention(nn.MultiheadAttention):
    """Self-attention with one learned key and value more, that every token may attend to."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, add_bias_kv=True, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0]


class ClipStem(VisionStem):
    """Patches of images (B, 3, H, W) or of 2-frame clips (B, 3, 2, H, W) -> (B, gh, gw, D)."""

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.ndim == 4:
            return super().forward(pixels)
        return self.proj(pixels).squeeze(2).permute(0, 2, 3, 1)  # (B, D, 1, gh, gw) -> (B, gh, gw, D)


class MapStem(nn.Module):
    """Patches of one-channel maps (B, 1, H, W) -> (B, gh, gw, D): spectrogram, depth or thermal image."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(1, width, 16, stride=stride, bias=False)
        self.norm_layer = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm_layer(self.proj(maps).permute(0, 2, 3, 1))


class IMUPreprocessor(nn.Module):
    """Signal (B, 6, 2000) -> CLS and one token per window of 8 samples, (B, 251, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + IMU_SAMPLES // IMU_WINDOW, width).normal_(std=0.02))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        project = nn.Linear(IMU_CHANNELS * IMU_WINDOW, width, bias=False)
        self.imu_stem = nn.Sequential(OrderedDict(proj=project, norm_layer=nn.LayerNorm(width)))

    def forward(self, signal: Tensor) -> Tensor:
        windows = signal.unfold(-1, IMU_WINDOW, IMU_WINDOW).transpose(1, 2)  # (B, 250, 6, 8)
        tokens = self.imu_stem(windows.flatten(2))  # (B, 250, D)
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed


class FixedScale(nn.Module):
    """Multiply by exp(log_logit_scale), which is not learned."""

    def __init__(self, scale: float):
        super().__init__()
        self.log_logit_scale = nn.Buffer(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_logit_scale.exp()


class AllSenses(ImageBind):
    """ImageBind of a ``SensesConfig``; ``modalities`` are names out of ``spgdd.imagebind.MODALITIES``."""

    def build_tower(self, modality: str) -> Iterator[nn.Module]:
        if modality not in self.config.others:
            preprocessor, *rest = super().build_tower(modality)
            if modality == "vision":
                preprocessor.rgbt_stem = ClipStem(self.config.vision.width, self.config.patch)
            yield from (preprocessor, *rest)
            return
        size = self.config.others[modality]
        if modality == "imu":
            yield IMUPreprocessor(size.width)
        else:
            stem = MapStem(size.width, stride=10 if modality == "audio" else 16)
            name = "depth_stem" if modality == "depth" else "rgbt_stem"
            yield GridPreprocessor(size.width, name, stem, PATCH_GRIDS[modality])
        trunk = Trunk(size, pre_norm=False)
        for block in trunk.blocks:
            block.attn = BiasedAttention(size.width, size.heads)
        yield trunk
        unused = [nn.Identity()] * (2 if modality == "imu" else 1)  # CLS token picked; imu: dropout
        yield nn.Sequential(LayerNorm(size.width), *unused, nn.Linear(size.width, self.config.joint, bias=False))
        yield nn.Sequential(nn.Identity(), FixedScale(LOGIT_SCALES[modality]))

    def encode(self, modality: str, inputs: Tensor) -> Tensor:
        """Embedding (B, J) of any modality: unit length for vision, else as long as its logit scale.

        Inputs: vision (B, 3, H, W), text ids (B, 77), audio (B, 1, 128, 204), depth and thermal
        (B, 1, 224, 224), imu (B, 6, 2000). With clips as second dimension, as in (B, clips, 1, 128, 204) for
        audio or (B, clips, 3, 2, H, W) for video, it is their mean, not normalised again (as published).
        """
        if inputs.ndim < 5:
            return self._run_tower(modality, inputs)[0]
        embedding = self._run_tower(modality, inputs.flatten(0, 1))[0]  # (B*clips, J)
        return embedding.unflatten(0, inputs.shape[:2]).mean(1)
