"""Pictures to ImageBind pixels, bit for bit as published (torchvision's transforms of PIL images)."""

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def to_pixels(image: Image.Image, fit: str = "crop", size: int = 224) -> Tensor:
    """uint8 RGB (3, size, size).

    fit: "crop" resizes the short side to ``size`` and cuts out the centre (ImageBind); "squash" resizes both
    sides (AnomalyGPT's training and web demo). Both are PIL's antialiased bicubic. EXIF orientation and
    transparency are ignored: ``spgdd.images.read_image`` deals with both beforehand.
    """
    image = image.convert("RGB")
    if fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif fit == "crop":
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)  # a half goes to the even number
        image = image.crop((left, top, left + size, top + size))
    else:
        raise ValueError(f'fit {fit!r} is unknown; choose "crop" or "squash"')
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (S, S, 3) -> (3, S, S)


def normalise(pixels: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """uint8 RGB (B, 3, S, S) -> float32 of about zero mean and unit deviation, on the same device."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels.float() / 255).sub_(mean).div_(std)


def preprocess(images: Iterable[Image.Image], fit: str = "crop", size: int = 224) -> Tensor:
    """Pictures -> float32 (B, 3, size, size) for ``ImageBind.encode_image``."""
    return normalise(torch.stack([to_pixels(image, fit, size) for image in images]))
