"""Product families of the mini world: what a good part looks like, as functions of position.

A family maps points (x, y), each (B, H, W) with the picture spanning about -1..1, and the product's :class:`Dice` to a
:class:`Surface`. Textures go on for ever; objects lie in the middle of a background. All sizes, colours and counts come
from the product's dice, so one family holds very many products.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spgdd.tadd.miniworld.noise import Dice, noise


class Surface(NamedTuple):
    albedo: Tensor  # (B, 3, H, W), 0..1
    height: Tensor  # (B, H, W), in product units; shading comes from its slope
    inside: Tensor | None = None  # (B, H, W), 1 on the object, 0 on the background; None: all of it


def colour(dice: Dice, name: str, low: float = 0.05, high: float = 0.95, saturation: float = 0.6) -> Tensor:
    """(B, 3, 1, 1): a random colour; every third product is grey."""
    hue, value = dice(name + ".hue"), dice(name + ".value", low, high)
    strength = saturation * dice(name + ".saturation") * dice.chance(name + ".coloured", 0.67)
    phase = torch.tensor([0.0, 1 / 3, 2 / 3], device=hue.device)[None, :, None, None]
    wheel = (2 * ((hue[:, None] + phase) % 1 - 0.5).abs() * 1.5 - 0.25).clamp(0, 1)
    return value[:, None] * (1 - strength[:, None] * (1 - wheel))


def mix(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Blend of two colours (B, 3, 1 or H, 1 or W) by a field (B, H, W)."""
    return a + (b - a) * weight[:, None]


def fill(distance: Tensor, softness: float = 0.02) -> Tensor:
    """1 where a signed distance is negative, 0 where it is positive, with a soft edge."""
    return (0.5 - distance / softness).clamp(0, 1)


def wave(t: Tensor) -> Tensor:
    """Cosine of period 1, in 0..1."""
    return 0.5 + 0.5 * torch.cos(2 * math.pi * t)


def fold(t: Tensor) -> Tensor:
    """Distance to the nearest whole number, 0..0.5."""
    return (t - torch.round(t)).abs()


def box(x: Tensor, y: Tensor, half_x, half_y, corner=0.0) -> Tensor:
    """Signed distance to a box with rounded corners."""
    qx, qy = x.abs() - half_x + corner, y.abs() - half_y + corner
    return torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0) - corner


def polygon(x: Tensor, y: Tensor, sides, radius) -> Tensor:
    """Signed distance (exact along the edges) to a regular polygon."""
    angle = torch.atan2(y, x) * sides / (2 * math.pi)
    folded = (angle - torch.round(angle)) * 2 * math.pi / sides
    return torch.hypot(x, y) * torch.cos(folded) - radius


# ---- textures -----------------------------------------------------------------------------------------------------


def brushed_metal(x, y, d):
    f, base = d.log("f", 2, 6), colour(d, "base", 0.3, 0.85, 0.25)
    line = noise("cloud", x * f * 0.15, y * f * 3, d, "line") - 0.5
    blotch = noise("smoke", x * 1.5, y * 1.5, d, "blotch") - 0.5
    return Surface(base * (1 + d("a", 0.15, 0.6) * line + d("b", 0, 0.3) * blotch)[:, None], 0.02 * line)


def weave(x, y, d):
    f, bend = d.log("f", 6, 26), d("bend", 0, 0.12)
    u = f * x + bend * f * (noise("cloud", x, y, d, "u") - 0.5)
    v = f * d("ratio", 0.6, 1.6) * y + bend * f * (noise("cloud", x, y, d, "v") - 0.5)
    twill = d.integer("twill", 1, 3)
    over = wave((torch.floor(u) + twill * torch.floor(v)) / (twill + 1)) > 0.5
    warp, weft = wave(u - 0.5), wave(v - 0.5)
    height = torch.where(over, warp, weft) * 0.7 + 0.3 * warp * weft
    fibre = noise("grain", u * 0.7, v * 0.7, d, "fibre") - 0.5
    thread = torch.where(over[:, None], colour(d, "warp", 0.15), colour(d, "weft", 0.15))
    shade = (0.45 + 0.55 * height) * (1 + d("fuzz", 0, 0.5) * fibre)
    return Surface(thread * shade[:, None], height * 0.5 / f)


def wood(x, y, d):
    f = d.log("f", 2, 10)
    bend = noise("smoke", x * 0.25, y * 1.2, d, "bend")
    ring = wave(f * (y + d("sway", 0.2, 1.0) * bend))
    pore = noise("cloud", x * 0.8, y * 12, d, "pore")
    tone = ring * d("contrast", 0.2, 0.7) + 0.3 * pore
    return Surface(mix(colour(d, "dark", 0.2, 0.5), colour(d, "light", 0.45, 0.9), tone), -0.01 * pore)


