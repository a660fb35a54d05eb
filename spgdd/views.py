"""From the model's square to places in the picture: maps, boxes and regions in the picture's own frame."""

from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from spgdd.imagebind.preprocess import to_pixels
from spgdd.places import place_of

SIZE, PATCH = 224, 14  # pixels of the model's square and of one patch
GRID = SIZE // PATCH
OVERLAP = 2 * PATCH  # pixels that neighbouring tiles share where each is encoded for itself
SPECK = (PATCH // 2) ** 2  # pixels of the map; smaller regions are dropped


@dataclass(frozen=True)
class Placement:
    """The square that ``spgdd.imagebind.preprocess.to_pixels`` makes of a picture of ``width`` x ``height``.

    fit "squash" sees all of it, "crop" only the centre. The square is seen whole and, where there are more
    than one, in ``tiles`` x ``tiles`` tiles of the same number of pixels that overlap; ``joint`` tiles do not, and
    are views of one large square. Positions follow the half-pixel convention: pixel i covers i to i + 1 and its centre
    is at i + 0.5.
    """

    width: int
    height: int
    fit: str
    tiles: int = 1
    joint: bool = False

    @classmethod
    def of(cls, picture: Image.Image, profile, tiles: int) -> "Placement":
        """As a profile (see ``spgdd.profiles``) sees a picture."""
        return cls(*picture.size, profile.fit, tiles, 1 < tiles <= profile.joint)

    @property
    def side(self) -> int:
        """Pixels of a side of the map: that of the square, or of the tiles put together."""
        return SIZE + (self.tiles - 1) * (SIZE - (0 if self.joint else OVERLAP))

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height of the whole picture in pixels of the square."""
        if self.fit == "squash":
            return SIZE, SIZE
        short = min(self.width, self.height)
        return int(SIZE * self.width / short), int(SIZE * self.height / short)

    @property
    def seen_share(self) -> float:
        """Share of the picture that lies in the square, 0..1."""
        width, height = self.resized
        return SIZE**2 / (width * height)

    def _axes(self):
        """Per axis, x first: length of the picture, the same in the square's pixels, offset of the square."""
        for length, resized in zip((self.width, self.height), self.resized, strict=True):
            yield length, resized, round((resized - SIZE) / 2)

    def views(self, picture: Image.Image) -> list[torch.Tensor]:
        """What the model sees of the picture: uint8 (3, 224, 224) of the square, then of each tile row by row.

        Joint tiles come as one: uint8 (3, S, S), S being ``side``.
        """
        if self.joint:
            return [to_pixels(picture, self.fit, size) for size in (SIZE, self.side)]
        starts = [number * SIZE * (SIZE - OVERLAP) / self.side for number in range(self.tiles)]
        extent = SIZE**2 / self.side  # of a tile, in pixels of the square
        corners = [(x, y) for y in starts for x in starts] if self.tiles > 1 else []
        boxes = [self.box_to_picture(x, y, x + extent, y + extent) for x, y in corners]
        return [to_pixels(picture, self.fit), *(to_pixels(picture.crop(box), "squash") for box in boxes)]

    def to_picture(self, square_map: np.ndarray) -> np.ndarray:
        """Map (M, M) of the square -> float32 (height, width) of the picture; NaN where the model saw nothing."""
        columns, rows = (
            (np.arange(length) + 0.5) * resized / length - offset for length, resized, offset in self._axes()
        )
        scale = len(square_map) / SIZE
        picture = _interpolate(_interpolate(square_map, rows * scale - 0.5).T, columns * scale - 0.5).T  # (H, W)
        picture[np.abs(rows - SIZE / 2) > SIZE / 2] = np.nan
        picture[:, np.abs(columns - SIZE / 2) > SIZE / 2] = np.nan
        return picture

    def to_map(self, mask: np.ndarray) -> np.ndarray:
        """bool (height, width) of the picture -> float32 (M, M), the share 0..1 of each of the map's pixels."""
        scale = self.side / SIZE
        width, height = (round(length * scale) for length in self.resized)
        left, top = (round(offset * scale) for _, _, offset in self._axes())
        resized = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
        return np.asarray(resized)[top : top + self.side, left : left + self.side].clip(0, 1)

    def box_to_picture(self, x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        """Box edges in the square -> pixels (x0, y0, x1, y1) of the picture; x1, y1 outside; never empty."""
        (left, right), (top, bottom) = (
            _whole((low + offset) * length / resized, (high + offset) * length / resized, length)
            for low, high, (length, resized, offset) in zip((x0, y0), (x1, y1), self._axes(), strict=True)
        )
        return left, top, right, bottom

    def place_of(self, box: tuple[int, int, int, int]) -> str:
        """Cell of the 3 x 3 grid with the box's centre; a centre on a cut belongs to the left or upper cell."""
        x0, y0, x1, y1 = box
        return place_of((x0 + x1) / (2 * self.width), (y0 + y1) / (2 * self.height))


@dataclass(frozen=True)
class Region:
    """A connected part of the picture that looks unlike the normal ones."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the picture; x1 and y1 lie outside
    area_share: float  # of the whole picture, 0..1
    place: str  # of the box's centre: one of spgdd.data.words.PLACES
    peak: float  # largest map value in it


def find_regions(square_map: np.ndarray, outline: float, peak: float, placement: Placement) -> tuple[Region, ...]:
    """Connected parts of the map (M, M) above ``outline`` that reach ``peak``, strongest first.

    Parts smaller than a quarter of a patch are dropped, unless nothing else is there.
    """
    labels, _ = ndimage.label(square_map > outline, structure=np.ones((3, 3)))
    found, pixel = [], SIZE / len(square_map)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        values = square_map[rows, columns][labels[rows, columns] == number]
        edges = (columns.start, rows.start, columns.stop, rows.stop)
        box = placement.box_to_picture(*(edge * pixel for edge in edges))
        area_share = values.size * placement.seen_share / square_map.size
        found.append((values.size, Region(box, area_share, placement.place_of(box), float(values.max()))))
    found.sort(key=lambda item: -item[1].peak)
    kept = [region for size, region in found if size >= SPECK and region.peak >= peak]
    return tuple(kept or [region for _, region in found[:1]])


def assemble(corner_maps: np.ndarray, share: float = 0.0, joint: bool = False) -> tuple[float, np.ndarray]:
    """Score and aligned map (M, M) of a picture from the model's maps (V, 224, 224) of its ``Placement.views``.

    A view's score is the mean of the highest ``share`` of its values, at least of one. Where there are T tiles, the
    whole view counts once and the tiles T times, as they have T times its patches: the score is so weighted a mean of
    the whole view's and the strangest tile's, and the map one of both.
    """
    values = corner_maps.reshape(len(corner_maps), -1)  # (V, 224 * 224)
    count = max(1, round(share * values.shape[1]))
    score, *others = np.partition(values, -count, axis=1)[:, -count:].mean(1).tolist()
    whole, *tiles = map(align, corner_maps)
    if not tiles:
        return score, whole
    joined, near = stitch(tiles, 0 if joint else OVERLAP), len(tiles) / len(corner_maps)
    position = (np.arange(len(joined)) + 0.5) * SIZE / len(joined) - 0.5
    far = _interpolate(_interpolate(whole, position).T, position).T
    return (1 - near) * score + near * max(others), (1 - near) * far + near * joined


def stitch(tiles: list[np.ndarray], overlap: int) -> np.ndarray:
    """Maps of n x n tiles, row by row -> one (M, M); where tiles overlap, one fades into the other."""
    count, step = isqrt(len(tiles)), SIZE - overlap
    side = SIZE + (count - 1) * step
    total, weights = np.zeros((2, side, side), np.float32)
    ramp = np.minimum(np.arange(1, SIZE + 1), max(1, overlap)).astype(np.float32)
    ramp = np.minimum(ramp, ramp[::-1])
    fade = ramp * ramp[:, None]
    for number, tile in enumerate(tiles):
        top, left = (step * place for place in divmod(number, count))
        total[top : top + SIZE, left : left + SIZE] += tile * fade
        weights[top : top + SIZE, left : left + SIZE] += fade
    return total / weights


def align(corner_map: np.ndarray) -> np.ndarray:
    """The model's map (224, 224) with each patch's value at the patch, edge patches reaching to the border.

    The model enlarges its 16 x 16 values with align_corners=True, as AnomalyGPT does, which puts the outer
    patches' values on the border: up to half a patch from where they belong.
    """
    position = (np.arange(SIZE) - (PATCH - 1) / 2) / PATCH * (SIZE - 1) / (GRID - 1)
    return _interpolate(_interpolate(corner_map, position).T, position).T


def _interpolate(values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Rows of ``values`` (R, C) at fractional row numbers (P,), edge rows continued: float32 (P, C)."""
    position = np.clip(position, 0, len(values) - 1)
    low = np.minimum(position.astype(int), len(values) - 2)
    share = (position - low).astype(np.float32)[:, None]
    return values[low] * (1 - share) + values[low + 1] * share


def _whole(low: float, high: float, length: int) -> tuple[int, int]:
    """Whole pixels that hold the interval, give or take rounding errors."""
    first = min(max(int(np.floor(low + 1e-6)), 0), length - 1)
    return first, min(max(int(np.ceil(high - 1e-6)), first + 1), length)
