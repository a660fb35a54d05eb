"""Masks: which pixels of a picture are defective, in whatever way its data set says so."""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from spgdd.data.layouts import is_picture
from spgdd.data.matlab import read_field
from spgdd.errors import DataError
from spgdd.images import ORIENTATION, open_picture, read_header

NUMBERS = 32  # grey values up to this one are numbers of classes, where there are no others but the ignored
IGNORED = (224, 224, 192)  # colour of Pascal VOC for what belongs to no class; as a number it is 255
MOST = 0.75  # of a picture; a mask that covers more is taken for one whose colours are exchanged


class AmbiguousMask(DataError):
    """A mask that can be read in more than one way."""


def mask_files(path: Path) -> list[Path]:
    """The files that together are a mask: a folder's pictures, or ``..._mask1.png``, ``..._mask2.png`` and so on."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if is_picture(file.name) and file.name[0] != ".")
    if not path.stem.lower().endswith("_mask1"):
        return [path]
    series = re.compile(rf"{re.escape(path.stem[:-1])}\d+{re.escape(path.suffix)}", re.I)
    return sorted(file for file in path.parent.iterdir() if series.fullmatch(file.name))


def read_mask(path: Path, image: Path | None = None) -> np.ndarray:
    """Bool (H, W), True on defects, as people see the ``image`` that it belongs to.

    Black, and of numbers 0, is good; every other colour or number is a defect, but for the border that Pascal VOC
    leaves out. Soft edges are cut at half. With ``image``, the size is compared with that of the image and where a
    camera turned the image by its EXIF orientation, the mask is turned too.
    Raises AmbiguousMask where that is a guess, and DataError if a file cannot be read; both name it and the mend.
    """
    marks = None
    for file in mask_files(path):
        own = _marked(file)
        if marks is not None and own.shape != marks.shape:
            raise DataError(f"{path}: its masks differ in size.")
        marks = own if marks is None else marks | own
    if marks is None:
        raise DataError(f"{path}: there is no mask in this folder.")
    if (share := marks.mean()) > MOST:
        raise AmbiguousMask(f"{path}: marks {share:.0%} of the picture. If it shows the good pixels, invert it.")
    return marks if image is None else _as_seen(marks, path, image)


def _as_seen(marks: np.ndarray, path: Path, image: Path) -> np.ndarray:
    """The mask in the orientation in which people see the image."""
    width, height, orientation = read_header(image)
    seen = (height, width) if orientation > 4 else (width, height)
    own = marks.shape[::-1]
    if own not in ((width, height), seen):
        raise DataError(f"{path}: {own[0]} x {own[1]} pixels, its image has {seen[0]} x {seen[1]}.")
    if orientation == 1:
        return marks
    stored = Image.fromarray(marks)
    stored.getexif()[ORIENTATION] = orientation
    turned = np.asarray(ImageOps.exif_transpose(stored))
    if (width, height) != seen:
        return marks if own == seen else turned
    if turned.shape == marks.shape and (turned == marks).all():
        return marks
    raise AmbiguousMask(f"{path}: its image is turned by EXIF, and the mask may be turned already or not. "
                        "Save the image without EXIF orientation, as its mask is.")  # fmt: skip


def _marked(file: Path) -> np.ndarray:
    """Bool (H, W) of one file."""
    try:
        if file.suffix.lower() == ".mat":  # CrackForest: 1 is road, 2 is crack
            marks = read_field(file.read_bytes(), "groundTruth", "Segmentation") > 1
            if marks.ndim != 2 or not marks.size:
                raise ValueError(f"of shape {marks.shape}")
            return marks
        with open_picture(file) as image:
            grey, lossy = _grey(ImageOps.exif_transpose(image)), image.format in ("JPEG", "WEBP")
    except Exception as error:  # damaged data makes decoders raise nearly anything
        raise DataError(f"{file}: damaged, or no mask ({' '.join(str(error).split())}).") from error
    marks = _from_grey(grey, lossy)
    if marks is None:
        raise AmbiguousMask(f"{file}: its grey values are neither black and white nor numbers of classes. "
                            "Save it with 0 for good pixels and 255 for defective ones.")  # fmt: skip
    return marks


def _grey(image: Image.Image) -> np.ndarray:
    """Grey values (H, W): of colours the brightest channel, and the opacity of paint of one colour."""
    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))  # (H, W, 4)
        opaque = pixels[..., 3] > 0
        painted = pixels[opaque][:, :3]
        if not opaque.all() and not (painted != painted[:1]).any():
            return pixels[..., 3]
        pixels = pixels[..., :3] * opaque[..., None]
    elif image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        grey = np.asarray(image)
        return grey * np.uint8(255) if image.mode == "1" else grey
    else:
        pixels = np.array(image.convert("RGB"))  # (H, W, 3); of a palette its colours
    pixels[(pixels == IGNORED).all(-1)] = 0
    return pixels.max(-1)


def _from_grey(grey: np.ndarray, lossy: bool) -> np.ndarray | None:
    """Bool (H, W), or None where it would be a guess."""
    if grey.dtype.kind == "f":
        if not (np.isfinite(grey).all() and 0 <= grey.min() and grey.max() <= 1):
            return None
        grey = np.rint(grey * 255)
    values = np.unique(grey)
    if values[0] < 0:
        return None
    top = 255 if values[-1] <= 255 else 65535
    values = values[values > 0]
    if not len(values):
        return grey > 0
    if lossy:
        if values[-1] <= NUMBERS:  # what compression leaves of black
            return np.zeros(grey.shape, bool)
    else:
        inner = ndimage.maximum_filter(grey, 3) == ndimage.minimum_filter(grey, 3)
        areas = np.setdiff1d(grey[inner], [0])  # values that fill areas, not edges alone
        small = (grey > 0) & (grey <= NUMBERS)
        if values[0] <= NUMBERS and (values[values > NUMBERS] == top).all() and values[-1] == top:
            if inner[small].mean() > 0.3:  # numbers of classes, and 255 for what is to be ignored
                return small
            if len(values) <= 3:
                return None
        counted = top > 255 and values[-1] == len(values)  # 1, 2, 3 and so on
        if values[-1] <= NUMBERS or counted or len(values) <= 3 or len(areas) == len(values):
            return grey > 0
        if ((areas > NUMBERS) & (areas < 0.75 * top)).any():
            return None
    middle = (grey > 0.15 * top) & (grey < 0.85 * top)
    return None if values[-1] < 0.75 * top or middle.mean() > 0.25 else grey > top // 2