def leather(x, y, d):
    f = d.log("f", 1.2, 5)
    u, v = x * f + 0.2 * noise("cloud", x * f, y * f, d, "u"), y * f + 0.2 * noise("cloud", x * f, y * f, d, "v")
    crease = (noise("edge", u, v, d, "cell") * 3).clamp(max=1)
    tone = 0.75 + 0.25 * crease + 0.2 * (noise("cloud", x, y, d, "tone") - 0.5)
    return Surface(colour(d, "hide", 0.15, 0.7) * tone[:, None], 0.08 * crease / f)


def concrete(x, y, d):
    f = d.log("f", 0.7, 3)
    cloud = noise("cloud", x * f, y * f, d, "cloud") - 0.5
    grit = noise("grain", x * f * 2, y * f * 2, d, "grit") - 0.5
    hole = fill(noise("cell", x * f, y * f, d, "hole") - d("hole size", 0, 0.12), 0.08)
    base = colour(d, "base", 0.35, 0.85, 0.25)
    tone = 1 + d("a", 0.1, 0.6) * cloud + d("b", 0.05, 0.4) * grit - 0.5 * hole
    return Surface(base * tone[:, None], 0.02 * cloud - 0.03 * hole)


def asphalt(x, y, d):
    f = d.log("f", 1.5, 6)
    stone = noise("id", x * f, y * f, d, "stone") * fill(noise("cell", x * f, y * f, d, "stone") - 0.4, 0.2)
    grit = noise("cloud", x * f * 2, y * f * 2, d, "grit")
    wear = noise("smoke", x * 0.7, y * 0.7, d, "wear")
    tone = 0.35 + d("stone", 0.1, 0.6) * stone + d("grit", 0.3, 0.9) * (grit - 0.3) + 0.4 * (wear - 0.5)
    return Surface(colour(d, "base", 0.3, 0.75, 0.25) * 1.4 * tone[:, None].clamp(0.05), 0.02 * grit + 0.03 * stone)


def tile(x, y, d):
    f, joint = d.log("f", 0.6, 2.5), d("joint", 0.01, 0.05)
    gap = torch.minimum(fold(x * f), fold(y * f * d("ratio", 0.5, 1.0)))
    vein = noise("ridge", x * d.log("vein f", 0.5, 3), y, d, "vein") ** d.integer("thin", 3, 12)
    body = mix(colour(d, "glaze", 0.3), colour(d, "vein", 0.1), vein * d("vein", 0, 0.7))
    speck = noise("grain", x * 4, y * 4, d, "speck") - 0.5
    inside = fill(joint - gap)
    body = mix(colour(d, "grout", 0.1, 0.7, 0.2), body * (1 + d("speck", 0, 0.5) * speck)[:, None], inside)
    return Surface(body, 0.04 * inside)


def mesh(x, y, d):
    f = d.log("f", 3, 12)
    u, v = x * f, y * f
    u = u + d.chance("staggered", 0.5) * 0.5 * (torch.round(v) % 2)
    du, dv = u - torch.round(u), v - torch.round(v)
    square = d.chance("square", 0.5)
    gap = square * torch.maximum(du.abs(), dv.abs()) + (1 - square) * torch.hypot(du, dv)
    metal = fill(d("hole", 0.25, 0.42) - gap, 0.1)
    grain = 1 + d("grain", 0, 0.4) * (noise("grain", x * 3, y * 3, d, "grain") - 0.5)
    return Surface(mix(colour(d, "void", 0.02, 0.9), colour(d, "wire", 0.1) * grain[:, None], metal), 0.05 * metal)


def paper(x, y, d):
    fibre = noise("ridge", x * 3, y * 3, d, "fibre") * 0.5 + noise("grain", x * 2, y * 2, d, "grain") * 0.5
    ruled = fill(fold(y * d.log("rule", 2, 12)) - 0.04, 0.04) * d.chance("ruled", 0.4)
    sheet = colour(d, "sheet", 0.6, 0.95, 0.4) * (1 + d("a", 0.02, 0.3) * (fibre - 0.5))[:, None]
    return Surface(mix(sheet, colour(d, "ink", 0.1, 0.6), ruled * 0.8), 0.01 * fibre)


