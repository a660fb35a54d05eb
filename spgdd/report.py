"""Diagnoses as HTML: a card for a notebook, a page for one or many. No scripts, no other files."""

import base64
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from spgdd.errors import SpgddError
from spgdd.views import Placement

PREVIEW = 480  # pixels of the longer side of a picture
PREVIEW_BYTES = 65_000
LISTED = 8  # regions in the table of a card
HEAT = np.array([(255, 225, 90), (255, 140, 0), (205, 15, 60)], np.float32)  # weak, at threshold, strong
COLOURS = {"normal": "#1a7f4b", "defective": "#c8253c", "unsure": "#a86400"}
AGREEMENT = {
    "agree": "text and map agree", "disagree": "text and map disagree", "undecided": "the map is unsure",
    "unparsed": "the text says neither Yes nor No",
}  # fmt: skip
STYLE = """<style>
.spgdd,.spgdd-page{font:14px/1.5 system-ui,sans-serif;text-align:left}
.spgdd{max-width:1060px;border:1px solid #8884;border-radius:12px;padding:16px 20px;margin:8px 0}
.spgdd-title,.spgdd-body{display:flex;flex-wrap:wrap;align-items:center;gap:4px 12px;margin-bottom:12px}
.spgdd-title b{font-size:16px;overflow-wrap:anywhere}
.spgdd-body{align-items:flex-start;gap:16px 28px;margin:0}
.spgdd-soft{opacity:.7;overflow-wrap:anywhere} .spgdd-small{font-size:12px;opacity:.7}
.spgdd-badge{color:#fff;font-weight:600;border-radius:99px;padding:2px 12px;white-space:nowrap}
.spgdd-chip{border:1px solid;border-radius:99px;padding:0 8px;font-size:12px;white-space:nowrap}
.spgdd-pictures{flex:3 1 300px;display:flex;gap:12px;max-width:560px}
.spgdd-pictures.wide{flex-direction:column}
.spgdd-pictures figure{flex:1 1 0;margin:0;min-width:0}
.spgdd-pictures img{display:block;width:100%;max-height:420px;object-fit:contain;object-position:0 0;margin:0}
.spgdd-heat{display:flex;align-items:center;gap:8px;margin-top:6px}
.spgdd-heat i{flex:1;height:6px;border-radius:3px;
 background:linear-gradient(90deg,#ffe15a00,#ffe15a 25%,#ff8c00 48%,currentColor 48% 52%,#ff8c00 52%,#cd0f3c)}
.spgdd-facts{flex:2 1 300px;min-width:0}
.spgdd-bar{position:relative;height:12px;border-radius:6px;margin:8px 0 16px}
.spgdd-bar i{position:absolute;top:0;bottom:0;width:2px;margin-left:-1px;background:currentColor}
.spgdd-bar i.dot{top:16px;bottom:auto;width:6px;height:6px;margin-left:-3px;border-radius:3px;opacity:.5}
.spgdd-bar i.score{top:-4px;bottom:-4px;width:6px;margin-left:-3px;border-radius:3px}
.spgdd-says{border-left:3px solid #8886;padding:2px 0 2px 12px;margin:14px 0;overflow-wrap:anywhere}
.spgdd table,.spgdd-page table{border-collapse:collapse;font-size:13px;width:100%;margin:12px 0;
 table-layout:auto} .spgdd tr{background:none!important}
.spgdd th,.spgdd td,.spgdd-page th,.spgdd-page td{text-align:left!important;padding:4px 12px 4px 0;
 vertical-align:top;border:0;border-bottom:1px solid #8883;background:none;font-variant-numeric:tabular-nums}
.spgdd-page td:first-child,.spgdd-page td:last-child{overflow-wrap:anywhere}
</style>"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>{style}<style>
:root{{color-scheme:light dark}} body{{background:Canvas;color:CanvasText;max-width:1100px;
 margin:32px auto;padding:0 16px}} h1{{font-size:26px;line-height:1.2;margin:0 0 12px}} a{{color:inherit}}
.spgdd{{margin:20px 0}} .spgdd-all{{overflow-x:auto}} .spgdd-all table{{min-width:760px}}
</style></head><body class="spgdd-page"><h1>{title}</h1>
{body}
</body></html>
"""


