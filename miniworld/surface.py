"""What product families are made of: a surface, and functions of position that shape and colour it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from miniworld.noise import Dice


class Surface(NamedTuple):
    """A product before light and camera."""

    albedo: Tensor  # (B, 3, H, W), about 0..1
    height: Tensor  # (B, H, W), in product units; shading comes from its slope
    inside: Tensor | None = None  # (B, H, W), 1 on the object, 0 on the background; None: all of it


def colour(dice: Dice, name: str, low: float = 0.05, high: float = 0.95, saturation: float = 0.6) -> Tensor:
    """(B, 3, 1, 1) in 0..1: a random colour of brightness low..high; every third one is grey."""
    parts = dice.units(*(f"{name}.{part}" for part in ("hue", "value", "saturation", "coloured")))  # (B, 4)
    hue, value, strength, coloured = parts[..., None].unbind(1)  # (B, 1) each
    strength = saturation * strength * (coloured < 0.67)
    phase = torch.arange(3, device=hue.device) / 3
    wheel = (3 * ((hue + phase) % 1 - 0.5).abs() - 0.25).clamp(0, 1)  # (B, 3)
    return ((low + (high - low) * value) * (1 - strength * (1 - wheel)))[..., None, None]


def mix(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Blend of two colours (B, 3, 1 or H, 1 or W) by a field (B, H, W): ``a`` where the weight is 0."""
    return torch.lerp(a, b, weight[:, None])


def fill(distance: Tensor, softness: float | Tensor = 0.02) -> Tensor:
    """1 where a signed distance is negative, 0 where it is positive, with a soft edge."""
    return (distance / -softness).add_(0.5).clamp_(0, 1)


def wave(t: Tensor) -> Tensor:
    """Cosine of period 1, in 0..1."""
    return torch.cos(2 * math.pi * t).mul_(0.5).add_(0.5)


def fold(t: Tensor) -> Tensor:
    """Distance to the nearest whole number, 0..0.5."""
    return (t - torch.round(t)).abs_()


def box(x: Tensor, y: Tensor, half_x, half_y, corner=0.0) -> Tensor:
    """Signed distance to a box with rounded corners."""
    qx, qy = x.abs() - half_x + corner, y.abs() - half_y + corner
    return torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0) - corner


def polygon(x: Tensor, y: Tensor, sides: Tensor, radius: Tensor) -> Tensor:
    """Signed distance (exact along the edges) to a regular polygon."""
    angle = torch.atan2(y, x) * sides / (2 * math.pi)
    folded = (angle - torch.round(angle)) * 2 * math.pi / sides
    return torch.hypot(x, y) * torch.cos(folded) - radius