def cast_metal(x, y, d):
    blotch = noise("smoke", x * d.log("f", 0.4, 2), y * d.log("g", 0.4, 2), d, "blotch") - 0.5
    grain = noise("cloud", x * d.log("h", 1, 8), y * d.log("k", 1, 8), d, "grain") - 0.5
    groove = wave(y * d.log("pitch", 3, 40) + 0.3 * blotch) * d.chance("machined", 0.4) * d("groove", 0, 0.5)
    tone = 1 + d("a", 0, 0.7) * blotch + d("b", 0.05, 0.5) * grain - groove
    return Surface(colour(d, "metal", 0.2, 0.8, 0.15) * tone[:, None].clamp(0), 0.02 * grain)


def felt(x, y, d):
    f = d.log("f", 1.5, 5)
    strand = noise("ridge", x * f, y * f, d, "a") * noise("ridge", y * f, x * f, d, "b")
    speck = noise("id", x * f * 2, y * f * 2, d, "speck") > d("rare", 0.7, 1.0)
    body = mix(colour(d, "dark", 0.1, 0.6), colour(d, "light", 0.3, 0.95), strand)
    return Surface(mix(body, colour(d, "fleck"), speck.float() * 0.6), 0.03 * strand)


def pattern(x, y, d):
    """A random program: warped waves and noise, folded and thresholded (as in procedural image pre-training)."""
    u, v, layers = x, y, []
    for i in range(3):
        f, angle = d.log(f"f{i}", 0.7, 8), d(f"angle{i}", 0, math.pi)
        bend = d(f"bend{i}", 0, 0.4) * (noise("cloud", u, v, d, f"bend{i}") - 0.5)
        u, v = u + bend, v - bend
        t = f * (u * torch.cos(angle) + v * torch.sin(angle))
        wavy, cells = wave(t), noise("edge", u * f * 0.5, v * f * 0.5, d, f"cell{i}")
        pick = d(f"pick{i}")
        layer = torch.where(pick < 0.5, wavy, torch.where(pick < 0.75, cells, noise("cloud", u * f, v * f, d, f"n{i}")))
        hard = d.chance(f"hard{i}", 0.4)
        layers.append(hard * fill(0.5 - layer, 0.1) + (1 - hard) * layer)
    body = mix(colour(d, "a"), colour(d, "b"), layers[0])
    body = mix(body, colour(d, "c"), layers[1] * d("second", 0, 0.8))
    return Surface(body * (1 - d("third", 0, 0.4) * layers[2])[:, None], 0.05 * layers[0] * d("relief"))


# ---- objects ------------------------------------------------------------------------------------------------------


def on_background(x, y, d, body: Tensor, height: Tensor, inside: Tensor) -> Surface:
    """The object on its bench: plain, cloudy or grained, usually lighter or darker than the part."""
    dark = d.chance("dark bench", 0.5)[:, None]
    bench = dark * colour(d, "bench", 0.02, 0.3) + (1 - dark) * colour(d, "bench", 0.65, 0.98, 0.3)
    cloud = d("bench cloud", 0, 0.3) * (noise("smoke", x, y, d, "bench") - 0.5)
    grain = d("bench grain", 0, 0.25) * (noise("grain", x * 3, y * 3, d, "bench") - 0.5)
    return Surface(mix(bench * (1 + cloud + grain)[:, None], body, inside), height * inside, inside)


def metal(x, y, d, name: str) -> Tensor:
    """(B, 3, H, W): a lightly grained metal or plastic colour."""
    cloud = noise("cloud", x * 2, y * 2, d, name) - 0.5
    return colour(d, name, 0.25, 0.85, 0.5) * (1 + d(name + ".grain", 0.02, 0.35) * cloud)[:, None]


def nut(x, y, d):
    r, radius = torch.hypot(x, y), d("radius", 0.6, 0.8)
    hole = d("hole", 0.35, 0.55) * radius
    outline = polygon(x, y, d.integer("sides", 4, 8), radius)
    thread = wave(r * d.log("pitch", 12, 30)) * fill(r - hole * 1.2, 0.05)
    chamfer = fill(0.08 - outline.abs(), 0.1)
    body = metal(x, y, d, "body") * (0.8 + 0.2 * chamfer - 0.3 * thread)[:, None]
    return on_background(x, y, d, body, 0.15 * chamfer - 0.05 * thread, fill(torch.maximum(outline, hole - r)))


