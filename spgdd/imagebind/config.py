"""Sizes of the ImageBind towers, the published "huge" model and the mini one of this course, and what they return."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

MODALITIES = ("vision", "text", "audio", "depth", "thermal", "imu")  # of the published file


class ImageFeatures(NamedTuple):
    """What the vision tower says about a batch of images."""

    embedding: Tensor  # (B, J), unit length
    patches: Tensor  # (B, L, N, D), outputs of the tapped blocks without CLS, row by row of the image


@dataclass(frozen=True)
class TowerConfig:
    width: int  # channels of a token
    depth: int  # transformer blocks
    heads: int  # attention heads


@dataclass(frozen=True)
class ImageBindConfig:
    vision: TowerConfig
    text: TowerConfig
    joint: int = 1024  # J, width of the space that all modalities share
    image_size: int = 224  # side in pixels for which the position embeddings were made
    patch: int = 14  # side of a vision patch in pixels
    vocab_size: int = 49408  # text tokens, the last two being start and end of text
    context: int = 77  # length of a text in tokens
    taps: tuple[int, ...] = (7, 15, 23, 31)  # vision blocks (from 0) whose outputs are the patch tokens


# Sizes of imagebind_huge.pth (Girdhar et al. 2023, "ImageBind: One Embedding Space To Bind Them All").
HUGE = ImageBindConfig(vision=TowerConfig(1280, 32, 16), text=TowerConfig(1024, 24, 16))
MINI = ImageBindConfig(
    vision=TowerConfig(256, 8, 4),
    text=TowerConfig(192, 4, 4),
    joint=256,
    vocab_size=2048,
    taps=(1, 3, 5, 7),
)
