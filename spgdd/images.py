"""Pictures in: any file that a person hands over becomes RGB as they see it, or one clear error."""

import glob
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from spgdd.errors import ImageError

SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jfif .bmp .gif .tif .tiff .webp .avif .jp2 .ppm .pgm .pbm .heic .heif".split()
)
FORMATS = "PNG JPEG MPO BMP DIB GIF TIFF WEBP AVIF JPEG2000 PPM HEIF".split()  # others may start other programs
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of grey with more than 8 bits
TAILS = 0.001  # share of deep grey's pixels at either end that its range leaves out: hot and dead ones
STRIP = 1 << 22  # pixels converted at a time, so that memory holds little beside the picture
ORIENTATION = 0x0112  # number of the EXIF entry
JUNK = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"}
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def read_image(source, levels: tuple[float, float] | None = None) -> Image.Image:
    """The picture as a person sees it: RGB, EXIF orientation applied, transparency on white, first frame.

    ``source`` is a path, a PIL image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, bool,
    float in 0..1, or uint16 grey. Grey of 16 and more bits is stretched to 0..255 from ``levels``, by default its own
    range without its most extreme pixels; pictures that are compared must be read with the same ones. The levels used
    are in ``.info["levels"]`` (None for other pictures), what was changed or left out in ``.info["notes"]``.
    Raises ImageError.
    """
    name = image_name(source)
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    elif isinstance(source, (str, Path)):
        _check_file(Path(source), name)
    elif not isinstance(source, Image.Image):
        raise ImageError(f"{type(source).__name__} is no image: give a path, a PIL image or a numpy array.")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, [], levels)
        with open_picture(source) as image:
            frames = getattr(image, "n_frames", 1)
            return _to_rgb(image, [f"first of {frames} frames"] if frames > 1 else [], levels)
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not a picture that Pillow can read, or too damaged to tell. "
                         "Export it again, as PNG or JPEG.") from error  # fmt: skip
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except Exception as error:  # damaged or hostile data makes decoders raise nearly anything
        reason = " ".join(str(error).split())
        raise ImageError(f"{name}: damaged or incomplete ({reason}). Copy or export it again.") from error


@contextmanager
def open_picture(path: str | Path) -> Iterator[Image.Image]:
    """``Image.open`` without warnings, for the formats that are meant: for EPS and others, Pillow starts programs."""
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damage ends in an error; large within the limit is fine
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            yield image


def read_header(path: str | Path) -> tuple[int, int, int]:
    """Width and height of a picture as it is stored, and its EXIF orientation, 1 to 8; no pixel is decoded.

    Of an orientation above 4, people see height and width exchanged. Raises ImageError.
    """
    _check_file(Path(path), str(path))
    try:
        with open_picture(path) as image:
            # Pillow decodes all of a PNG to look for EXIF data that may stand at its end.
            none = image.format == "PNG" and "exif" not in image.info and not _exif_at_end(Path(path))
            orientation = 1 if none else image.getexif().get(ORIENTATION, 1)
            return *image.size, orientation if orientation in range(1, 9) else 1
    except Exception as error:  # as in read_image
        raise ImageError(f"{path}: not a picture that can be opened ({' '.join(str(error).split())}).") from error


def _exif_at_end(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 1 << 17), os.SEEK_END)  # EXIF data have at most 64 KB
        return b"eXIf" in file.read()


def image_name(source) -> str:
    """The path exactly as given; for a picture in memory the file it came from, or "image"."""
    return str(source) if isinstance(source, (str, Path)) else str(getattr(source, "filename", "") or "image")


def list_images(paths) -> list[Path]:
    """The picture files of files, folders and glob patterns (one or a list), in natural order (2 before 10).

    A folder gives the pictures directly in it, without hidden and other files; a file that is named is kept
    whatever it is. Raises ImageError where a folder or pattern gives none.
    """
    found = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if Path(path).is_dir():
            matches = list(Path(path).iterdir())
        elif glob.has_magic(str(path)) and not Path(path).exists():
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        else:
            found.append(Path(path))
            continue
        given = Path(path).parts
        files = [file for file in matches if file.suffix.lower() in SUFFIXES
                 and not any(is_junk(part) for part in file.parts if part not in given)]  # fmt: skip
        if not files:
            raise ImageError(f"{path}: no picture in here. Sub-folders are not searched: name one.")
        found += sorted(files, key=_natural)
    return found


