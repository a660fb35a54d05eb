"""Textures of the mini world: what a good surface looks like, as functions of position.

A family maps points (x, y), (B, H, W) each with the picture spanning about -1..1, and the product's
:class:`Dice` to a :class:`Surface`. Textures go on for ever. All sizes, colours and counts come from the
product's dice, so one family holds very many products.
"""

import math

import torch
from torch import Tensor

from miniworld.noise import Dice, noise
from miniworld.surface import Surface, box, colour, fill, fold, mix, wave


def brushed_metal(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Sheet with fine parallel lines."""
    f, base = d.log("f", 2, 6), colour(d, "base", 0.3, 0.85, 0.25)
    line = noise("cloud", x * f * 0.15, y * f * 3, d, "line") - 0.5
    blotch = noise("smoke", x * 1.5, y * 1.5, d, "blotch") - 0.5
    return Surface(base * (1 + d("a", 0.15, 0.6) * line + d("b", 0, 0.3) * blotch)[:, None], 0.02 * line)


def weave(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Cloth of two threads, from plain to twill."""
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


def wood(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Growth rings cut lengthwise, with pores."""
    f = d.log("f", 2, 10)
    bend = noise("smoke", x * 0.25, y * 1.2, d, "bend")
    ring = wave(f * (y + d("sway", 0.2, 1.0) * bend))
    pore = noise("cloud", x * 0.8, y * 12, d, "pore")
    tone = ring * d("contrast", 0.2, 0.7) + 0.3 * pore
    return Surface(mix(colour(d, "dark", 0.2, 0.5), colour(d, "light", 0.45, 0.9), tone), -0.01 * pore)


def leather(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Hide of small cells between creases."""
    f = d.log("f", 1.2, 5)
    u, v = x * f + 0.2 * noise("cloud", x * f, y * f, d, "u"), y * f + 0.2 * noise("cloud", x * f, y * f, d, "v")
    crease = (noise("edge", u, v, d, "cell") * 3).clamp(max=1)
    tone = 0.75 + 0.25 * crease + 0.2 * (noise("cloud", x, y, d, "tone") - 0.5)
    return Surface(colour(d, "hide", 0.15, 0.7) * tone[:, None], 0.08 * crease / f)


def concrete(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Clouds and grit, with air holes."""
    f = d.log("f", 0.7, 3)
    cloud = noise("cloud", x * f, y * f, d, "cloud") - 0.5
    grit = noise("grain", x * f * 2, y * f * 2, d, "grit") - 0.5
    hole = fill(noise("cell", x * f, y * f, d, "hole") - d("hole size", 0, 0.12), 0.08)
    base = colour(d, "base", 0.35, 0.85, 0.25)
    tone = 1 + d("a", 0.1, 0.6) * cloud + d("b", 0.05, 0.4) * grit - 0.5 * hole
    return Surface(base * tone[:, None], 0.02 * cloud - 0.03 * hole)


def asphalt(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Stones of many greys in grit."""
    f = d.log("f", 1.5, 6)
    stone = noise("id", x * f, y * f, d, "stone") * fill(noise("cell", x * f, y * f, d, "stone") - 0.4, 0.2)
    grit = noise("cloud", x * f * 2, y * f * 2, d, "grit")
    wear = noise("smoke", x * 0.7, y * 0.7, d, "wear")
    tone = 0.35 + d("stone", 0.1, 0.6) * stone + d("grit", 0.3, 0.9) * (grit - 0.3) + 0.4 * (wear - 0.5)
    return Surface(colour(d, "base", 0.3, 0.75, 0.25) * 1.4 * tone[:, None].clamp(0.05), 0.02 * grit + 0.03 * stone)


def tile(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Glazed tiles, plain or veined, with joints."""
    f, joint = d.log("f", 0.6, 2.5), d("joint", 0.01, 0.05)
    gap = torch.minimum(fold(x * f), fold(y * f * d("ratio", 0.5, 1.0)))
    vein = noise("ridge", x * d.log("vein f", 0.5, 3), y, d, "vein") ** d.integer("thin", 3, 12)
    body = mix(colour(d, "glaze", 0.3), colour(d, "vein", 0.1), vein * d("vein", 0, 0.7))
    speck = noise("grain", x * 4, y * 4, d, "speck") - 0.5
    inside = fill(joint - gap)
    body = mix(colour(d, "grout", 0.1, 0.7, 0.2), body * (1 + d("speck", 0, 0.5) * speck)[:, None], inside)
    return Surface(body, 0.04 * inside)


def mesh(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Plate or lattice with round or square holes."""
    f = d.log("f", 3, 12)
    u, v = x * f, y * f
    u = u + d.chance("staggered", 0.5) * 0.5 * (torch.round(v) % 2)
    du, dv = u - torch.round(u), v - torch.round(v)
    square = d.chance("square", 0.5)
    gap = square * torch.maximum(du.abs(), dv.abs()) + (1 - square) * torch.hypot(du, dv)
    metal = fill(d("hole", 0.25, 0.42) - gap, 0.1)
    grain = 1 + d("grain", 0, 0.4) * (noise("grain", x * 3, y * 3, d, "grain") - 0.5)
    return Surface(mix(colour(d, "void", 0.02, 0.9), colour(d, "wire", 0.1) * grain[:, None], metal), 0.05 * metal)


def paper(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Sheet of fibres, ruled or not."""
    fibre = noise("ridge", x * 3, y * 3, d, "fibre") * 0.5 + noise("grain", x * 2, y * 2, d, "grain") * 0.5
    ruled = fill(fold(y * d.log("rule", 2, 12)) - 0.04, 0.04) * d.chance("ruled", 0.4)
    sheet = colour(d, "sheet", 0.6, 0.95, 0.4) * (1 + d("a", 0.02, 0.3) * (fibre - 0.5))[:, None]
    return Surface(mix(sheet, colour(d, "ink", 0.1, 0.6), ruled * 0.8), 0.01 * fibre)


def cast_metal(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Blotched, grained metal, machined or not."""
    blotch = noise("smoke", x * d.log("f", 0.4, 2), y * d.log("g", 0.4, 2), d, "blotch") - 0.5
    grain = noise("cloud", x * d.log("h", 1, 8), y * d.log("k", 1, 8), d, "grain") - 0.5
    groove = wave(y * d.log("pitch", 3, 40) + 0.3 * blotch) * d.chance("machined", 0.4) * d("groove", 0, 0.5)
    tone = 1 + d("a", 0, 0.7) * blotch + d("b", 0.05, 0.5) * grain - groove
    return Surface(colour(d, "metal", 0.2, 0.8, 0.15) * tone[:, None].clamp(0), 0.02 * grain)


def felt(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Crossing strands, with flecks."""
    f = d.log("f", 1.5, 5)
    strand = noise("ridge", x * f, y * f, d, "a") * noise("ridge", y * f, x * f, d, "b")
    speck = noise("id", x * f * 2, y * f * 2, d, "speck") > d("rare", 0.7, 1.0)
    body = mix(colour(d, "dark", 0.1, 0.6), colour(d, "light", 0.3, 0.95), strand)
    return Surface(mix(body, colour(d, "fleck"), speck.float() * 0.6), 0.03 * strand)


def pattern(x: Tensor, y: Tensor, d: Dice) -> Surface:
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


def circuit_board(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Tracks, drilled pads and chips on a grid."""
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


def marble(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Polished stone: clouds within clouds, veined or blotched, of three minerals."""
    f = d.log("f", 0.3, 3)
    u, v = x * f, y * f
    for turn in "ab":
        bend = d("bend " + turn, 0, 0.8)
        u, v = (t + bend * (noise("smoke", u, v, d, name + turn) - 0.5) for t, name in ((u, "u"), (v, "v")))
    cloud, fine = noise("cloud", u, v, d, "cloud"), noise("grain", x * f * 3, y * f * 3, d, "fine") - 0.5
    vein = noise("ridge", u, v, d, "vein") ** d.integer("thin", 2, 12)
    hard = d.chance("hard", 0.4)
    blotch = hard * fill(d("level", 0.3, 0.7) - cloud, 0.1) + (1 - hard) * cloud
    body = mix(mix(colour(d, "a"), colour(d, "b"), blotch), colour(d, "c"), vein * d("veined", 0, 1))
    return Surface(body * (1 + d("grain", 0, 0.4) * fine)[:, None], d("relief", 0, 0.03) * blotch)


def terrazzo(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Chips of two minerals cast in cement, from scattered to packed."""
    f, warp = d.log("f", 0.8, 5), d("warp", 0, 0.2)
    u = x * f + warp * (noise("cloud", x * f, y * f, d, "u") - 0.5)
    v = y * f + warp * (noise("cloud", x * f, y * f, d, "v") - 0.5)
    number, gap = noise("id", u, v, d, "chip"), noise("edge", u, v, d, "chip")
    chip = fill(d("gap", 0.05, 0.35) - gap, 0.08) * (number > d("rare", 0, 0.7)).float()
    mineral = mix(colour(d, "a"), colour(d, "b"), wave(number * 7))
    grit = noise("grain", x * f, y * f, d, "grit") - 0.5
    body = mix(colour(d, "cement"), mineral, chip) * (1 + d("grit", 0, 0.5) * grit)[:, None]
    return Surface(body, d("relief", -0.04, 0.04) / f * chip)


def traces(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Conductor tracks: lines that follow each other around the hills of a smooth field, rounded or stepped."""
    f, step = d.log("f", 0.4, 1.6), d.log("step", 0.02, 0.1)
    stepped = d.chance("stepped", 0.5)
    u, v = (stepped * torch.round(t / step) * step + (1 - stepped) * t for t in (x, y))
    hill = noise("smoke", u * f, v * f, d, "hill") * d.log("lines", 5, 16)
    line = fill(fold(hill) - d("width", 0.1, 0.32), 0.06)
    grain = 1 + d("grain", 0, 0.3) * (noise("grain", x * 2, y * 2, d, "grain") - 0.5)
    body = mix(colour(d, "ground"), colour(d, "copper"), line) * grain[:, None]
    return Surface(body, d("relief", 0, 0.02) * line)


def label(x: Tensor, y: Tensor, d: Dice) -> Surface:
    """Lines of printed or stamped signs on paper, foil or metal."""
    f, high = d.log("f", 1.5, 5), d("high", 0.4, 0.8)
    u, v = x * f, y * f * high
    column, row = torch.floor(u), torch.floor(v)
    dot_u, dot_v = torch.floor((u - column) * 7), torch.floor((v - row) * 9)  # a sign has 5 x 7 dots
    dots = noise("grain", (column * 7 + dot_u) * 1.37 + 0.01, (row * 9 + dot_v) * 1.73 + 0.01, d, "dots")
    here = noise("grain", column * 1.37 + 0.01, row * 1.73 + 0.01, d, "here") < d("dense", 0.5, 1)
    sign = (dots > 0.5) & (dot_u < 5) & (dot_v < 7) & here
    fibre = noise("cloud", x * 2, y * 2, d, "fibre") - 0.5
    ground = colour(d, "ground", 0.3, 0.95, 0.4) * (1 + d("fibre", 0.02, 0.3) * fibre)[:, None]
    return Surface(mix(ground, colour(d, "ink", 0.02, 0.6), 0.9 * sign.float()), d("stamped", -0.02, 0.01) * sign)


TEXTURES = {family.__name__: family for family in (
    brushed_metal, weave, wood, leather, concrete, asphalt, tile, mesh, paper, cast_metal, felt, pattern, circuit_board,
    marble, terrazzo, traces, label,
)}  # fmt: skip