def card(diagnosis, style: str = STYLE) -> str:
    """HTML of one diagnosis (below 200 kB): picture, heat map, score against threshold, text, regions."""
    d = diagnosis
    folder, name = os.path.split(d.image)
    chips = "" if d.calibration.scores else '<span class="spgdd-chip">not calibrated</span>'
    if d.agreement in AGREEMENT:
        colour = "color:#e8590c" if d.agreement == "disagree" else ""
        chips += f'<span class="spgdd-chip" style="{colour}">{AGREEMENT[d.agreement]}</span>'
        chips += f'<span class="spgdd-chip">text: Yes {d.yes:.0%}</span>'
    turns = "".join(
        f'<div class="spgdd-says"><div class="spgdd-soft">{escape(asked)}</div>{escape(answer) or "-"}</div>'
        for asked, answer in (*d.history, (d.question, d.text))
    )
    rows = "".join(
        f"<tr><td>{number}</td><td>{region.place}</td><td>{region.area_share:.1%}</td>"
        f"<td>{', '.join(map(str, region.box))}</td><td>{region.peak:.3f}</td></tr>"
        for number, region in enumerate(d.regions[:LISTED], start=1)
    )
    if len(d.regions) > LISTED:
        rows += f"<tr><td></td><td colspan=4>and {len(d.regions) - LISTED} weaker ones</td></tr>"
    heads = "<tr><th></th><th>place</th><th>area</th><th>box (px)</th><th>peak</th></tr>"
    notes = "".join(f'<div class="spgdd-soft">Note: {escape(note)}.</div>' for note in d.notes)
    folder = escape(os.path.join(folder, ""))
    size = f"{d.placement.width} &times; {d.placement.height}"
    about = f"{escape(d.product)} &middot; {size} &middot; {escape(d.profile)}"
    return (
        f'{style}<div class="spgdd"><div class="spgdd-title">{_badge(d.verdict)}'
        f'<span><span class="spgdd-soft">{folder}</span><b>{escape(name)}</b></span>'
        f'<span class="spgdd-soft">{about}</span>{chips}</div>'
        f'<div class="spgdd-body">{_pictures(d)}<div class="spgdd-facts">{_score(d)}{turns}'
        f"{f'<table>{heads}{rows}</table>' if rows else ''}{notes}</div></div></div>"
    )


def save_report(path: str | Path, diagnoses: Sequence, errors: Sequence[str] = ()) -> Path:
    """Write a page: a table of all diagnoses, the errors, then a card for each."""
    counts = Counter(d.verdict for d in diagnoses)
    parts = [_badge(f"{counts[verdict]} {verdict}", verdict) for verdict in COLOURS if counts[verdict]]
    if normals := list(dict.fromkeys(name for d in diagnoses for name in d.normals)):
        parts.append(f'<p class="spgdd-soft">Compared with: {escape(", ".join(normals))}</p>')
    if len(diagnoses) > 1:
        rows = "".join(
            f'<tr><td><a href="#d{n}">{escape(d.image)}</a></td><td>{_badge(d.verdict)}</td><td>{d.score:.3f}'
            f"</td><td>{d.threshold:.3f}</td><td>{places(d)}</td><td>{escape(d.text)}</td></tr>"
            for n, d in enumerate(diagnoses)
        )
        titles = ("picture", "", "score", "threshold", "regions", "answer")
        heads = "".join(f"<th>{title}</th>" for title in titles)
        parts.append(f'<div class="spgdd-all"><table><tr>{heads}</tr>{rows}</table></div>')
    parts += [f"<p><b>Not diagnosed.</b> {escape(error)}</p>" for error in errors]
    parts += [f'<article id="d{n}">{card(d, style="")}</article>' for n, d in enumerate(diagnoses)]
    return write_text(path, PAGE.format(title="Defect diagnosis", style=STYLE, body="\n".join(parts)))


def places(diagnosis) -> str:
    """The strongest regions in short: "top left 0.4%, right 2.1%", or "-"."""
    named = [f"{region.place} {region.area_share:.1%}" for region in diagnosis.regions[:3]]
    more = [f"{len(diagnosis.regions) - 3} more"] if len(diagnosis.regions) > 3 else []
    return ", ".join(named + more) or "-"


