"""Random numbers and noise fields that are pure functions of a seed, the same on a CPU and on a GPU.

Nothing here keeps state: a parameter is a hash of (seed, name), and a noise field is a look-up in one fixed,
tileable atlas. So a photograph can be drawn again from its seeds alone, in any batch, in any order.
"""

import functools
import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024  # pixels a side of the atlas, which repeats
UNITS = 16  # noise units a side: one unit is 64 atlas pixels, and holds 4 x 4 cells
CELLS = 4 * UNITS
CHANNELS = ("grain", "cloud", "smoke", "ridge", "cell", "edge", "id")


class Dice:
    """Named random parameters of B things: ``dice("angle", 0, 3.14)`` is (B, 1, 1), from seed and name."""

    def __init__(self, seeds: Tensor):
        self.seeds = seeds.to(torch.int64)  # (B,)

    def units(self, *names: str) -> Tensor:
        """(B, len(names)) float32, uniform in [0, 1): a hash of 32 bits of each seed and name."""
        h = (self.seeds[:, None] * 0x9E3779B1 + salt(names, self.seeds.device)).bitwise_and_(0xFFFFFFFF)
        for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
            h = h.bitwise_xor_(h >> shift).mul_(factor).bitwise_and_(0xFFFFFFFF)
        return (h >> 8).float() / 2**24

    def unit(self, name: str) -> Tensor:
        """(B,) float32, uniform in [0, 1)."""
        return self.units(name)[:, 0]

    def __call__(self, name: str, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """(B, 1, 1), uniform in [low, high)."""
        return low + (high - low) * self.units(name)[..., None]

    def log(self, name: str, low: float, high: float) -> Tensor:
        """(B, 1, 1), log-uniform: as many small values as large ones."""
        return low * torch.exp(self(name) * math.log(high / low))

    def chance(self, name: str, probability: float) -> Tensor:
        """(B, 1, 1) of zeros and ones."""
        return (self(name) < probability).float()

    def integer(self, name: str, low: int, high: int) -> Tensor:
        """(B, 1, 1) float of whole numbers low..high, both included."""
        return torch.floor(self(name, low, high + 1))

    def split(self, name: str) -> "Dice":
        """Independent dice for a part of the thing."""
        return Dice((self.unit(name) * 2**24).to(torch.int64) + self.seeds * 7919)

    def __getitem__(self, rows: Tensor) -> "Dice":
        """The dice of some of the things."""
        return Dice(self.seeds[rows])


@functools.cache  # a copy to a GPU would wait for all that it has to do
def salt(names: tuple[str, ...], device: torch.device) -> Tensor:
    """(len(names),) int64: what each name adds to the hash."""
    return torch.tensor([zlib.crc32(name.encode()) for name in names], device=device)


def spectral(slope: float, rng: np.random.Generator) -> np.ndarray:
    """(TILE, TILE) tileable noise with a power spectrum of frequency^-slope, spread evenly over 0..1."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(TILE), np.fft.rfftfreq(TILE), indexing="ij"))
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE))) * np.maximum(frequency, 2 / TILE) ** -slope
    field = np.fft.irfft2(spectrum, s=(TILE, TILE))
    ranks = np.empty(field.size, np.float32)
    ranks[np.argsort(field, axis=None)] = np.linspace(0, 1, field.size, dtype=np.float32)
    return ranks.reshape(TILE, TILE)


def cells(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of each atlas pixel to its nearest and second nearest point, and the number of the nearest.

    ``points`` (CELLS, CELLS, 2): where in its cell of a grid, (x, y) in 0..1, each cell's only point lies. The
    nearest point of a pixel is at most 1.42 cells away and the second at most 1.81 (one of its neighbours
    holds it), so that looking two cells far finds both. All three are (TILE, TILE), distances in cells.
    """
    side = TILE // CELLS
    at = (torch.arange(side) + 0.5) / side
    numbers = torch.arange(CELLS**2).view(CELLS, CELLS)
    nearest = torch.full((CELLS, side, CELLS, side), torch.inf)  # squared, until the end
    second, number = nearest.clone(), torch.zeros(nearest.shape, dtype=torch.int64)
    for row in range(-2, 3):
        for column in range(-2, 3):
            x, y = points.roll((-row, -column), (0, 1)).unbind(-1)  # (CELLS, CELLS)
            across = (x[:, None, :, None] + column - at) ** 2  # (CELLS, 1, CELLS, side)
            down = (y[:, None, :, None] + row - at[:, None, None]) ** 2  # (CELLS, side, CELLS, 1)
            distance = across + down  # (CELLS, side, CELLS, side)
            other = numbers.roll((-row, -column), (0, 1))[:, None, :, None]
            number = torch.where(distance < nearest, other, number)
            second = torch.minimum(second, torch.maximum(nearest, distance))
            nearest = torch.minimum(nearest, distance)
    return nearest.sqrt().view(TILE, TILE), second.sqrt().view(TILE, TILE), number.view(TILE, TILE)


@functools.cache
def atlas(device: torch.device) -> Tensor:
    """(C, TILE + 2, TILE + 2) in 0..1: the noise channels, with one pixel of wrap-around at each border."""
    rng = np.random.default_rng(20260)
    nearest, second, number = cells(torch.from_numpy(rng.random((CELLS, CELLS, 2))).float())
    smoke, grain, cloud = (torch.from_numpy(spectral(slope, rng)) for slope in (1.6, 0.3, 1.1))
    ridge = 1 - torch.from_numpy(np.abs(2 * spectral(1.4, rng) - 1))
    identity = torch.from_numpy(rng.random(CELLS**2)).float()[number]
    fields = [grain, cloud, smoke, ridge, nearest.clamp(0, 1), (second - nearest).clamp(0, 1), identity]
    return F.pad(torch.stack(fields)[None], (1, 1, 1, 1), mode="circular")[0].to(device)


def noise(channel: str, x: Tensor, y: Tensor, dice: Dice, name: str) -> Tensor:
    """(B, H, W) noise in 0..1 at the points (x, y), in noise units; each broadcasts to (B, H, W).

    ``dice`` and ``name`` choose the place in the atlas that (0, 0) stands for.
    """
    tiles = atlas(x.device)[CHANNELS.index(channel)][None, None]
    scale = 2 * TILE / (TILE + 2)  # a tile within its border, in the -1..1 of grid_sample
    shape = torch.broadcast_shapes(dice.seeds.shape + (1, 1), x.shape, y.shape)
    grid = torch.empty(*shape, 2, device=x.device)  # (B, H, W, 2)
    for axis, t in enumerate((x, y)):
        t = torch.add(dice(f"{name}.{'xy'[axis]}"), t, alpha=1 / UNITS)
        grid[..., axis] = t.sub_(t.floor()).mul_(scale).sub_(scale / 2)
    return F.grid_sample(tiles.expand(len(grid), -1, -1, -1), grid, align_corners=False)[:, 0]
