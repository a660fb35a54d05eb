"""Objects of the mini world: what a good part looks like on its bench, as functions of position.

Families as in :mod:`miniworld.textures`, but they end: ``inside`` of their :class:`Surface` is the part.
"""

import math

import torch
from torch import Tensor

from miniworld.noise import Dice, noise
from miniworld.surface import Surface, box, colour, fill, fold, mix, polygon, wave
from miniworld.textures import label


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


def material(x: Tensor, y: Tensor, d: Dice, name: str) -> Tensor:
    """(B, 3, H, W): a colour with a grain of its own: plain, cloudy, of cells, of strands."""
    f = d.log(name + ".f", 1, 8)
    cell = (noise("edge", x * f, y * f, d, name + ".cell") * d.log(name + ".sharp", 1, 4)).clamp(max=1)
    cloud = noise("cloud", x * f, y * d.log(name + ".g", 1, 8), d, name + ".cloud")
    cells = d.chance(name + ".cells", 0.4)
    tone = d(name + ".contrast", 0, 0.8) * (cells * cell + (1 - cells) * cloud - 0.5)
    return colour(d, name) * (1 + tone)[:, None]


def around(x: Tensor, y: Tensor, count: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates (outward, along) about the nearest of ``count`` places on a circle."""
    turn = torch.round(torch.atan2(y, x) / (2 * math.pi) * count) / count * 2 * math.pi
    cos, sin = torch.cos(turn), torch.sin(turn)
    return x * cos + y * sin - radius, y * cos - x * sin


def assembly(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """A random program: a body of some outline, a core, and like inserts around it, all of different materials."""
    radius, count = d("radius", 0.6, 0.85), d.integer("count", 2, 9)
    r = torch.hypot(x, y)
    lobes = d("lobes", 0, 0.12) * d.chance("lobed", 0.4) * (wave(torch.atan2(y, x) / (2 * math.pi) * count) - 0.5)
    square, broad = d.chance("square", 0.4), d("broad", 0.5, 1)
    outline = square * box(x, y, radius, radius * broad, 0.1) + (1 - square) * (r - radius * (1 + lobes))
    out, along = around(x, y, count, d("at", 0.4, 0.7) * radius)
    size, long = d("size", 0.08, 0.24) * radius, d("long", 0.6, 1.6)
    angular = d.chance("angular", 0.5)
    insert = angular * box(out, along, size, size * long) + (1 - angular) * (torch.hypot(out, along) - size)
    core = r - d("core", 0.1, 0.35) * radius
    body = mix(material(x, y, d, "body"), material(x, y, d, "core"), fill(core))
    body = mix(body, material(x, y, d, "insert"), fill(insert))
    body = mix(body, material(x, y, d, "heart"), fill(insert + d("rim", 0.2, 0.6) * size))
    height = d("raised", -0.08, 0.12) * fill(insert) + d("boss", -0.08, 0.12) * fill(core)
    holed = d.chance("holed", 0.3)
    return on_background(x, y, d, body, height, fill(outline) * (1 - holed * fill(core)))


def flange(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Turned disc, round or lobed, with bolt holes and a bore."""
    r, radius, count = torch.hypot(x, y), d("radius", 0.6, 0.85), d.integer("bolts", 3, 10)
    lobes = d("lobes", 0, 0.2) * (wave(torch.atan2(y, x) / (2 * math.pi) * count) - 0.5)
    out, along = around(x, y, count, d("circle", 0.65, 0.8) * radius)
    bolt = torch.hypot(out, along) - d("bolt", 0.05, 0.11) * radius
    bore, boss = r - d("bore", 0.1, 0.3) * radius, r - d("boss", 0.35, 0.55) * radius
    turned = wave(r * d.log("turned", 4, 30)) * d("groove", 0, 0.4)
    body = mix(metal(x, y, d, "disc"), metal(x, y, d, "boss"), fill(boss)) * (1 - turned)[:, None]
    inside = fill(r - radius * (1 + lobes)) * fill(-bolt) * fill(-bore)
    return on_background(x, y, d, body, 0.1 * inside + d("step", 0, 0.15) * fill(boss, 0.05), inside)


def tray(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Like pieces in rows on a tray: a blister, a cage, sweets."""
    half, broad, count = d("half", 0.7, 0.9), d("broad", 0.6, 1), d.integer("count", 2, 6)
    pitch = 1.8 * half / count
    rows = torch.floor(count * broad).clamp(min=1)
    u, v = x / pitch - 0.5 * ((count + 1) % 2), y / pitch - 0.5 * ((rows + 1) % 2)
    column, row = (torch.minimum(torch.maximum(torch.round(t), -((n - (n % 2)) / 2)), (n - 2 + (n % 2)) / 2)
                   for t, n in ((u, count), (v, rows)))  # fmt: skip
    du, dv, angular = u - column, v - row, d.chance("angular", 0.4)
    piece = angular * box(du, dv, d("wide", 0.25, 0.42), 0.36, 0.06) + (1 - angular) * (torch.hypot(du, dv) - 0.36)
    dome = (-piece * 4).clamp(0, 1).sqrt()
    body = mix(material(x, y, d, "tray"), material(x, y, d, "piece"), fill(piece, 0.06))
    return on_background(x, y, d, body, d("dome", 0, 0.3) * pitch * dome, fill(box(x, y, half, half * broad, 0.08)))


def name_plate(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Plate with printed or stamped signs, a frame and screw holes."""
    half_x, half_y = d("half x", 0.65, 0.88), d("half y", 0.35, 0.6)
    text = label(x, y, d.split("text"))
    written = fill(box(x, y, half_x * 0.8, half_y * 0.65))
    frame = fill(box(x, y, half_x * 0.9, half_y * 0.85, 0.05).abs() - 0.02) * d.chance("framed", 0.6)
    ground = metal(x, y, d, "plate")
    body = mix(mix(ground, text.albedo, written * d("printed", 0.6, 1)), colour(d, "frame"), frame)
    hole = torch.hypot(x.abs() - half_x * 0.88, y.abs() - half_y * 0.8) - d("hole", 0.03, 0.07)
    inside = fill(box(x, y, half_x, half_y, 0.06)) * fill(-hole)
    return on_background(x, y, d, body, text.height * written + 0.03 * frame + 0.05 * inside, inside)


def coil(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Spring seen from the side: a wire that winds to and fro."""
    long, high, turns = d("long", 0.6, 0.85), d("high", 0.2, 0.5), d.log("turns", 2, 5)
    wire, phase = d("wire", 0.05, 0.11), 2 * math.pi * turns * x
    slope = 2 * math.pi * turns * high
    away = (y - high * torch.sin(phase)).abs() / (1 + (slope * torch.cos(phase)) ** 2).sqrt()
    away = torch.maximum(away, x.abs() - long)
    across = (away / wire).clamp(0, 1)
    body = metal(x, y, d, "wire") * (0.5 + 0.5 * (1 - across**2))[:, None]
    return on_background(x, y, d, body, 0.1 * (1 - across**2).sqrt(), fill(away - wire))


def cookie(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Something baked or moulded by hand: a wavy outline, crumbs, chips, pricked holes."""
    r, angle, radius = torch.hypot(x, y), torch.atan2(y, x), d("radius", 0.55, 0.8)
    wavy = sum(d(f"wave {n}", 0, 0.25 / n) * torch.cos(n * angle + d(f"phase {n}", 0, 6.3)) for n in (2, 3, 5))
    f = d.log("f", 1, 4)
    crumb = noise("cloud", x * f, y * f, d, "crumb") - 0.5
    rare = noise("id", x * f, y * f, d, "chip") > d("chips", 0.6, 1.1)
    chip = rare * fill(noise("cell", x * f, y * f, d, "chip") - 0.35)
    prick = d.chance("pricked", 0.4) * fill(torch.hypot(*(fold(t * d.log("pitch", 2, 4)) for t in (x, y))) - 0.08, 0.05)
    body = colour(d, "dough", 0.3, 0.9) * (1 + d("rough", 0.1, 0.7) * crumb - 0.6 * prick)[:, None]
    body = mix(body, colour(d, "chip"), chip)
    edge = r - radius * (1 + wavy)
    height = 0.08 * crumb / f + d("thick", 0.05, 0.2) * (-edge * 3).clamp(0, 1).sqrt() - 0.04 * prick
    return on_background(x, y, d, body, height, fill(edge, 0.04))


def bracket(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Bent or milled angle of two arms, with holes."""
    long, thick = d("long", 0.6, 0.8), d("thick", 0.15, 0.3)
    across = x + d("at", 0, 1) * (long - thick)
    arm_a, arm_b = box(x, y + long - thick, long, thick, 0.04), box(across, y, thick, long, 0.04)
    hole_a = torch.hypot(x.abs() - d("a", 0.3, 0.7) * long, y + long - thick) - d("hole", 0.2, 0.5) * thick
    slot = box(across, y - 0.3 * long, 0.3 * thick, d("slot", 0.1, 0.4) * long, 0.03)
    groove = wave(y * d.log("pitch", 3, 30)) * d("groove", 0, 0.3)
    body = mix(metal(x, y, d, "a"), metal(x, y, d, "b"), fill(arm_b, 0.05)) * (1 - groove)[:, None]
    inside = fill(torch.minimum(arm_a, arm_b)) * fill(-hole_a) * (1 - d.chance("slotted", 0.6) * fill(slot))
    return on_background(x, y, d, body, 0.1 * inside + 0.05 * fill(arm_b, 0.05), inside)


OBJECTS = {family.__name__: family for family in (
    nut, screw, bottle_top, pill, capsule, gear, cable, connector, ring,
    assembly, flange, tray, name_plate, coil, cookie, bracket,
)}  # fmt: skip
