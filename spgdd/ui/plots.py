"""Pictures that the notebooks share. matplotlib is imported where it is used."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from math import isqrt

import numpy as np
import torch

HEAT = "inferno"  # colours of maps: dark is low, bright is high, in greyscale too
MARKS = ((230, 110, 20), (86, 180, 233), (240, 228, 66), (0, 178, 130))  # of patches, in order; apart for all eyes
LINES = ("#0072b2", "#d55e00", "#00805f", "#9a7d0a", "#7b5aa6")  # of charts, each with a marker of its own
MARKERS = ("o", "s", "^", "D", "v")
DPI, QUALITY = 100, 82


def as_rgb(picture) -> np.ndarray:
    """A picture as uint8 (H, W, 3): PIL image, uint8 array (H, W, 3), or uint8 tensor (3, H, W)."""
    if isinstance(picture, torch.Tensor):
        picture = picture.permute(1, 2, 0).cpu().numpy()  # (3, H, W) -> (H, W, 3)
    elif not isinstance(picture, np.ndarray):
        picture = np.asarray(picture.convert("RGB"))
    return picture


def as_map(values) -> np.ndarray:
    """Values as float32 (H, W): an array or tensor with leading axes of length 1, or (N,) patches of a square."""
    values = np.squeeze(torch.as_tensor(values).detach().float().cpu().numpy())
    return values.reshape(isqrt(values.size), -1) if values.ndim == 1 else values  # (N,) -> (G, G)


def image_grid(
    rows: Sequence, titles: Sequence[str] = (), names: Sequence[str] = (), limits=None, side=1.7, scale="", alt=""
):
    """Pictures and maps in rows and columns, as one compact JPEG that says what its colours mean.

    ``rows``: a list of cells, or a list of such lists; a cell is what ``as_rgb`` takes, or a map (H, W), or a mask,
    bool (H, W), or None for none. ``titles`` stand above the columns of the first row (of every cell, where
    there is one title for each), ``names`` left of the rows. ``limits`` (low, high) of the maps' colours get a colour
    bar, named ``scale``; without them each map has its own. ``side`` of a cell in inches. ``alt``: what is told whoever
    cannot see it; by default titles and names.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows = rows if isinstance(rows[0], (list, tuple)) else [rows]
    columns = max(map(len, rows))
    every, maps = len(titles) > columns, False
    height = len(rows) * (side + 0.2 * every) + 0.3 * bool(titles and not every)
    figure = Figure(figsize=(columns * side + 0.3, height + 0.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    low, high = limits or (None, None)
    for r, cells in enumerate(rows):
        for c, axis in enumerate(axes[r]):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            cell = cells[c] if c < len(cells) else None
            if cell is not None and getattr(cell, "ndim", 3) == 2:
                mask = str(cell.dtype).endswith("bool")
                maps = maps or not mask
                colours = {"cmap": "gray"} if mask else {"cmap": HEAT, "vmin": low, "vmax": high}
                axis.imshow(as_map(cell), **colours)
            elif cell is not None:
                axis.imshow(as_rgb(cell))
            number = r * columns + c if every else c
            if (r == 0 or every) and number < len(titles):
                axis.set_title(titles[number], fontsize=10)
            if c == 0 and r < len(names):
                axis.set_ylabel(names[r], fontsize=10)
    if maps and limits:
        bar = figure.colorbar(ScalarMappable(Normalize(*limits), HEAT), ax=axes, aspect=25, pad=0.01)
        bar.set_label(scale, fontsize=10)
    elif maps:
        figure.supxlabel(f"each map from its lowest value (dark) to its highest (bright) {scale}".strip(), fontsize=9)
    return compact(figure, alt or f"Pictures: {'; '.join([*names, *titles])}.".replace("\n", ", "))


def chart(width=6.5, height=2.6, columns=1, **options):
    """A matplotlib figure and its ``columns`` axes, whose lines differ in colour and marker."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for axis in axes:
        axis.set_prop_cycle(color=LINES, marker=MARKERS)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def compact(figure, alt=""):
    """A matplotlib figure as a JPEG with an alternative text, for a notebook: a tenth of a PNG of photographs."""
    from IPython.display import Image

    buffer = BytesIO()
    trim = {"bbox_inches": "tight", "pad_inches": 0.05}
    figure.savefig(buffer, format="jpeg", dpi=DPI, pil_kwargs={"quality": QUALITY}, **trim)
    if not alt:
        labels = [axis.get_title() or f"{axis.get_ylabel()} over {axis.get_xlabel()}" for axis in figure.axes]
        alt = f"Chart: {'; '.join(labels)}."
    return Image(buffer.getvalue(), format="jpeg", metadata={"alt": alt})


def overlay(picture, anomaly_map=None, limit: float | None = None, mask=None) -> np.ndarray:
    """A picture under its map: uint8 (H, W, 3).

    Map (H, W), coloured from half of ``limit`` (default: its maximum) to ``limit`` and above. ``mask``,
    bool (H, W), is outlined white on black.
    """
    from matplotlib import colormaps
    from scipy.ndimage import binary_dilation

    pixels = as_rgb(picture).astype(np.float32)
    if anomaly_map is not None:
        heat = np.nan_to_num(as_map(anomaly_map))
        strength = np.clip(heat / (limit or heat.max() or 1) * 2 - 1, 0, 1)[..., None]  # (H, W, 1)
        colour = colormaps[HEAT](0.35 + 0.6 * strength[..., 0])[..., :3] * 255
        pixels += (colour - pixels) * 0.6 * strength
    if mask is not None:
        inside = as_map(mask) > 0
        line = binary_dilation(inside, iterations=2)
        pixels[binary_dilation(line) & ~inside] = 0
        pixels[line & ~inside] = 255
    return pixels.round().astype(np.uint8)


def mark_patches(picture, patches: Iterable[int | None], grid: int) -> np.ndarray:
    """The picture with frames around some of its ``grid`` x ``grid`` patches, which are numbered row by row.

    The first frame is orange, then blue, yellow, green; None leaves one out.
    """
    from PIL import Image, ImageDraw

    marked = Image.fromarray(as_rgb(picture)).copy()
    width, height = marked.width / grid, marked.height / grid
    for number, patch in enumerate(patches):
        if patch is None:
            continue
        row, column = divmod(int(patch), grid)
        x0, y0, x1, y1 = column * width - 2, row * height - 2, (column + 1) * width + 1, (row + 1) * height + 1
        draw = ImageDraw.Draw(marked)
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=5)
        draw.rectangle((x0, y0, x1, y1), outline=MARKS[number % len(MARKS)], width=3)
    return np.asarray(marked)


def plot_shots(rows: Sequence[dict]):
    """A matplotlib figure of rows of ``summarise``: image and pixel AUROC over shots, of each subset and of their mean,
    beside published figures: of the evaluated data sets, else of MVTec-AD, which is said.
    """
    from spgdd.evaluation.tables import PUBLISHED

    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    shared = {data for data in ("MVTec-AD", "VisA") if data in subsets} or {"MVTec-AD"}
    figure, both = chart(11, 4.5, columns=2)
    for axes, metric in zip(both, ("image_auroc", "pixel_auroc"), strict=True):
        for subset in subsets:
            these = [row for row in rows if row["subset"] == subset and row["metrics"][metric]["mean"] is not None]
            values = [row["metrics"][metric] for row in these]
            bold = {"color": "black", "linewidth": 2.5} if subset == "mean" else {"linewidth": 1, "alpha": 0.7}
            axes.errorbar(
                [row["shots"] for row in these], [v["mean"] for v in values], [v["std"] or 0 for v in values],
                capsize=3, label=f"{subset}, this run", **bold,
            )  # fmt: skip
        for line, known in zip((":", "--", "-.") * 2, (f for f in PUBLISHED if f["data"] in shared), strict=False):
            label = f"{known['method']}, published, {known['data']}"
            axes.plot(known["shots"], known[metric], line, color="grey", marker=".", label=label)
        axes.set(xlabel="normal pictures (shots)", ylabel=f"{metric.split('_')[0]} AUROC (%)")
    figure.axes[1].legend(bbox_to_anchor=(1, 1), loc="upper left", fontsize="small")
    return figure