def screw(x, y, d):
    length, shaft, head = d("length", 0.65, 0.85), d("shaft", 0.08, 0.16), d("head", 0.2, 0.32)
    pitch, neck = d.log("pitch", 8, 18), d("neck", -0.5, -0.1)
    ridge = wave(x * pitch + y * d("slant", -1.0, 1.0)) * fill(neck - x, 0.05)
    shank = box(x, y, length, shaft - 0.12 * shaft * (1 - ridge))
    tip = (y.abs() + (x - length) * 0.7) / 1.2
    cap = box(x + length, y, d("cap", 0.1, 0.16), head, 0.05)
    body = metal(x, y, d, "body") * (0.65 + 0.35 * ridge)[:, None]
    round_off = (1 - (y / (head + 0.02)) ** 2).clamp(min=0).sqrt()
    return on_background(x, y, d, body, 0.25 * round_off + 0.03 * ridge,
                         torch.maximum(fill(torch.maximum(shank, tip)), fill(cap)))


def bottle_top(x, y, d):
    r, radius, rings = torch.hypot(x, y), d("radius", 0.6, 0.85), d.log("rings", 1.5, 6)
    teeth = wave(torch.atan2(y, x) / (2 * math.pi) * d.integer("teeth", 12, 40)) * d("notch", 0, 0.05)
    ring = wave(r / radius * rings) * d("contrast", 0.2, 0.8)
    body = mix(metal(x, y, d, "rim"), metal(x, y, d, "core"), ring)
    body = mix(body, colour(d, "mouth", 0.02, 0.4), fill(r - d("mouth", 0.15, 0.5) * radius))
    return on_background(x, y, d, body, 0.08 * ring, fill(r - radius + teeth))


def pill(x, y, d):
    a, b = d("a", 0.55, 0.85), d("b", 0.35, 0.6)
    e = torch.hypot(x / a, y / b)
    score = fill(x.abs() - 0.02, 0.03) * d.chance("scored", 0.5)
    u, v = x * d.log("glyph", 4, 8), y * 5
    glyph = fill(0.12 - noise("edge", torch.round(u * 2) / 2, torch.round(v * 2) / 2, d, "glyph"), 0.1)
    glyph = glyph * fill(box(x, y, 0.3 * a, 0.25 * b)) * d.chance("printed", 0.5)
    speck = noise("grain", x * 3, y * 3, d, "speck") > d("specks", 0.85, 1.0)
    body = metal(x, y, d, "body") * (1 - 0.35 * score - 0.5 * glyph - 0.3 * speck.float())[:, None]
    dome = (1.02 - e**2).clamp(min=0).sqrt()
    return on_background(x, y, d, body, d("dome", 0.05, 0.3) * dome - 0.05 * score, fill(e - 1, 0.04))


def capsule(x, y, d):
    half, radius = d("half", 0.65, 0.85), d("radius", 0.2, 0.34)
    shape = box(x, y, half, radius, radius)
    seam = d("seam", -0.2, 0.2)
    body = mix(metal(x, y, d, "left"), metal(x, y, d, "right"), fill(seam - x, 0.02))
    band = fill((x - seam).abs() - 0.02) * 0.3
    print_ = fill(0.1 - noise("edge", torch.round(x * 14) / 4, torch.round(y * 14) / 4, d, "print"), 0.1)
    print_ = print_ * fill(box(x + 0.4 * half, y, 0.25, 0.08)) * d.chance("printed", 0.6)
    dome = (1.02 - (y / radius) ** 2).clamp(min=0).sqrt()
    return on_background(x, y, d, body * (1 - band - 0.6 * print_)[:, None], 0.25 * dome, fill(shape))


def circuit_board(x, y, d):
    f = d.log("f", 2, 6)
    u, v = x * f, y * f
    du, dv, iu, iv = u - torch.round(u), v - torch.round(v), torch.round(u), torch.round(v)

    def lot(name, a, b):  # a random number per grid place, taken from the middle of a noise cell
        return noise("grain", a * 1.37 + 0.01, b * 1.73 + 0.01, d, name)

    across_row = dv.abs() + 9 * (lot("row", torch.floor(u), iv) < d("density", 0.3, 0.6)).float()
    across_column = du.abs() + 9 * (lot("column", iu, torch.floor(v)) < d("density", 0.3, 0.6)).float()
    track = torch.minimum(across_row, across_column) - d("width", 0.06, 0.2)
    pad_here = (lot("pad", iu, iv) > d("pads", 0.4, 0.8)).float()
    pad = torch.hypot(du, dv) - d("pad", 0.18, 0.32)
    copper = torch.maximum(fill(track, 0.08), fill(pad, 0.08) * pad_here)
    drill = fill(pad + d("ring", 0.1, 0.2), 0.08) * pad_here * d.chance("drilled", 0.6)
    chip = fill(box(du, dv, 0.42, 0.3)) * (lot("chip", iu, iv) > d("chips", 0.75, 1.1)).float()
    body = mix(colour(d, "board", 0.02, 0.9), colour(d, "copper", 0.3, 0.98), copper)
    body = mix(mix(body, colour(d, "drill", 0.0, 0.3), drill), colour(d, "chip", 0.02, 0.3), chip)
    return Surface(body * (1 + 0.1 * (noise("grain", x * 2, y * 2, d, "g") - 0.5))[:, None],
                   0.02 * copper + 0.06 * chip)


