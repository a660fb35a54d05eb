"""Photographs of the mini world: products in front of a camera, good or damaged, with everything known about them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spgdd.tadd.miniworld.defects import DEFECTS, SLOTS, TYPES, Damage, damage
from spgdd.tadd.grammar import place_of

from spgdd.tadd.miniworld.noise import Dice, noise
from spgdd.tadd.miniworld.products import FAMILIES, OBJECTS, Surface, mix

HELD_OUT_FAMILIES = ("leather", "tile", "gear", "cable")
HELD_OUT_TYPES = ("glue", "fold", "burn")


class Photographs(NamedTuple):
    images: Tensor  # (B, 3, S, S) uint8
    masks: Tensor  # (B, SLOTS, S, S) bool: the visible part of each defect
    types: Tensor  # (B,) index into TYPES, -1 for a good part
    contrast: Tensor  # (B, SLOTS) mean change of brightness inside the mask, 0..1


def is_object(family: str) -> bool:
    return FAMILIES[family] in OBJECTS


def possible_types(family: str) -> list[int]:
    """Indices of the defect types that this family can have."""
    return [i for i, row in enumerate(DEFECTS.values())
            if not (row.texture_only if is_object(family) else row.object_only)]


def _pose(x: Tensor, y: Tensor, product: Dice, photo: Dice, thing: bool) -> tuple[Tensor, Tensor]:
    """Picture coordinates to product coordinates: the product decides how freely it may lie."""
    free = product.chance("free pose", 0.35)
    angle = free * photo("angle", 0, 2 * math.pi) + (1 - free) * photo("tilt", -0.05, 0.05) + product("turn", 0, 6.3) * (not thing)
    scale = product.log("scale", 0.85, 1.4) if thing else product.log("scale", 0.5, 1.6)
    close = product.chance("close-up", 0.3) * (1 - free) * thing
    scale = scale * (1 - close * product("closer", 0.3, 0.7)) * photo("zoom", 0.95, 1.05)
    cos, sin, shear = torch.cos(angle), torch.sin(angle), photo("shear", -0.04, 0.04)
    u, v = scale * (x * cos - y * sin + shear * y), scale * (x * sin + y * cos)
    if thing:
        at_x, at_y = close * product("at x", -0.5, 0.5), close * product("at y", -0.5, 0.5)
        return u + at_x + photo("shift x", -0.08, 0.08), v + at_y + photo("shift y", -0.08, 0.08)
    roam = torch.where(product.chance("aligned", 0.3) > 0, 0.03, 40.0)
    return u + product("at x", -40, 40) + roam * photo("shift x", -1, 1), v + product("at y", -40, 40) + roam * photo("shift y", -1, 1)


def _shoot(surface: Surface, hurt: list[Damage], x: Tensor, y: Tensor, product: Dice, photo: Dice) -> Tensor:
    """Damage, light and camera, without the sensor's noise: (B, 3, S, S), 0..1."""
    albedo, height = surface.albedo, surface.height
    for d in hurt:
        albedo = mix(albedo, d.dye * albedo.mean(1, keepdim=True) * 1.3, d.tint) * d.shade[:, None]
        albedo = mix(albedo, d.material, d.cover)
        height = height + d.height
    slope_y, slope_x = torch.gradient(height, spacing=2 / height.shape[-1], dim=(1, 2))
    sun = product("sun", 0, 2 * math.pi) + photo("sun", -0.3, 0.3)
    relief = product.log("relief", 0.3, 1.5)
    light = 1 + relief * (slope_x * torch.cos(sun) + slope_y * torch.sin(sun)).clamp(-1.5, 1.5)
    light = light * (1 + photo("slant", 0, 0.25) * (x * torch.cos(sun) + y * torch.sin(sun)))
    light = light * (1 - product("vignette", 0, 0.3) * (x**2 + y**2)) * photo("gain", 0.8, 1.2)
    image = (albedo * light[:, None].clamp(0.05, 3)).clamp(0, 1) ** photo("gamma", 0.85, 1.2)[:, None]
    grey = image.mean(1, keepdim=True)
    image = torch.where(product.chance("grey camera", 0.4)[:, None] > 0, grey, image)
    blur = product("blur", 0, 1) * photo("focus", 0.5, 1)
    return mix(image, F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1), blur)


