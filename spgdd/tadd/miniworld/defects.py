"""Defect types of the mini world: a shape on the picture, and what happens to the surface inside it."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from spgdd.tadd.miniworld.noise import Dice, noise
from spgdd.tadd.miniworld.products import colour, fill

Range = tuple[float, float]
SHAPES = ("blob", "curve", "dots")
SLOTS = 3  # a picture holds up to three defects, all of one type


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
    "hole": Defect("blob", (0.05, 0.2), (0.7, 1), (0, 0.15), cover=(0.9, 1), material=(0, 0.12), bump=(0.02, 0.1)),
    "dent": Defect("blob", (0.1, 0.35), (0.5, 1), (0, 0.2), (0.4, 0.9), shade=(-0.3, 0), bump=(0.06, 0.2)),
    "stain": Defect("blob", (0.1, 0.45), (0.4, 1), (0.3, 0.8), (0.03, 0.2), shade=(-0.6, -0.1), tint=(0.3, 0.8)),
    "contamination": Defect("blob", (0.03, 0.15), (0.4, 1), (0.2, 0.7), cover=(0.85, 1), bump=(0, 0.1), beyond=True),
    "missing part": Defect("blob", (0.15, 0.45), (0.4, 1), (0, 0.3), warp=(4, 4), object_only=True, beyond=True),
    "bent": Defect("blob", (0.25, 0.6), (0.5, 1), (0, 0.1), (0.6, 1), warp=(0.08, 0.25), beyond=True),
    "chipped edge": Defect("blob", (0.06, 0.25), (0.4, 1), (0.2, 0.6), warp=(4, 4), edge=True, object_only=True, beyond=True),
    "misprint": Defect("blob", (0.12, 0.4), (0.4, 1), (0, 0.05), (0.01, 0.02), warp=(0.06, 0.5)),
    "thread": Defect("curve", (0.2, 0.8), (0.008, 0.02), (0.3, 1), (0.008, 0.015), cover=(0.8, 1), bump=(0, 0.03), beyond=True),
    "discolouration": Defect("blob", (0.15, 0.6), (0.4, 1), (0.1, 0.4), (0.3, 0.8), shade=(-0.2, 0.4), tint=(0.4, 0.8)),
    "burn": Defect("blob", (0.1, 0.4), (0.5, 1), (0.2, 0.6), (0.2, 0.6), shade=(-2.5, -0.9)),
    "glue": Defect("blob", (0.08, 0.3), (0.4, 1), (0.1, 0.4), cover=(0.3, 0.7), material=(0.75, 1), bump=(0.04, 0.12)),
    "fold": Defect("curve", (0.4, 1.2), (0.03, 0.1), (0, 0.15), (0.05, 0.15), bump=(0.08, 0.2), texture_only=True),
    "pitting": Defect("dots", (0.12, 0.4), (0.5, 1), (0.1, 0.4), shade=(-2, -0.6)),
    "blowhole": Defect("blob", (0.025, 0.08), (0.6, 1), (0, 0.3), shade=(-2.5, -1.2), bump=(0, 0.05)),
    "fray": Defect("blob", (0.1, 0.4), (0.3, 1), (0.3, 0.8), (0.05, 0.2), tear=(0.1, 0.4), shade=(-0.5, 0.5)),
}
TYPES = tuple(DEFECTS)


class Damage(NamedTuple):
    """What :func:`damage` found for one slot; every field is (B, H, W) or broadcasts to it."""

    mask: Tensor  # 0..1
    shift_x: Tensor  # displacement of the product
    shift_y: Tensor
    shade: Tensor  # factor on brightness
    cover: Tensor  # opacity and colour (B, 3, H, W) of the other material
    material: Tensor
    tint: Tensor  # opacity and colour of the stain
    dye: Tensor
    height: Tensor


def _table(types: Tensor) -> dict[str, Tensor]:
    """The ranges of each picture's type, as (B, 2, 1, 1); good pictures get the first row, and are masked later."""
    rows = list(DEFECTS.values())
    pick = types.clamp(min=0)
    columns = [f.name for f in fields(Defect) if isinstance(getattr(rows[0], f.name), tuple)]
    return {name: torch.tensor([getattr(row, name) for row in rows], dtype=torch.float32, device=types.device)[pick]
            [:, :, None, None] for name in columns}


