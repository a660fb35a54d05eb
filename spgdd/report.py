"""Diagnoses as HTML: a card for a notebook, a page for one or many. No scripts, no other files.

The page is in ``report.html``, a Jinja template that escapes all that a file or a user can name.
"""

import base64
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from spgdd.files import whole_file
from spgdd.views import Views

PREVIEW = 480  # pixels of the longer side of a picture
PREVIEW_BYTES = 65_000
BINS = 40  # columns of the histogram
HEAT = np.array([(255, 225, 90), (255, 140, 0), (205, 15, 60)], np.float32)  # weak, at threshold, strong
COLOURS = {"normal": "#1a7f4b", "defective": "#c8253c", "unsure": "#a86400"}


@cache
def _template():
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["number"] = number
    return environment.get_template("report.html", globals={"colours": COLOURS}).module


def card(diagnosis) -> str:
    """HTML of one diagnosis (below 200 kB): picture, heat map, score against threshold, text, regions."""
    return _template().style() + _card(diagnosis)


class Report:
    """A page that grows diagnosis by diagnosis; what has been added is not kept in memory.

    ``errors``: lines about what could not be diagnosed.
    """

    def __init__(self, diagnoses: Iterable = (), errors: Iterable[str] = ()):
        self._cards = tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace")
        self._rows, self._counts, self._normals, self.errors = [], Counter(), {}, [*errors]
        for diagnosis in diagnoses:
            self.add(diagnosis)

    def add(self, diagnosis) -> None:
        """One card more."""
        d = diagnosis
        self._cards.write(f'<article id="d{len(self._rows)}">{_card(d)}</article>\n')
        row = {name: getattr(d, name) for name in ("image", "verdict", "score", "threshold", "text")}
        self._rows.append(row | {"places": places(d)})
        self._counts[d.verdict] += 1
        self._normals |= dict.fromkeys(d.normals)

    def save(self, path: str | Path) -> Path:
        """Write the page: an overview, ``errors``, then the cards. Raises SpgddError where that fails."""
        html, counts = _template(), [(name, self._counts[name]) for name in COLOURS if self._counts[name]]
        self._cards.seek(0)
        with whole_file(path) as file:
            for part in (html.head("Defect diagnosis"),
                         html.overview(self._rows, counts, list(self._normals), self.errors), *self._cards,
                         "</body></html>\n"):  # fmt: skip
                file.write(part.encode("utf-8", errors="backslashreplace"))  # file names may hold anything
        return Path(path)


def places(diagnosis) -> str:
    """The strongest regions in short: "top left 0.4%, right 2.1%", or "-"."""
    named = [f"{region.place} {region.area_share:.1%}" for region in diagnosis.regions[:3]]
    more = [f"{len(diagnosis.regions) - 3} more"] if len(diagnosis.regions) > 3 else []
    return ", ".join(named + more) or "-"


def sentence(diagnosis) -> str:
    """What a map says in words, for a model that has no language part."""
    d = diagnosis
    if not d.comparable:
        return f"As a whole the picture is unlike the normal ones of this {d.product}, so its map says nothing."
    if d.verdict == "normal":
        return f"By the map alone: nothing on this {d.product} looks unlike the normal pictures."
    several = len(d.regions) > 1
    certainty = "may look" if d.verdict == "unsure" else "look" if several else "looks"
    count = f"{len(d.regions)} places" if several else "one place"
    return f"By the map alone: {count} of this {d.product} {certainty} unlike the normal pictures ({places(d)})."


def number(value: float) -> str:
    """A score as people read it: three decimals, or two digits where these would be zeros."""
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.1e}"


def summary(diagnosis) -> str:
    """HTML of verdict, histogram of normal scores, regions and notes: a card without pictures and text."""
    return _template().style() + _template().summary(diagnosis, _facts(diagnosis) | {"dots": ()})


