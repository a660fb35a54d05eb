"""Picture in, map out: what the model sees of a picture, and the way back from patches to places in the picture."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from spgdd.errors import SpgddError
from spgdd.imagebind.preprocess import to_pixels
from spgdd.places import place_of
from spgdd.ranges import check_ranges
from spgdd.selfprompt.comparison import Evidence

SIZE, PATCH = 224, 14  # pixels of a side of ImageBind's square, and of a patch
OVERLAP = 2  # patches that neighbouring tiles share where each is seen for itself


class JoinedMap(NamedTuple):
    """What the views of one picture say together."""

    score: float  # of the picture
    square_map: Tensor  # (M, M) float32: the map of the square that the model saw, each value at its place
    prompt_map: Tensor  # (1, 1, S, S) float32: the map as the language model is told of it


@dataclass(frozen=True)
class Region:
    """A connected part of the picture that looks unlike the normal ones."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the picture; x1 and y1 lie outside
    area_share: float  # of the whole picture, 0..1
    place: str  # of the box's centre: one of spgdd.places.PLACES
    peak: float  # largest map value in it


@dataclass(frozen=True)
class Views:
    """The views of a picture of ``width`` x ``height``: a square of all of it and, on request, tiles of the square.

    fit "squash" makes all of the picture square, "crop" only its centre. With more than one of ``tiles`` a side, the
    square is also seen in ``tiles`` x ``tiles`` parts of as many pixels as the whole: ``joint`` ones are parts of one
    large square that the vision tower sees at once, others overlap and are seen each for itself. Positions follow the
    half-pixel convention: pixel i covers i to i + 1, and its centre is at i + 0.5.
    """

    width: int
    height: int
    fit: str
    tiles: int = 1
    joint: bool = False
    size: int = SIZE  # pixels of a side of the square, and of a tile
    patch: int = PATCH  # pixels of a side of a patch

    @classmethod
    def of(cls, picture: Image.Image, profile, tiles: int | None = None) -> "Views":
        """As a profile (see ``spgdd.profiles``) sees a picture; ``tiles`` None: as many as the profile has."""
        check_ranges(tiles=tiles)
        tiles = profile.tiles if tiles is None else tiles
        joint = 1 < tiles <= profile.joint
        return cls(*picture.size, profile.fit, tiles, joint, profile.size, profile.patch)

    @property
    def count(self) -> int:
        """V, the number of views."""
        return 1 if self.tiles == 1 else 1 + self.tiles**2

    @property
    def side(self) -> int:
        """M, pixels of a side of the map: that of the square, or of the tiles put together."""
        return self.size + (self.tiles - 1) * (self.size - (0 if self.joint else OVERLAP * self.patch))

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height of the whole picture in pixels of the square."""
        if self.fit == "squash":
            return self.size, self.size
        short = min(self.width, self.height)
        return int(self.size * self.width / short), int(self.size * self.height / short)

    @property
    def seen_share(self) -> float:
        """Share of the picture that lies in the square, 0..1."""
        width, height = self.resized
        return self.size**2 / (width * height)

    def _axes(self):
        """Per axis, x first: length of the picture, the same in the square's pixels, offset of the square."""
        for length, resized in zip((self.width, self.height), self.resized, strict=True):
            yield length, resized, round((resized - self.size) / 2)

    # Picture in

    def pixels(self, picture: Image.Image) -> list[Tensor]:
        """What ``SPGDD.look`` takes: uint8 (3, S, S) of the square, then of each tile row by row.

        Joint tiles come as the one square that they are parts of: uint8 (3, M, M).
        """
        if self.joint:
            return [to_pixels(picture, self.fit, size) for size in (self.size, self.side)]
        starts = [number * self.size * (self.size - OVERLAP * self.patch) / self.side for number in range(self.tiles)]
        extent = self.size**2 / self.side  # of a tile, in pixels of the square
        corners = [(x, y) for y in starts for x in starts] if self.tiles > 1 else []
        boxes = [self.box_to_picture(x, y, x + extent, y + extent) for x, y in corners]
        return [to_pixels(picture, self.fit, self.size),
                *(to_pixels(picture.crop(box), "squash", self.size) for box in boxes)]  # fmt: skip

    # Map out

    def join(self, evidence: Evidence, share: float = 0.0) -> JoinedMap:
        """Score and map of the picture from the evidence of its V views.

        A view's score is the mean of the highest ``share`` of its map, at least of one value. Where there are T tiles,
        the whole view counts once and the tiles T times, as they have T times its patches: the score is so weighted a
        mean of the whole view's and the strangest tile's, and the map one of both. Tiles are put together before they
        are enlarged, so that no seam shows.
        """
        maps = evidence.map(self.patch)  # (V, 1, S, S)
        highest = maps.flatten(1).topk(max(1, round(share * self.size**2))).values.mean(1).tolist()
        whole = align(maps[0, 0], self.patch)
        if self.tiles == 1:
            return JoinedMap(highest[0], whole, maps)
        near = self.tiles**2 / self.count
        overlap = 0 if self.joint else OVERLAP
        tiles = evidence._replace(values=stitch(evidence.values[1:], self.tiles, overlap))
        position = (torch.arange(self.side, device=whole.device, dtype=torch.float64) + 0.5) * self.size / self.side
        far, close = sample(whole, position - 0.5, position - 0.5), align(tiles.map(self.patch)[0, 0], self.patch)
        square_map = (1 - near) * far + near * close
        told = F.adaptive_max_pool2d(square_map[None, None], self.size)
        return JoinedMap((1 - near) * highest[0] + near * max(highest[1:]), square_map, told)

    def regions(self, square_map: np.ndarray, outline: float, peak: float) -> tuple[Region, ...]:
        """Connected parts of the map (M, M) above ``outline`` that reach ``peak``, strongest first.

        Parts smaller than a quarter of a patch are dropped, unless nothing else is there.
        """
        labels, _ = ndimage.label(square_map > outline, structure=np.ones((3, 3)))
        found, pixel = [], self.size / len(square_map)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            values = square_map[rows, columns][labels[rows, columns] == number]
            edges = (columns.start, rows.start, columns.stop, rows.stop)
            box = self.box_to_picture(*(edge * pixel for edge in edges))
            area_share = values.size * self.seen_share / square_map.size
            found.append((values.size, Region(box, area_share, self.place_of(box), float(values.max()))))
        found.sort(key=lambda item: -item[1].peak)
        kept = [region for size, region in found if size >= (self.patch // 2) ** 2 and region.peak >= peak]
        return tuple(kept or [region for _, region in found[:1]])

    def to_picture(self, square_map: np.ndarray) -> np.ndarray:
        """Map (M, M) of the square -> float32 (height, width) of the picture; NaN where the model saw nothing."""
        columns, rows = (
            (torch.arange(length, dtype=torch.float64) + 0.5) * resized / length - offset
            for length, resized, offset in self._axes()
        )
        scale = len(square_map) / self.size
        picture = sample(torch.as_tensor(square_map), rows * scale - 0.5, columns * scale - 0.5)  # (H, W)
        picture[(rows - self.size / 2).abs() > self.size / 2] = torch.nan
        picture[:, (columns - self.size / 2).abs() > self.size / 2] = torch.nan
        return picture.numpy()

    def to_map(self, mask: np.ndarray) -> np.ndarray:
        """bool (height, width) of the picture -> float32 (M, M), the share 0..1 of each of the map's pixels."""
        scale = self.side / self.size
        width, height = (round(length * scale) for length in self.resized)
        left, top = (round(offset * scale) for _, _, offset in self._axes())
        resized = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
        return np.asarray(resized)[top : top + self.side, left : left + self.side].clip(0, 1)

    def inside(self, box: tuple[int, int, int, int], side: int) -> Tensor:
        """Box of the picture -> float32 (side, side): 1 at the pixels of a map of the square that lie in it, else 0.

        Raises SpgddError where none does.
        """
        position = (torch.arange(side, dtype=torch.float64) + 0.5) * self.size / side
        columns, rows = (
            (low <= (position + offset) * length / resized) & ((position + offset) * length / resized < high)
            for low, high, (length, resized, offset) in zip(box[:2], box[2:], self._axes(), strict=True)
        )
        if not (columns.any() and rows.any()):
            raise SpgddError(f"The rectangle {tuple(box)} holds nothing of what the model sees of the picture, which "
                             f"is {self.width} x {self.height}. Give x0, y0, x1, y1 in its pixels.")  # fmt: skip
        return (rows[:, None] & columns).float()

    def box_to_picture(self, x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        """Box edges in the square -> pixels (x0, y0, x1, y1) of the picture; x1, y1 outside; never empty."""
        (left, right), (top, bottom) = (
            _whole_pixels((low + offset) * length / resized, (high + offset) * length / resized, length)
            for low, high, (length, resized, offset) in zip((x0, y0), (x1, y1), self._axes(), strict=True)
        )
        return left, top, right, bottom

    def place_of(self, box: tuple[int, int, int, int]) -> str:
        """Cell of the 3 x 3 grid with the box's centre; a centre on a cut belongs to the left or upper cell."""
        x0, y0, x1, y1 = box
        return place_of((x0 + x1) / (2 * self.width), (y0 + y1) / (2 * self.height))


def stitch(tiles: Tensor, count: int, overlap: int) -> Tensor:
    """Patch values of count x count tiles, row by row, (T, C, G, G) -> of the square (1, C, g, g).

    Where tiles overlap, by so many patches, one fades into the other.
    """
    grid = tiles.shape[-1]
    step, side = grid - overlap, grid + (count - 1) * (grid - overlap)
    total, weights = (tiles.new_zeros(tiles.shape[1], side, side) for _ in range(2))
    ramp = torch.arange(1, grid + 1, device=tiles.device).clamp(max=max(1, overlap)).float()
    ramp = torch.minimum(ramp, ramp.flip(0))
    fade = ramp * ramp[:, None]
    for number, tile in enumerate(tiles):
        top, left = (step * place for place in divmod(number, count))
        total[:, top : top + grid, left : left + grid] += tile * fade
        weights[:, top : top + grid, left : left + grid] += fade
    return (total / weights)[None]


def align(corner_map: Tensor, patch: int = PATCH) -> Tensor:
    """The model's map (M, M) with each patch's value at the patch, edge patches reaching to the border.

    The model enlarges its patch values with align_corners=True, as AnomalyGPT does, which puts the outer patches'
    values on the border: up to half a patch from where they belong.
    """
    side = len(corner_map)
    position = torch.arange(side, device=corner_map.device, dtype=torch.float64) - (patch - 1) / 2
    position = position / patch * (side - 1) / (side // patch - 1)
    return sample(corner_map, position, position)


def sample(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Values (R, C) at fractional row and column numbers (P,) and (Q,), edges continued: float32 (P, Q), bilinear."""
    for position in (rows, columns):
        position = position.clamp(0, len(values) - 1)
        low = position.long().clamp(max=len(values) - 2)
        share = (position - low).float()[:, None]
        values = (values[low] * (1 - share) + values[low + 1] * share).T  # the other axis comes first
    return values


def _whole_pixels(low: float, high: float, length: int) -> tuple[int, int]:
    """Whole pixels that hold the interval, give or take rounding errors."""
    first = min(max(int(np.floor(low + 1e-6)), 0), length - 1)
    return first, min(max(int(np.ceil(high - 1e-6)), first + 1), length)