def gear(x, y, d):
    r, angle = torch.hypot(x, y), torch.atan2(y, x) / (2 * math.pi)
    radius, bore = d("radius", 0.65, 0.85), d("bore", 0.1, 0.25)
    tooth = ((wave(angle * d.integer("teeth", 8, 28)) - 0.5) * 3).clamp(-0.5, 0.5)
    outline = r - radius - d("depth", 0.06, 0.14) * tooth
    spokes = d.integer("spokes", 3, 6)
    window = (r - 0.55 * radius).abs() - 0.15 * radius + 0.3 * (wave(angle * spokes) > 0.7).float()
    window = window + 9 * (1 - d.chance("windows", 0.5))
    inside = fill(outline) * fill(bore - r) * fill(-window)
    body = metal(x, y, d, "body") * (0.8 + 0.2 * wave(r * d.log("turned", 4, 20)))[:, None]
    return on_background(x, y, d, body, 0.1 * inside, inside)


def cable(x, y, d):
    radius, wires = d("radius", 0.65, 0.85), d.integer("wires", 2, 4)
    r, angle = torch.hypot(x, y), torch.atan2(y, x) / (2 * math.pi)
    sector = torch.round(angle * wires)
    turn = sector / wires * 2 * math.pi
    u, v = x * torch.cos(turn) + y * torch.sin(turn) - 0.48 * radius, y * torch.cos(turn) - x * torch.sin(turn)
    wire = torch.hypot(u, v) - d("wire", 0.3, 0.4) * radius
    core = wire + d("coat", 0.08, 0.16) * radius
    strand = (noise("edge", x * d.log("strand", 3, 6), y * 4, d, "strand") * 3).clamp(max=1)
    tint = noise("grain", sector % wires * 2.3, 0 * x, d, "tint")
    coat = mix(colour(d, "coat a", 0.2), colour(d, "coat b", 0.2), tint)
    body = mix(metal(x, y, d, "filler"), coat, fill(wire))
    body = mix(body, colour(d, "copper", 0.4, 0.9) * (0.4 + 0.6 * strand)[:, None], fill(core))
    body = mix(body, colour(d, "sheath", 0.05, 0.8), fill(0.9 * radius - r))
    return on_background(x, y, d, body, 0.05 * fill(core) * strand + 0.05 * fill(wire), fill(r - radius))


def connector(x, y, d):
    half_x, half_y, pins = d("half x", 0.6, 0.85), d("half y", 0.3, 0.55), d.integer("pins", 3, 9)
    pitch = 1.7 * half_x / pins
    column = (x / pitch - 0.5 * (pins % 2 - 1)).clamp(-9, 9)
    du = (column - torch.round(column)) * pitch
    rows = d.integer("rows", 1, 2)
    dv = y.abs() * (rows - 1) + y * (2 - rows) - 0.45 * half_y * (rows - 1)
    pin = box(du, dv, 0.3 * pitch, d("pin", 0.3, 0.8) * 0.3) + 9 * (x.abs() > 0.85 * half_x).float()
    body = mix(metal(x, y, d, "shell"), metal(x, y, d, "pins"), fill(pin))
    return on_background(x, y, d, body, 0.08 * fill(pin), fill(box(x, y, half_x, half_y, 0.06)))


def ring(x, y, d):
    r = torch.hypot(x, y * d("squash", 0.8, 1.0))
    middle, half = d("middle", 0.5, 0.65), d("half", 0.06, 0.2)
    band = (r - middle) / half
    groove = wave(band * d.log("grooves", 0.3, 2)) * d("groove", 0, 0.5)
    body = metal(x, y, d, "body") * (1 - groove)[:, None]
    return on_background(x, y, d, body, 0.15 * (1 - band**2).clamp(min=0).sqrt(), fill(half * (band.abs() - 1)))


TEXTURES = (brushed_metal, weave, wood, leather, concrete, asphalt, tile, mesh, paper, cast_metal, felt, pattern,
            circuit_board)
OBJECTS = (nut, screw, bottle_top, pill, capsule, gear, cable, connector, ring)
FAMILIES = {family.__name__: family for family in TEXTURES + OBJECTS}
