"""Photographs of the mini world: products in front of a camera, good or damaged, and all that is known of them."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from miniworld.defects import DEFECTS, SLOTS, TYPES, Damage, column
from miniworld.noise import Dice, noise
from miniworld.objects import OBJECTS
from miniworld.surface import mix
from miniworld.textures import TEXTURES
from spgdd.places import place_of

FAMILIES = TEXTURES | OBJECTS
HELD_OUT_FAMILIES = ("leather", "tile", "gear", "cable")  # never in training
HELD_OUT_TYPES = ("glue", "fold", "burn")
# Textures that, as objects do, hide less than a random surface; of lines, which break or bend.
REGULAR = ("weave", "tile", "mesh", "circuit_board", "traces", "label")
SHOWS_SHIFT = ("tile", "mesh", "circuit_board", "brushed_metal", "wood", "traces", "label")
SHOWS_TEAR = ("weave", *SHOWS_SHIFT)  # the lines of cloth wander, but where it is torn they are gone
CLEAR_REGULAR, CLEAR_RANDOM = 0.7, 1.2  # mean of ``clarity`` in its mask that a defect needs
LEAST_AREA = 24 / 224**2  # of the picture, that a defect's mask needs
CHUNK = 8  # pictures drawn together on a CPU, so that what is worked on stays in its cache


class Photographs(NamedTuple):
    images: Tensor  # (B, 3, S, S) uint8
    masks: Tensor  # (B, SLOTS, S, S) bool: the visible part of each defect
    types: Tensor  # (B,) index into TYPES, -1 for a good part
    contrast: Tensor  # (B, SLOTS) mean change of brightness inside the mask, 0..1


class Scene(NamedTuple):
    """B pictures of one family before anything is wrong with them; ``rows`` are some of them."""

    x: Tensor  # (B, S, S) product coordinates of each pixel
    y: Tensor
    albedo: Tensor  # (B, 3, S, S)
    height: Tensor  # (B, S, S)
    inside: Tensor | None  # (B, S, S)
    clean: Tensor  # (B, 3, S, S), 0..1, the picture without the sensor's noise
    products: Tensor  # (B,) seeds
    photos: Tensor
    types: Tensor

    def rows(self, index: Tensor) -> "Scene":
        return Scene(*(None if field is None else field[index] for field in self))


def possible_types(family: str) -> list[int]:
    """Indices of the defect types that this family can have.

    None that nobody could see on it: leather, moved or torn, is leather.
    """
    thing = family in OBJECTS
    return [i for i, row in enumerate(DEFECTS.values())
            if not (row.texture_only if thing else row.object_only)
            and (thing or family in SHOWS_SHIFT or not any(row.warp))
            and (thing or family in SHOWS_TEAR or not any(row.tear))]  # fmt: skip


def photograph(family: str, products: Tensor, photos: Tensor, types: Tensor, size: int = 224) -> Photographs:
    """Draw photographs of products of one family.

    ``products`` and ``photos`` (B,) int64 are seeds: the same product seed is the same product; ``types`` (B,) is
    the defect type of each picture, one of ``possible_types`` or -1 for none. A defect too faint to be seen on this
    product is left out, and a picture without any left counts as good. Deterministic for given seeds, whatever the
    batch; CPU and GPU agree to rounding.
    """
    step = CHUNK if products.device.type == "cpu" else max(1, len(products))
    chunks = zip(products.split(step), photos.split(step), types.split(step), strict=True)
    parts = [_photograph(family, *chunk, size) for chunk in chunks]
    return Photographs(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def _photograph(family: str, products: Tensor, photos: Tensor, types: Tensor, size: int) -> Photographs:
    steps = (torch.arange(size, device=products.device) + 0.5) * (2 / size) - 1
    view = steps[None, None], steps[None, :, None]  # x (1, 1, S) and y (1, S, 1) of the pixels, -1..1
    product, photo = Dice(products), Dice(photos)
    x, y = pose(*view, product, photo, family in OBJECTS)
    surface = FAMILIES[family](x, y, product)
    image = shoot(surface.albedo, surface.height, view, product, photo)

    masks = torch.zeros(len(products), SLOTS, size, size, dtype=torch.bool, device=products.device)
    contrast, types = torch.zeros(len(products), SLOTS, device=products.device), types.clone()
    bad = (types >= 0).nonzero()[:, 0]
    if len(bad):
        scene = Scene(x, y, *surface, image, products, photos, types).rows(bad)
        count = photo.unit("count")[bad]
        slots = torch.stack((count >= 0, count > 0.7, count > 0.9), 1)
        image[bad], masks[bad], contrast[bad] = _spoil(family, scene, view, slots)
        types[~masks.flatten(1).any(1)] = -1
    grain = noise("grain", view[0] * 9, view[1] * 9, photo, "sensor").sub_(0.5) * product("noise", 0, 0.12)
    image = (image + grain[:, None]).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return Photographs(image, masks, types, contrast)


def pose(x: Tensor, y: Tensor, product: Dice, photo: Dice, thing: bool) -> tuple[Tensor, Tensor]:
    """Picture coordinates to product coordinates: the product decides how freely it may lie."""
    free = product.chance("free pose", 0.35)
    angle = free * photo("angle", 0, 2 * math.pi) + (1 - free) * photo("tilt", -0.05, 0.05)
    scale = product.log("scale", 0.85, 1.4) if thing else product.log("scale", 0.5, 1.6)
    close = product.chance("close-up", 0.3) * (1 - free) * thing
    scale = scale * (1 - close * product("closer", 0.3, 0.7)) * photo("zoom", 0.95, 1.05)
    if thing:
        at_x = close * product("at x", -0.5, 0.5) + photo("shift x", -0.08, 0.08)
        at_y = close * product("at y", -0.5, 0.5) + photo("shift y", -0.08, 0.08)
    else:
        angle = angle + product("turn", 0, 6.3)
        roam = torch.where(product.chance("aligned", 0.3) > 0, 0.03, 40.0)
        at_x = product("at x", -40, 40) + roam * photo("shift x", -1, 1)
        at_y = product("at y", -40, 40) + roam * photo("shift y", -1, 1)
    cos, sin, shear = scale * torch.cos(angle), scale * torch.sin(angle), photo("shear", -0.04, 0.04)
    return x * cos + (y * (scale * shear - sin) + at_x), x * sin + (y * cos + at_y)


def shoot(albedo: Tensor, height: Tensor, view: tuple[Tensor, Tensor], product: Dice, photo: Dice) -> Tensor:
    """Light and camera, without the sensor's noise: (B, 3, S, S), 0..1."""
    x, y = view
    sun = product("sun", 0, 2 * math.pi) + photo("sun", -0.3, 0.3)
    cos, sin = torch.cos(sun), torch.sin(sun)
    slope_y, slope_x = torch.gradient(height, spacing=2 / height.shape[-1], dim=(1, 2))
    light = slope_x.mul_(cos).add_(slope_y.mul_(sin)).clamp_(-1.5, 1.5)
    light = light.mul_(product.log("relief", 0.3, 1.5)).add_(1)
    light *= 1 + photo("slant", 0, 0.25) * (x * cos + y * sin)
    light *= (1 - product("vignette", 0, 0.3) * (x**2 + y**2)) * photo("gain", 0.8, 1.2)
    image = (albedo * light.clamp_(0.05, 3)[:, None]).clamp_(0, 1)
    image = image.pow_(photo("gamma", 0.85, 1.2)[:, None])
    grey = product.chance("grey camera", 0.4)[:, None] > 0
    image = torch.where(grey, image.mean(1, keepdim=True), image)
    return mix(image, soften(image), product("blur", 0, 1) * photo("focus", 0.5, 1))