def write_text(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all, with the folders it needs. Raises SpgddError where that fails."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may hold anything
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise SpgddError(f"{path}: cannot be written ({error.strerror}).") from error
    return path


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


def _pictures(d) -> str:
    picture, heat = (base64.b64encode(data).decode() for data in (d.preview, _overlay(d)))
    wide = " wide" if d.placement.width > 1.5 * d.placement.height else ""
    return (
        f'<div class="spgdd-pictures{wide}">'
        f'<figure><img alt="the picture" src="data:image/jpeg;base64,{picture}"></figure>'
        f'<figure><img alt="heat map" src="data:image/jpeg;base64,{heat}">'
        '<div class="spgdd-heat spgdd-small">like normal<i></i>unlike</div></figure></div>'
    )


def _overlay(d) -> bytes:
    """The preview under the heat map, its colours tied to the threshold, with the regions."""
    picture = Image.open(BytesIO(d.preview)).convert("RGB")
    heat = Placement(*picture.size, d.placement.fit).to_picture(d.square_map)  # (H, W)
    strength = np.clip(np.nan_to_num(heat) / d.threshold - 0.5, 0, 1)[..., None]  # 0.5 at the threshold
    upper = (strength[..., 0] > 0.5).astype(int)
    share = strength * 2 - upper[..., None]
    colour = HEAT[upper] * (1 - share) + HEAT[upper + 1] * share  # (H, W, 3)
    alpha = np.minimum(strength, 0.6)
    pixels = np.asarray(picture) * (1 - alpha) + colour * alpha
    pixels[np.isnan(heat)] *= 0.35  # not seen by the model
    scale = np.array([picture.width / d.placement.width, picture.height / d.placement.height] * 2)
    boxes = [np.rint(np.array(region.box) * scale).astype(int).tolist() for region in d.regions]
    inside = np.zeros(heat.shape, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        inside[y0:y1, x0:x1] = True
    inside &= heat > d.limits.outline
    pixels[inside & ~ndimage.binary_erosion(inside, iterations=2, border_value=1)] = 255
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    for number, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=COLOURS["defective"], width=2)
        width = 9 + 9 * len(str(number))
        left, top = min(x0, picture.width - width), max(0, y0 - 19)
        draw.rectangle((left, top, left + width - 1, top + 19), fill=COLOURS["defective"])
        draw.text((left + 5, top + 1), str(number), fill="white", font=font)
    return _jpeg(picture)


def _score(d) -> str:
    """The score on a scale: green normal, amber unsure, red defective; dots: scores of normal pictures."""
    scores = d.calibration.scores
    end = 1.15 * max(d.score, d.limits.high, *scores, 1e-6)
    values = (d.score, d.limits.low, d.limits.high, d.threshold, *scores)
    score, low, high, threshold, *dots = (f"{100 * max(value, 0) / end:.2f}%" for value in values)
    green, amber, red = (COLOURS[verdict] + "66" for verdict in ("normal", "unsure", "defective"))
    colours = f"linear-gradient(90deg,{green} {low},{amber} {low} {high},{red} {high})"
    basis = "half of the abnormal probability"
    if scores:
        rate, many = f"{100 * d.false_alarm_rate:.3g}% false alarms", d.calibration.pictures
        basis = f"{rate}, {d.calibration.method} on {many} normal picture{'s' * (many > 1)}"
    return (
        f'<div>score <b style="font-size:18px">{d.score:.3f}</b> &nbsp;threshold {d.threshold:.3f}</div>'
        f'<div class="spgdd-bar" style="background:{colours}"><i style="left:{threshold}"></i>'
        f'<i class="score" style="left:{score};background:{COLOURS[d.verdict]}"></i>'
        f"{''.join(f'<i class=dot style=left:{dot}></i>' for dot in dots)}</div>"
        f'<div class="spgdd-small">Threshold: {basis}</div>'
    )


def _badge(text: str, verdict: str = "") -> str:
    return f'<span class="spgdd-badge" style="background:{COLOURS[verdict or text]}">{text}</span> '