def photograph(family: str, products: Tensor, photos: Tensor, types: Tensor, size: int = 224) -> Photographs:
    """Draw photographs of products of one family.

    ``products`` and ``photos`` (B,) int64 are seeds: the same product seed is the same product; ``types`` (B,) is the
    defect type of each picture, -1 for none. A defect too faint to be seen is left out, and the picture counts as good.
    Deterministic for given seeds, whatever the batch; CPU and GPU agree to rounding.
    """
    device, thing = products.device, is_object(family)
    steps = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2 / size) - 1
    y, x = (c.expand(len(products), -1, -1) for c in torch.meshgrid(steps, steps, indexing="ij"))
    product, photo = Dice(products), Dice(photos)
    px, py = _pose(x, y, product, photo, thing)
    draw = FAMILIES[family]
    surface = draw(px, py, product)
    clean = _shoot(surface, [], x, y, product, photo)

    bad = (types >= 0).nonzero()[:, 0]
    masks = torch.zeros(len(products), SLOTS, size, size, dtype=torch.bool, device=device)
    contrast = torch.zeros(len(products), SLOTS, device=device)
    image, types = clean.clone(), types.clone()
    if len(bad):
        product, photo = Dice(products[bad]), Dice(photos[bad])
        bx, by, inside = x[bad], y[bad], None if surface.inside is None else surface.inside[bad]
        count = 1 + (photo.unit("count") > 0.7).long() + (photo.unit("count") > 0.9).long()
        hurt = [damage(bx, by, torch.where(count > i, types[bad], -1), photo.split(f"defect {i}"), inside)
                for i in range(SLOTS)]
        moved_x, moved_y = px[bad] + sum(d.shift_x for d in hurt), py[bad] + sum(d.shift_y for d in hurt)
        shot = _shoot(draw(moved_x, moved_y, product), hurt, bx, by, product, photo)
        change = (shot - clean[bad]).abs().amax(1)  # (b, S, S)
        seen = F.avg_pool2d(change[:, None], 3, 1, 1) > 0.04
        visible = torch.stack([d.mask > 0.2 for d in hurt], 1) & seen
        strength = (change[:, None] * visible).flatten(2).sum(2) / visible.flatten(2).sum(2).clamp(min=1)
        visible &= ((visible.flatten(2).sum(2) >= 12) & (strength > 0.06))[:, :, None, None]
        shown = visible.flatten(1).sum(1) >= 24
        image[bad] = torch.where(shown[:, None, None, None], shot, clean[bad])
        masks[bad] = visible & shown[:, None, None, None]
        contrast[bad] = strength * masks[bad].flatten(2).any(2)
        types[bad] = torch.where(shown, types[bad], -1)
    grain = noise("grain", x * 9, y * 9, Dice(photos), "sensor") - 0.5
    image = image + (Dice(products)("noise", 0, 0.12) * grain)[:, None]
    return Photographs((image.clamp(0, 1) * 255).round().to(torch.uint8), masks, types, contrast)


def measure(masks: Tensor) -> Tensor:
    """Area and centroid of masks (..., S, S): (..., 3) float32, all as shares of the picture; nan centroid if empty."""
    size = masks.shape[-1]
    at = (torch.arange(size, device=masks.device) + 0.5) / size
    rows, columns = masks.sum(-1).float(), masks.sum(-2).float()
    total = rows.sum(-1)
    return torch.stack((total / size**2, (columns * at).sum(-1) / total, (rows * at).sum(-1) / total), -1)


def describe(family: str, product: str, shots: Photographs) -> list[dict]:
    """What is known about each photograph, as plain data: product, and each defect's type, box, place, area, contrast."""
    size = shots.images.shape[-1]
    across, down = shots.masks.any(-2), shots.masks.any(-1)  # (B, SLOTS, S)
    ends = [v for line in (across, down) for v in (line.int().argmax(-1), size - line.flip(-1).int().argmax(-1))]
    known = torch.cat([measure(shots.masks), shots.contrast[..., None], torch.stack(ends, -1)], -1).tolist()
    samples = []
    for kind, slots in zip(shots.types.tolist(), known, strict=True):
        defects = []
        for area, x, y, contrast, left, right, top, bottom in slots:
            if kind < 0 or not area:
                continue
            weight = contrast * (0.3 + min(area / 0.05, 1.0))
            defects.append({
                "type": TYPES[kind],
                "box": [int(left), int(top), int(right), int(bottom)],
                "place": place_of(x, y),
                "area": round(area, 5),
                "contrast": round(contrast, 4),
                "severity": "minor" if weight < 0.08 else "moderate" if weight < 0.25 else "severe",
            })
        samples.append({"product": product, "family": family, "size": [size, size], "defects": defects})
    return samples