def _place(x: Tensor, y: Tensor, s: Dice, inside: Tensor | None, edge: Tensor) -> tuple[Tensor, Tensor]:
    """A centre (B, 1, 1) each: on the object, or on its outline, where the picture has one."""
    tries = [torch.cat([s(f"{axis}{i}", -0.85, 0.85) for i in range(24)], 1) for axis in "xy"]  # (B, 24, 1) each
    if inside is None:
        return tries[0][:, :1], tries[1][:, :1]
    grid = torch.cat(tries, 2)[:, :, None]  # (B, 24, 1, 2)
    near = torch.nn.functional.avg_pool2d(inside[:, None], 25, 1, 12)
    share = torch.nn.functional.grid_sample(near, grid, align_corners=False)[:, 0, :, 0]  # (B, 24), 0..1
    wanted = torch.where(edge[:, :, 0], -(share - 0.5).abs(), share.clamp(max=0.9))
    best = wanted.argmax(1, keepdim=True)
    return tries[0].gather(1, best[:, :, None])[:, :, :1], tries[1].gather(1, best[:, :, None])[:, :, :1]


def damage(x: Tensor, y: Tensor, types: Tensor, s: Dice, inside: Tensor | None) -> Damage:
    """One defect of each picture's type. x, y (B, H, W): picture coordinates in -1..1; ``inside``: the object."""
    t = _table(types)

    def draw(name: str) -> Tensor:
        return s(name, t[name][:, 0], t[name][:, 1])

    shape, edge, beyond = (
        torch.tensor([pick(row) for row in DEFECTS.values()], device=x.device)[types.clamp(min=0)][:, None, None]
        for pick in (lambda row: SHAPES.index(row.shape), lambda row: row.edge, lambda row: row.beyond))
    cx, cy = _place(x, y, s, inside, edge)
    angle, size, soft, ragged = s("angle", 0, 2 * math.pi), draw("size"), draw("soft"), draw("ragged")
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
    wander = noise("cloud", x * 2.5, y * 2.5, s, "wander") * 2 - 1

    blob = torch.hypot(u, v / draw("aspect")) - size * (1 + ragged * wander)
    course = ragged * size * 0.6 * (noise("smoke", u * 2.0, 0 * u, s, "course") * 2 - 1 + 0.25 * wander)
    thick = draw("aspect") * (1 - (u / size).clamp(-1, 1) ** 2).sqrt()
    curve = torch.maximum((v - course).abs() - thick, (u.abs() - size))
    dense = s.log("dense", 3, 8)
    pit = noise("cell", x * dense, y * dense, s, "pit") - 0.3 * noise("id", x * dense, y * dense, s, "pit")
    dots = torch.maximum(pit / (4 * dense), blob)
    distance = torch.where(shape == 0, blob, torch.where(shape == 1, curve, dots))
    edge_width = torch.where(shape == 0, (soft * size * 2).clamp(min=0.012), soft)
    mask = fill(distance + edge_width / 2, edge_width) * (types >= 0)[:, None, None]
    if inside is not None:
        mask = torch.where(beyond, mask, mask * inside)

    sign = s.chance("sign", 0.5) * 2 - 1
    either = torch.where((types == TYPES.index("scratch"))[:, None, None], sign, torch.ones_like(sign))
    turbulent_x = noise("cloud", x * 5, y * 5, s, "tear x") * 2 - 1
    turbulent_y = noise("cloud", x * 5, y * 5, s, "tear y") * 2 - 1
    warp, tear, direction = draw("warp"), draw("tear"), s("direction", 0, 2 * math.pi)
    grain = 0.75 + 0.5 * noise("cloud", x * 4, y * 4, s, "material")
    brightness = draw("material")
    material = (0.3 * colour(s, "material") + 0.7 * brightness[:, None]) * grain[:, None]
    return Damage(
        mask=mask,
        shift_x=mask * (warp * torch.cos(direction) + tear * turbulent_x),
        shift_y=mask * (warp * torch.sin(direction) + tear * turbulent_y),
        shade=torch.exp(mask * draw("shade") * either),
        cover=mask * draw("cover"),
        material=material,
        tint=mask * draw("tint"),
        dye=colour(s, "dye", 0.2, 1.0, 1.0),
        height=mask * draw("bump") * sign * 0.5,
    )
