"""Random numbers and noise fields that are pure functions of a seed, the same on a CPU and on a GPU.

Nothing here keeps state: a parameter is a hash of (seed, name), and a noise field is a look-up in one fixed, tileable
atlas. So a photograph can be drawn again from its seeds alone, in any batch, in any order.
"""

import functools
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

TILE = 1024  # pixels a side of the atlas, which repeats
UNITS = 16  # noise units a side: one unit is 64 atlas pixels, and holds about 4 x 4 cells
CHANNELS = ("grain", "cloud", "smoke", "ridge", "cell", "edge", "id")


class Dice:
    """Named random parameters of B things: ``dice("angle", 0, 3.14)`` is (B, 1, 1), a function of seed and name."""

    def __init__(self, seeds: Tensor):
        self.seeds = seeds.to(torch.int64)  # (B,)

    def unit(self, name: str) -> Tensor:
        """(B,) float32, uniform in [0, 1)."""
        h = self.seeds * 0x9E3779B1 + zlib.crc32(name.encode())
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
            h = ((h ^ ((h & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
        return (h >> 8).to(torch.float32) / 2**24

    def __call__(self, name: str, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """(B, 1, 1), uniform in [low, high)."""
        return low + (high - low) * self.unit(name)[:, None, None]

    def log(self, name: str, low: float, high: float) -> Tensor:
        """(B, 1, 1), log-uniform: as many small values as large ones."""
        return low * torch.exp(self(name) * float(np.log(high / low)))

    def chance(self, name: str, probability: float) -> Tensor:
        """(B, 1, 1) of zeros and ones."""
        return (self(name) < probability).float()

    def integer(self, name: str, low: int, high: int) -> Tensor:
        """(B, 1, 1) float of whole numbers low..high, both included."""
        return torch.floor(self(name, low, high + 1))

    def split(self, name: str) -> "Dice":
        """Independent dice for a part of the thing."""
        return Dice((self.unit(name) * 2**24).to(torch.int64) + self.seeds * 7919)


def spectral(slope: float, rng: np.random.Generator) -> np.ndarray:
    """Tileable noise with a power spectrum of frequency^-slope, spread evenly over 0..1."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(TILE), np.fft.rfftfreq(TILE), indexing="ij"))
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE))) * np.maximum(frequency, 2 / TILE) ** -slope
    field = np.fft.irfft2(spectrum, s=(TILE, TILE))
    ranks = np.empty(field.size, np.float32)
    ranks[np.argsort(field, axis=None)] = np.linspace(0, 1, field.size, dtype=np.float32)
    return ranks.reshape(TILE, TILE)


@functools.cache
def atlas(device: torch.device) -> Tensor:
    """(C, TILE + 2, TILE + 2): the noise channels, with one pixel of wrap-around at each border."""
    rng = np.random.default_rng(20260)
    cells = 4 * UNITS
    grid = np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), -1).reshape(-1, 2)
    points = (grid + rng.random((cells * cells, 2))) * (TILE / cells) % TILE
    pixels = np.stack(np.meshgrid(np.arange(TILE), np.arange(TILE)), -1).reshape(-1, 2) + 0.5
    distance, index = cKDTree(points, boxsize=TILE).query(pixels, k=2)
    distance = (distance / (TILE / cells)).reshape(TILE, TILE, 2)
    cloud = spectral(1.6, rng)
    fields = [
        spectral(0.3, rng),
        spectral(1.1, rng),
        cloud,
        1 - np.abs(2 * spectral(1.4, rng) - 1),
        np.clip(distance[..., 0], 0, 1),
        np.clip(distance[..., 1] - distance[..., 0], 0, 1),
        rng.random(len(points))[index[:, 0]].reshape(TILE, TILE),
    ]
    tiles = torch.from_numpy(np.stack(fields).astype(np.float32))
    return F.pad(tiles[None], (1, 1, 1, 1), mode="circular")[0].to(device)


def noise(channel: str, x: Tensor, y: Tensor, dice: Dice | None = None, name: str = "") -> Tensor:
    """Noise in 0..1 at the points (x, y), each (B, H, W), in noise units; ``dice`` and ``name`` choose a place."""
    if dice is not None:
        x, y = x + dice(name + ".x", 0, UNITS), y + dice(name + ".y", 0, UNITS)
    grid = torch.stack((x, y), -1) / UNITS
    grid = (grid - torch.floor(grid)) * TILE + 1  # (B, H, W, 2), atlas pixels
    tiles = atlas(x.device)[CHANNELS.index(channel)][None, None].expand(len(x), -1, -1, -1)
    return F.grid_sample(tiles, grid * (2 / (TILE + 2)) - 1, mode="bilinear", align_corners=False)[:, 0]
