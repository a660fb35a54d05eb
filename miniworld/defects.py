"""Defect types of the mini world: a shape on the picture, and what happens to the surface inside it."""

import functools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from miniworld.noise import Dice, noise
from miniworld.surface import colour, fill, mix

Range = tuple[float, float]
SHAPES = ("blob", "curve", "dots")
SLOTS = 3  # a picture holds up to three defects, all of one type
TRIES = 24  # places that a defect on an object chooses from


@dataclass(frozen=True)
class Defect:
    """Ranges that a defect of this type is drawn from. Lengths: the picture is 2 wide."""

    shape: str
    size: Range  # half the length
    aspect: Range  # width over length
    ragged: Range = (0, 0)  # how much the outline or the course wanders
    soft: Range = (0.02, 0.04)  # width of the edge
    shade: Range = (0, 0)  # log of the factor on brightness
    cover: Range = (0, 0)  # opacity of another material
    material: Range = (0, 1)  # brightness of that material
    tint: Range = (0, 0)  # opacity of a stain, which lets the surface show through
    bump: Range = (0, 0)  # height at the middle; the sign is random
    warp: Range = (0, 0)  # by how much the product is displaced
    tear: Range = (0, 0)  # by how much it is displaced at random
    edge: bool = False  # sits on the outline of an object
    beyond: bool = False  # may reach beyond the object, over its background
    object_only: bool = False
    texture_only: bool = False


DEFECTS = {
    "crack": Defect("curve", (0.2, 0.9), (0.008, 0.03), (0.2, 0.7), (0.008, 0.02), shade=(-2.5, -0.5)),
    "scratch": Defect("curve", (0.12, 0.7), (0.008, 0.02), (0, 0.05), (0.008, 0.015), shade=(0.35, 1.2)),
    "hole": Defect("blob", (0.05, 0.2), (0.7, 1), (0, 0.15), cover=(0.9, 1), material=(0, 0.12),
                   bump=(0.02, 0.1)),
    "dent": Defect("blob", (0.1, 0.35), (0.5, 1), (0, 0.2), (0.4, 0.9), shade=(-0.3, 0), bump=(0.06, 0.2)),
    "stain": Defect("blob", (0.1, 0.45), (0.4, 1), (0.3, 0.8), (0.03, 0.2), shade=(-0.6, -0.1), tint=(0.3,
                    0.8)),
    "contamination": Defect("blob", (0.03, 0.15), (0.4, 1), (0.2, 0.7), cover=(0.85, 1), bump=(0, 0.1),
                            beyond=True),
    "missing part": Defect("blob", (0.15, 0.45), (0.4, 1), (0, 0.3), warp=(4, 4), object_only=True,
                           beyond=True),
    "bent": Defect("blob", (0.25, 0.6), (0.5, 1), (0, 0.1), (0.6, 1), warp=(0.08, 0.25), beyond=True),
    "chipped edge": Defect("blob", (0.06, 0.25), (0.4, 1), (0.2, 0.6), warp=(4, 4), edge=True,
                           object_only=True, beyond=True),
    "misprint": Defect("blob", (0.04, 0.4), (0.4, 1), (0, 0.05), (0.01, 0.02), warp=(0.06, 0.5)),
    "thread": Defect("curve", (0.2, 0.8), (0.008, 0.02), (0.3, 1), (0.008, 0.015), cover=(0.8, 1), bump=(0,
                     0.03), beyond=True),
    "discolouration": Defect("blob", (0.15, 0.6), (0.4, 1), (0.1, 0.4), (0.3, 0.8), shade=(-0.2, 0.4),
                             tint=(0.4, 0.8)),
    "burn": Defect("blob", (0.1, 0.4), (0.5, 1), (0.2, 0.6), (0.2, 0.6), shade=(-2.5, -0.9)),
    "glue": Defect("blob", (0.08, 0.3), (0.4, 1), (0.1, 0.4), cover=(0.3, 0.7), material=(0.75, 1),
                   bump=(0.04, 0.12)),
    "fold": Defect("curve", (0.4, 1.2), (0.03, 0.1), (0, 0.15), (0.05, 0.15), bump=(0.08, 0.2),
                   texture_only=True),
    "pitting": Defect("dots", (0.12, 0.4), (0.5, 1), (0.1, 0.4), shade=(-2, -0.6)),
    "blowhole": Defect("blob", (0.025, 0.08), (0.6, 1), (0, 0.3), shade=(-2.5, -1.2), bump=(0, 0.05)),
    "fray": Defect("blob", (0.1, 0.4), (0.3, 1), (0.3, 0.8), (0.05, 0.2), tear=(0.1, 0.4), shade=(-0.5, 0.5)),
}
TYPES = tuple(DEFECTS)
RANGES = [field.name for field in fields(Defect) if field.type is Range]


