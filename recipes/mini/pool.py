"""A pool of generated photographs on the training device, renewed bit by bit while training draws from it.

A group is one product: two good photographs, then two of it damaged. Drawing a photograph costs about as much as a
training step on it, so each is used several times, each time turned, flipped and recoloured at random.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miniworld import FAMILIES
from miniworld.world import (
    HELD_OUT_FAMILIES,
    HELD_OUT_TYPES,
    TYPES,
    areas_and_centres,
    photograph,
    possible_types,
)
from spgdd.imagebind.preprocess import MEAN, STD

GROUP = 4
TRAIN_FAMILIES = tuple(name for name in FAMILIES if name not in HELD_OUT_FAMILIES)
TOWER_FAMILIES = (  # what the shipped tower learned from: with the others it did worse on photographs (README.md)
    "brushed_metal", "weave", "wood", "concrete", "asphalt", "mesh", "paper", "cast_metal", "felt", "pattern",
    "circuit_board", "nut", "screw", "bottle_top", "pill", "capsule", "connector", "ring",
)  # fmt: skip
TRAIN_TYPES = tuple(name for name in TYPES if name not in HELD_OUT_TYPES)


class Batch(NamedTuple):
    pixels: Tensor  # (G, 4, 3, S, S) normalised
    coverage: Tensor  # (G, 4, 16, 16) share of each patch that is defective
    types: Tensor  # (G, 4) index into TYPES, -1 good
    cells: Tensor  # (G, 4) 0..8 place of a single defect, -1 where there is none or several
    families: Tensor  # (G,) index into FAMILIES


class Pool:
    """``groups`` products of the given families. ``renew(n)`` draws n more in place of the oldest.

    On a GPU they are drawn beside whatever the device is doing, and take their places when that is done.
    """

    def __init__(
        self, groups: int, device, seed: int, families: Sequence[str], types: Sequence[str], size: int,
        disturb: float, coarse: float,
    ):  # fmt: skip
        self.families, self.device, self.size, self.grid = families, device, size, size // 14
        self.disturb, self.coarse = disturb, coarse
        self.generator = torch.Generator().manual_seed(seed)
        self.kinds = {name: torch.tensor([i for i in possible_types(name) if TYPES[i] in types]) for name in families}
        self.images = torch.zeros(groups, GROUP, 3, size, size, dtype=torch.uint8, device=device)
        self.coverage = torch.zeros(groups, GROUP, self.grid, self.grid, dtype=torch.float16, device=device)
        self.types = torch.zeros(groups, GROUP, dtype=torch.long, device=device)
        self.single = torch.zeros(groups, GROUP, dtype=torch.bool, device=device)
        self.family = torch.zeros(groups, dtype=torch.long, device=device)
        self.next, self.turn = 0, []
        self.mean, self.std = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, STD))
        self.plain = torch.arange(3, device=device)
        self.beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def renew(self, count: int) -> None:
        """Draw ``count`` products of one family; all families come equally often, in changing order."""
        if not self.turn:
            self.turn = torch.randperm(len(self.families), generator=self.generator).tolist()
        name = self.families[self.turn.pop()]
        with torch.cuda.stream(self.beside):  # without a GPU this does nothing
            drawn = self.draw(name, count)
        if self.beside:
            torch.cuda.current_stream().wait_stream(self.beside)
            for value in drawn:
                value.record_stream(torch.cuda.current_stream())
        at = torch.arange(self.next, self.next + count, device=self.device) % len(self.images)
        self.next = (self.next + count) % len(self.images)
        for kept, value in zip((self.images, self.coverage, self.types, self.single), drawn, strict=True):
            kept[at] = value.unflatten(0, (count, GROUP))
        self.family[at] = list(FAMILIES).index(name)

    def draw(self, name: str, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, coverage, types, and whether there is a single defect, of ``count`` * GROUP photographs."""
        seeds = torch.randint(2**31, (count, 1 + GROUP), generator=self.generator)
        kinds = self.kinds[name][torch.randint(len(self.kinds[name]), (count, GROUP), generator=self.generator)]
        kinds[:, :2] = -1
        shots = photograph(
            name,
            seeds[:, :1].expand(-1, GROUP).flatten().to(self.device),
            seeds[:, 1:].flatten().to(self.device),
            kinds.flatten().to(self.device),
            self.size,
        )
        coverage = F.avg_pool2d(shots.masks.any(1).float()[:, None], 14)[:, 0].half()
        return shots.images, coverage, shots.types, shots.masks.flatten(2).any(2).sum(1) == 1

    def batch(self, groups: int, smaller: int = 1) -> Batch:
        """Groups at random: each turned and flipped as a whole, recoloured as a whole, disturbed one by one.

        The pictures are so many times ``smaller`` than they were drawn.
        """
        pick = torch.randint(len(self.images), (groups,), device=self.device)
        x = self.images[pick].float() / 255
        coverage = self.coverage[pick].float()
        if smaller > 1:
            x = F.avg_pool2d(x.flatten(0, 1), smaller).unflatten(0, (groups, GROUP))
            coverage = F.avg_pool2d(coverage, smaller)
        for axes, odds in (((-1, -2), 0.5), ((-1, None), 0.5), ((-2, None), 0.5)):
            flip = torch.rand(groups, device=self.device) < odds
            turn = (lambda t: t.transpose(-1, -2)) if axes[1] else (lambda t, a=axes[0]: t.flip(a))
            x = torch.where(flip[:, None, None, None, None], turn(x), x)
            coverage = torch.where(flip[:, None, None, None], turn(coverage), coverage)

        def dice(*shape, low=0.0, high=1.0):
            return low + (high - low) * torch.rand(*shape, 1, 1, 1, device=self.device)

        order = torch.rand(groups, 3, device=self.device).argsort(1)
        order = torch.where(dice(groups, 1)[..., 0, 0, 0] < 0.3, order, self.plain)
        x = x.gather(2, order[:, None, :, None, None].expand_as(x))
        x = torch.where(dice(groups, 1) < 0.1, 1 - x, x)
        coarse = F.interpolate(F.avg_pool2d(x.flatten(0, 1), 2), scale_factor=2, mode="bilinear").view_as(x)
        x = torch.where(dice(groups, 1) < self.coarse, coarse, x)
        contrast = dice(groups, 1, low=0.6, high=1.3) * dice(groups, GROUP, low=0.95, high=1.05)
        x = (x - 0.5) * contrast + 0.5 + dice(groups, 1, low=-0.1, high=0.1) + dice(groups, GROUP, low=-0.03, high=0.03)
        if self.disturb:
            side = torch.linspace(-1, 1, x.shape[-1], device=self.device).expand(x.shape[-1], -1)
            x = x.clamp(1e-3, 1).pow(1 + self.disturb * dice(groups, GROUP, low=-0.25, high=0.3))
            slope = dice(groups, GROUP, low=-1) * side + dice(groups, GROUP, low=-1) * side.T
            x = x * (1 + 0.25 * self.disturb * slope) + 0.05 * self.disturb * dice(groups, GROUP, low=-1)
            soft = F.avg_pool2d(x.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(x)
            x = x + (soft - x) * self.disturb * dice(groups, GROUP, low=-0.5, high=1)
        x = (x + torch.randn_like(x) * 0.03 * dice(groups, 1) ** 2).clamp(0, 1)
        area, across, down = areas_and_centres(coverage).unbind(-1)
        cells = (across > 1 / 3).long() + (across > 2 / 3) + 3 * ((down > 1 / 3).long() + (down > 2 / 3))
        cells = torch.where(self.single[pick] & (area > 0), cells, -1)
        return Batch((x - self.mean) / self.std, coverage, self.types[pick], cells, self.family[pick])