def is_junk(name: str) -> bool:
    """Whether systems and programs leave files and folders of this name behind."""
    return name[0] == "." or name.lower() in JUNK


def _natural(path: Path) -> list:
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in parts]


def _check_file(path: Path, name: str) -> None:
    try:
        if path.is_dir():
            raise ImageError(f"{name}: a folder, not a picture; list_images({name!r}) gives those in it.")
        if path.exists() and not path.is_file():  # reading could block for ever
            raise ImageError(f"{name}: a device or a pipe, not a file.")
        with path.open("rb") as file:
            start = file.read(12)
    except OSError as error:
        raise ImageError(f"{name}: cannot be opened ({error.strerror}).") from error
    if not start:
        raise ImageError(f"{name}: the file is empty (0 bytes). Copy or export it again.")
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise ImageError(f"{name}: HEIC needs `pip install pillow-heif`; or export as JPEG.") from error
        register_heif_opener()


def _to_rgb(image: Image.Image, notes: list[str], levels: tuple[float, float] | None) -> Image.Image:
    cut = any("16" in str(tile[3]) for tile in getattr(image, "tile", ())) and image.mode in ("RGB", "RGBA")
    image.load()
    image = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    if image.mode in DEEP:
        image, levels = _stretched(np.asarray(image), levels)
        notes = [*notes, "grey values {:g} to {:g} stretched to 0 to 255".format(*levels)]
    else:
        levels = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        picture, height = Image.new("RGB", image.size, "white"), max(1, STRIP // image.width)
        for top in range(0, image.height, height):
            strip = image.crop((0, top, image.width, min(top + height, image.height)))
            picture.paste(strip, (0, top), strip)
    else:
        picture = image.convert("RGB")
    if cut and (brightest := max(high for _, high in picture.getextrema())) < 64:
        raise ValueError(f"48-bit colour of which 8 bits a channel are read, and no value is above {brightest} of 255: "
                         "scale it to the full range first")  # fmt: skip
    picture.info = {"notes": notes + ["48-bit colour, read with 8 bits a channel"] * cut, "levels": levels}
    return picture


def _stretched(grey: np.ndarray, levels: tuple[float, float] | None) -> tuple[Image.Image, tuple[float, float]]:
    """Deep grey (H, W) as a grey picture of 8 bits, and the levels that became 0 and 255."""
    if levels is None:
        step = max(1, int(np.sqrt(grey.size / STRIP)))
        some = grey[::step, ::step].astype(np.float32)
        some = some[np.isfinite(some)]
        if not some.size:
            raise ValueError("no value in it is a number")
        low, high = (np.quantile(some, q, method=m) for q, m in ((TAILS, "lower"), (1 - TAILS, "higher")))
        levels = float(low), float(high)
    low, high = levels
    result, height = np.empty(grey.shape, np.uint8), max(1, STRIP // grey.shape[1])
    for top in range(0, len(grey), height):
        part = (grey[top : top + height].astype(np.float32) - low) * (255 / ((high - low) or 1))
        result[top : top + height] = np.rint(np.clip(np.nan_to_num(part, posinf=255), 0, 255))
    return Image.fromarray(result), levels


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if 0 in array.shape or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name}: array of shape {array.shape}; expected (H, W), (H, W, 3) or (H, W, 4).")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]  # (H, W)
    if array.dtype == np.bool_ or (array.dtype.kind == "f" and 0 <= array.min() and array.max() <= 1):
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8 and not (array.dtype == np.uint16 and array.ndim == 2):
        raise ImageError(f"{name}: array of {array.dtype} from {array.min():g} to {array.max():g}; expected "
                         "uint8, float in 0..1, bool, or uint16 of shape (H, W).")  # fmt: skip
    return Image.fromarray(np.ascontiguousarray(array))