def _card(d) -> str:
    picture, heat = (base64.b64encode(data).decode() for data in (d.preview, _jpeg(overlay(d))))
    wide = d.views.width > 1.5 * d.views.height
    return _template().card(d, _facts(d) | {"picture": picture, "heat": heat, "wide": wide})


def _facts(d) -> dict:
    """What the template cannot find out itself; places on the scale are in percent of its width."""
    folder, name = os.path.split(d.image)
    scores = d.calibration.scores
    end = 1.15 * max(d.score, d.limits.high, *scores, 1e-6)
    values = (d.score, d.limits.low, d.limits.high, d.threshold, *scores)
    score_at, low, high, threshold_at, *dots = (f"{100 * max(value, 0) / end:.2f}" for value in values)
    counts, _ = np.histogram(scores, BINS, (0, end))
    green, amber, red = (COLOURS[verdict] + "66" for verdict in ("normal", "unsure", "defective"))
    return {
        "folder": os.path.join(folder, ""), "name": name, "score_at": score_at, "threshold_at": threshold_at,
        "dots": dots, "columns": [100 * count / max(1, *counts) for count in counts],
        "scale": f"linear-gradient(90deg,{green} {low}%,{amber} {low}% {high}%,{red} {high}%)",
    }  # fmt: skip


def preview(picture: Image.Image) -> bytes:
    """JPEG of PREVIEW pixels on the longer side."""
    scale = PREVIEW / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    method = Image.Resampling.LANCZOS if scale < 3 else Image.Resampling.NEAREST
    return _jpeg(picture.resize(size, method, reducing_gap=3))


def _jpeg(picture: Image.Image) -> bytes:
    """The best quality that stays below PREVIEW_BYTES."""
    for quality in (90, 75, 50, 25, 5):
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        if buffer.tell() < PREVIEW_BYTES:
            break
    return buffer.getvalue()


def overlay(diagnosis, opacity: float = 0.6, box=None) -> Image.Image:
    """The preview under the heat map, its colours tied to the threshold, with the regions; ``opacity`` 0 to 1.

    ``box`` (x0, y0, x1, y1) in pixels of the picture: a rectangle to draw in white.
    """
    d = diagnosis
    picture = Image.open(BytesIO(d.preview)).convert("RGB")
    heat = Views(*picture.size, d.views.fit, size=d.views.size).to_picture(d.square_map)  # (H, W)
    strength = np.clip(np.nan_to_num(heat) / d.threshold - 0.5, 0, 1)[..., None]  # 0.5 at the threshold
    upper = (strength[..., 0] > 0.5).astype(int)
    share = strength * 2 - upper[..., None]
    colour = HEAT[upper] * (1 - share) + HEAT[upper + 1] * share  # (H, W, 3)
    alpha = np.minimum(strength, opacity)
    pixels = np.asarray(picture) * (1 - alpha) + colour * alpha
    pixels[np.isnan(heat)] *= 0.35  # not seen by the model
    scale = np.array([picture.width / d.views.width, picture.height / d.views.height] * 2)
    boxes = [np.rint(np.array(region.box) * scale).astype(int).tolist() for region in d.regions]
    inside = np.zeros(heat.shape, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        inside[y0:y1, x0:x1] = True
    inside &= heat > d.limits.outline
    pixels[inside & ~ndimage.binary_erosion(inside, iterations=2, border_value=1)] = 255
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for colour, width in (("black", 5), ("white", 2)) if box else ():
        draw.rectangle((np.array(box) * scale).tolist(), outline=colour, width=width)
    for number_, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=COLOURS["defective"], width=2)
        width = 9 + 9 * len(str(number_))
        left, top = min(x0, picture.width - width), max(0, y0 - 19)
        draw.rectangle((left, top, left + width - 1, top + 19), fill=COLOURS["defective"])
        draw.text((left + 5, top + 1), str(number_), fill="white", font=font)
    return picture