@functools.cache
def column(name: str, device: torch.device) -> Tensor:
    """A field of :class:`Defect` for every type: (T,), for ranges (T, 2); of shapes, their number."""
    values = [getattr(row, name) for row in DEFECTS.values()]
    return torch.tensor([SHAPES.index(v) for v in values] if name == "shape" else values, device=device)


class Damage:
    """One defect on each of B products, of the given ``types`` (B,), from the dice of its own.

    ``view``: coordinates of the pixels in -1..1, x (1, 1, W) and y (1, H, 1). ``inside`` (B, H, W): the object,
    None for a texture. ``mask`` (B, H, W), 0..1, is where the defect is; it does not reach outside the object
    unless its type is one that does.
    """

    def __init__(self, types: Tensor, dice: Dice, view: tuple[Tensor, Tensor], inside: Tensor | None):
        self.types, self.dice, self.view = types, dice, view
        ends = {name: self._of_type(name) for name in RANGES}  # (B, 2) each
        draws = dice.units(*RANGES)
        self.drawn = {
            name: (ends[name][:, 0] + (ends[name][:, 1] - ends[name][:, 0]) * draws[:, i])[:, None, None]
            for i, name in enumerate(RANGES)
        }
        self.mask = self._mask(inside)

    def shift(self) -> tuple[Tensor, Tensor]:
        """(B, H, W) each: by how much the product is displaced."""
        warp, direction = self.drawn["warp"], self.dice("direction", 0, 2 * math.pi)
        x, y = self.mask * (warp * torch.cos(direction)), self.mask * (warp * torch.sin(direction))
        rows = self.having("tear")
        if len(rows):
            tear = self.mask[rows] * self.drawn["tear"][rows]
            x[rows] += tear * self._noise(5, "tear x", rows).mul_(2).sub_(1)
            y[rows] += tear * self._noise(5, "tear y", rows).mul_(2).sub_(1)
        return x, y

    def paint(self, albedo: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
        """Stain, shade, cover and emboss: albedo (B, 3, H, W) and height (B, H, W), changed in place."""
        mask, drawn = self.mask, self.drawn
        rows = self.having("tint")
        if len(rows):
            dye = colour(self.dice[rows], "dye", 0.2, 1.0, 1.0)
            dyed = dye * albedo[rows].mean(1, keepdim=True) * 1.3
            albedo[rows] = mix(albedo[rows], dyed, mask[rows] * drawn["tint"][rows])
        sign = self.dice.chance("sign", 0.5) * 2 - 1
        scratch = (self.types == TYPES.index("scratch"))[:, None, None]  # the only one to be lighter or darker
        albedo *= torch.exp(mask * (drawn["shade"] * torch.where(scratch, sign, 1.0)))[:, None]
        rows = self.having("cover")
        if len(rows):
            grain = self._noise(4, "material", rows).mul_(0.5).add_(0.75)
            material = 0.3 * colour(self.dice[rows], "material") + 0.7 * drawn["material"][rows, None]
            albedo[rows] = mix(albedo[rows], material * grain[:, None], mask[rows] * drawn["cover"][rows])
        height += mask * (drawn["bump"] * sign * 0.5)
        return albedo, height

    def having(self, name: str) -> Tensor:
        """Rows of the pictures whose type of defect has this effect."""
        return self._of_type(name).any(1).nonzero()[:, 0]

    def _of_type(self, name: str) -> Tensor:
        """A field of :class:`Defect` for each picture: (B,), for ranges (B, 2)."""
        return column(name, self.types.device)[self.types]

    def _noise(self, frequency: float | Tensor, name: str, rows: Tensor, channel: str = "cloud") -> Tensor:
        x, y = (t * frequency for t in self.view)
        return noise(channel, x, y, self.dice[rows], name)

    def _mask(self, inside: Tensor | None) -> Tensor:
        (x, y), drawn = self.view, self.drawn
        middle_x, middle_y = self._place(inside)
        angle = self.dice("angle", 0, 2 * math.pi)
        cos, sin = torch.cos(angle), torch.sin(angle)
        dx, dy = x - middle_x, y - middle_y
        u, v = dx * cos + dy * sin, dy * cos - dx * sin  # along and across
        everyone = torch.arange(len(self.types), device=self.types.device)
        wander = self._noise(2.5, "wander", everyone).mul_(2).sub_(1)

        size, soft = drawn["size"], drawn["soft"]
        distance = torch.hypot(u, v / drawn["aspect"]) - size * (1 + drawn["ragged"] * wander)
        shape = self._of_type("shape")
        rows = (shape == SHAPES.index("curve")).nonzero()[:, 0]
        if len(rows):
            distance[rows] = self._curve(u[rows], v[rows], wander[rows], rows)
        rows = (shape == SHAPES.index("dots")).nonzero()[:, 0]
        if len(rows):
            distance[rows] = torch.maximum(distance[rows], self._dots(rows))
        blob = (shape == SHAPES.index("blob"))[:, None, None]
        edge_width = torch.where(blob, (soft * size * 2).clamp(min=0.012), soft)
        mask = fill(distance + edge_width / 2, edge_width)
        if inside is not None:
            mask *= torch.where(self._of_type("beyond")[:, None, None], 1.0, inside)
        return mask

    def _curve(self, u: Tensor, v: Tensor, wander: Tensor, rows: Tensor) -> Tensor:
        """Signed distance to a line that wanders about the axis and tapers off."""
        size, ragged = self.drawn["size"][rows], self.drawn["ragged"][rows]
        course = noise("smoke", u * 2, torch.zeros_like(u), self.dice[rows], "course").mul_(2).sub_(1)
        course = ragged * size * 0.6 * (course + 0.25 * wander)
        thick = self.drawn["aspect"][rows] * (1 - (u / size).clamp(-1, 1) ** 2).sqrt()
        return torch.maximum((v - course).abs() - thick, u.abs() - size)

    def _dots(self, rows: Tensor) -> Tensor:
        """Signed distance to pits of many sizes."""
        dense = self.dice[rows].log("dense", 2, 5)
        pit = self._noise(dense, "pit", rows, "cell") - 0.4 * self._noise(dense, "pit", rows, "id")
        return pit / (4 * dense)

    def _place(self, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """A middle, (B, 1, 1) each: anywhere, or on the object, or on its outline, as the type has it."""
        names = [f"{axis}{i}" for axis in "xy" for i in range(1 if inside is None else TRIES)]
        tries = (self.dice.units(*names) * 1.7 - 0.85).unflatten(1, (2, -1))  # (B, 2, TRIES)
        if inside is not None:
            coarse = F.avg_pool2d(inside[:, None], inside.shape[-1] // 28)
            near = F.avg_pool2d(coarse, 3, 1, 1)  # (B, 1, 28, 28), share of object about each point
            share = F.grid_sample(near, tries.mT[:, :, None], align_corners=False)[:, 0, :, 0]  # (B, TRIES)
            wanted = torch.where(self._of_type("edge")[:, None], -(share - 0.5).abs(), share.clamp(max=0.9))
            first = torch.arange(TRIES, device=share.device) * 1e-4  # of equally good ones, on every device
            best = (wanted - first).argmax(1)[:, None, None].expand(-1, 2, 1)
            tries = tries.gather(2, best)
        return tries[:, 0, :, None], tries[:, 1, :, None]
