"""Objects of the mini world: what a good part looks like on its bench, as functions of position.

Families as in :mod:`spgdd.tadd.miniworld.textures`, but they end: ``inside`` of their :class:`Surface` is the part.
"""

import math

import torch
from torch import Tensor

from spgdd.tadd.miniworld.noise import Dice, noise
from spgdd.tadd.miniworld.surface import Surface, box, colour, fill, mix, polygon, wave


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


def nut(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Polygon with a chamfer and a threaded hole."""
    r, radius = torch.hypot(x, y), d("radius", 0.6, 0.8)
    hole = d("hole", 0.35, 0.55) * radius
    outline = polygon(x, y, d.integer("sides", 4, 8), radius)
    thread = wave(r * d.log("pitch", 12, 30)) * fill(r - hole * 1.2, 0.05)
    chamfer = fill(0.08 - outline.abs(), 0.1)
    body = metal(x, y, d, "body") * (0.8 + 0.2 * chamfer - 0.3 * thread)[:, None]
    return on_background(x, y, d, body, 0.15 * chamfer - 0.05 * thread, fill(torch.maximum(outline, hole - r)))


def screw(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Head, shank with a thread, tip."""
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


def bottle_top(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Toothed disc with rings, seen from above."""
    r, radius, rings = torch.hypot(x, y), d("radius", 0.6, 0.85), d.log("rings", 1.5, 6)
    teeth = wave(torch.atan2(y, x) / (2 * math.pi) * d.integer("teeth", 12, 40)) * d("notch", 0, 0.05)
    ring = wave(r / radius * rings) * d("contrast", 0.2, 0.8)
    body = mix(metal(x, y, d, "rim"), metal(x, y, d, "core"), ring)
    body = mix(body, colour(d, "mouth", 0.02, 0.4), fill(r - d("mouth", 0.15, 0.5) * radius))
    return on_background(x, y, d, body, 0.08 * ring, fill(r - radius + teeth))


def pill(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Elliptic dome, scored, printed or plain."""
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


def capsule(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Two halves, printed or plain."""
    half, radius = d("half", 0.65, 0.85), d("radius", 0.2, 0.34)
    shape = box(x, y, half, radius, radius)
    seam = d("seam", -0.2, 0.2)
    body = mix(metal(x, y, d, "left"), metal(x, y, d, "right"), fill(seam - x, 0.02))
    band = fill((x - seam).abs() - 0.02) * 0.3
    print_ = fill(0.1 - noise("edge", torch.round(x * 14) / 4, torch.round(y * 14) / 4, d, "print"), 0.1)
    print_ = print_ * fill(box(x + 0.4 * half, y, 0.25, 0.08)) * d.chance("printed", 0.6)
    dome = (1.02 - (y / radius) ** 2).clamp(min=0).sqrt()
    return on_background(x, y, d, body * (1 - band - 0.6 * print_)[:, None], 0.25 * dome, fill(shape))


def gear(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Toothed wheel with a bore, with windows or without."""
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


def cable(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Cut through a cable: sheath, coats, strands."""
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


def connector(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Shell with one or two rows of pins."""
    half_x, half_y, pins = d("half x", 0.6, 0.85), d("half y", 0.3, 0.55), d.integer("pins", 3, 9)
    pitch = 1.7 * half_x / pins
    column = (x / pitch - 0.5 * (pins % 2 - 1)).clamp(-9, 9)
    du = (column - torch.round(column)) * pitch
    rows = d.integer("rows", 1, 2)
    dv = y.abs() * (rows - 1) + y * (2 - rows) - 0.45 * half_y * (rows - 1)
    pin = box(du, dv, 0.3 * pitch, d("pin", 0.3, 0.8) * 0.3) + 9 * (x.abs() > 0.85 * half_x).float()
    body = mix(metal(x, y, d, "shell"), metal(x, y, d, "pins"), fill(pin))
    return on_background(x, y, d, body, 0.08 * fill(pin), fill(box(x, y, half_x, half_y, 0.06)))


def ring(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Round or oval band, grooved or plain."""
    r = torch.hypot(x, y * d("squash", 0.8, 1.0))
    middle, half = d("middle", 0.5, 0.65), d("half", 0.06, 0.2)
    band = (r - middle) / half
    groove = wave(band * d.log("grooves", 0.3, 2)) * d("groove", 0, 0.5)
    body = metal(x, y, d, "body") * (1 - groove)[:, None]
    return on_background(x, y, d, body, 0.15 * (1 - band**2).clamp(min=0).sqrt(), fill(half * (band.abs() - 1)))


OBJECTS = {family.__name__: family for family in (
    nut, screw, bottle_top, pill, capsule, gear, cable, connector, ring,
)}  # fmt: skip