def soften(image: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels, (..., H, W); the border counts twice."""
    across = torch.cat((image[..., :1], image, image[..., -1:]), -1)
    across = across[..., :-2] + across[..., 1:-1] + across[..., 2:]
    down = torch.cat((across[..., :1, :], across, across[..., -1:, :]), -2)
    return (down[..., :-2, :] + down[..., 1:-1, :]).add_(down[..., 2:, :]).mul_(1 / 9)


def clarity(image: Tensor, clean: Tensor) -> Tensor:
    """How clearly a picture differs from the clean one, about (B, 56, 56): 1 is as much as the clean one itself varies.

    Both (B, 3, S, S). Compared are means over cells of S/56 pixels, since what varies from pixel to pixel hides
    nothing larger; a cell of the clean picture varies by as much as it differs from the mean of its neighbours.
    """
    cell = max(1, image.shape[-1] // 56)
    image, clean = F.avg_pool2d(image, cell), F.avg_pool2d(clean, cell)
    own = soften((clean - soften(clean)).abs_().amax(1))
    return (image - clean).abs_().amax(1) / (own + 0.02)


def _spoil(family: str, scene: Scene, view: tuple[Tensor, Tensor], slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of the scene with the defects of the given ``slots`` (B, SLOTS) bool.

    Returns the pictures, the visible part of each defect (B, SLOTS, S, S) bool and its contrast (B, SLOTS). What
    of a picture's defects cannot be seen against its own surface is not in it: then the picture is drawn again
    without these.
    """
    product, photo = Dice(scene.products), Dice(scene.photos)
    albedo, height, hurt = scene.albedo.clone(), scene.height.clone(), {}
    for slot in range(SLOTS):
        rows = slots[:, slot].nonzero()[:, 0]
        if len(rows):
            inside = None if scene.inside is None else scene.inside[rows]
            dice = photo[rows].split(f"defect {slot}")
            hurt[slot] = rows, Damage(scene.types[rows], dice, view, inside)

    moves = [column(name, scene.types.device)[scene.types] for name in ("warp", "tear")]  # (B, 2) each
    moved = torch.cat(moves, 1).any(1).nonzero()[:, 0]
    if len(moved):
        x, y = scene.x.clone(), scene.y.clone()
        for rows, damage in hurt.values():
            shift_x, shift_y = damage.shift()
            x[rows] += shift_x
            y[rows] += shift_y
        surface = FAMILIES[family](x[moved], y[moved], product[moved])
        albedo[moved], height[moved] = surface.albedo, surface.height
    for rows, damage in hurt.values():
        albedo[rows], height[rows] = damage.paint(albedo[rows], height[rows])
    image = shoot(albedo, height, view, product, photo)

    change, clear = (image - scene.clean).abs_().amax(1), clarity(image, scene.clean)
    seen, cell = soften(change) > 0.04, image.shape[-1] // clear.shape[-1]
    masks = torch.zeros(len(image), SLOTS, *seen.shape[1:], dtype=torch.bool, device=image.device)
    area, contrast, clearness = (torch.zeros(len(image), SLOTS, device=image.device) for _ in range(3))
    for slot, (rows, damage) in hurt.items():
        mask = seen[rows].logical_and_(damage.mask > 0.2)
        masks[rows, slot] = mask
        area[rows, slot] = mask.flatten(1).sum(1).float()
        contrast[rows, slot] = (change[rows] * mask).flatten(1).sum(1)
        share = F.avg_pool2d(mask.float(), cell)
        clearness[rows, slot] = (clear[rows] * share).flatten(1).sum(1) * cell**2
    contrast /= area.clamp(min=1)
    visible = (area >= LEAST_AREA * seen[0].numel()) & (contrast > 0.06)
    regular = family in OBJECTS or family in REGULAR
    visible &= clearness > area * (CLEAR_REGULAR if regular else CLEAR_RANDOM)
    masks &= visible[..., None, None]
    contrast *= visible
    none = ~visible.any(1)
    image[none] = scene.clean[none]
    again = (~none & (slots & ~visible).any(1)).nonzero()[:, 0]
    if len(again):
        image[again], masks[again], contrast[again] = _spoil(family, scene.rows(again), view, visible[again])
    return image, masks, contrast


def areas_and_centres(masks: Tensor) -> Tensor:
    """Area and centroid of masks (..., S, S): (..., 3) float32, all as shares of the picture; nan centroid if empty."""
    size = masks.shape[-1]
    at = (torch.arange(size, device=masks.device) + 0.5) / size
    rows, columns = masks.sum(-1).float(), masks.sum(-2).float()
    total = rows.sum(-1)
    return torch.stack((total / size**2, (columns * at).sum(-1) / total, (rows * at).sum(-1) / total), -1)


def ground_truth(family: str, product: str, shots: Photographs) -> list[dict]:
    """What is known about each photograph, as plain data for :mod:`spgdd.data.words`."""
    size = shots.images.shape[-1]
    across, down = shots.masks.any(-2), shots.masks.any(-1)  # (B, SLOTS, S)
    ends = [v for line in (across, down) for v in (line.int().argmax(-1), size - line.flip(-1).int().argmax(-1))]
    known = torch.cat([areas_and_centres(shots.masks), shots.contrast[..., None], torch.stack(ends, -1)], -1).tolist()
    samples = []
    for kind, slots in zip(shots.types.tolist(), known, strict=True):
        defects = []
        for area, x, y, contrast, left, right, top, bottom in slots:
            if kind < 0 or not area:
                continue
            weight = contrast * (0.3 + min(area / 0.05, 1.0))  # severe is what is both large and clear
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
