"""Masks of every kind give the right pixels; those that can be read in two ways are refused."""


import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.io import savemat

from spgdd.data.masks import AmbiguousMask, mask_files, read_mask
from spgdd.errors import DataError

SIZE = 48
TRUTH = np.zeros((SIZE, SIZE), bool)
TRUTH[10:22, 8:30] = True  # one defect
OTHER = np.zeros((SIZE, SIZE), bool)
OTHER[30:40, 20:40] = True  # another one, of another class
EDGE = np.zeros((SIZE, SIZE), bool)
EDGE[8:24, 6:32] = True
EDGE &= ~TRUTH  # a border around the defect
BOTH, NONE = TRUTH | OTHER, np.zeros((SIZE, SIZE), bool)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0] * (253 * 3 - 9) + [224, 224, 192]


def grey(background=0, first=255, second=None, edge=None, dtype=np.uint8) -> np.ndarray:
    pixels = np.full((SIZE, SIZE), background, dtype)
    pixels[TRUTH] = first
    if second is not None:
        pixels[OTHER] = second
    if edge is not None:
        pixels[EDGE] = edge
    return pixels


def colours(background, first, second=None, edge=None) -> np.ndarray:
    pixels = np.empty((SIZE, SIZE, len(background)), np.uint8)
    pixels[:], pixels[TRUTH] = background, first
    if second is not None:
        pixels[OTHER] = second
    if edge is not None:
        pixels[EDGE] = edge
    return pixels


def palette(indices: np.ndarray, entries: list[int]) -> Image.Image:
    image = Image.frombytes("P", (SIZE, SIZE), indices.tobytes())
    image.putpalette(entries + [0] * (768 - len(entries)))
    return image


def soft(radius: float = 1.0) -> np.ndarray:
    from scipy import ndimage

    return np.rint(255 * ndimage.gaussian_filter(TRUTH.astype(float), radius)).astype(np.uint8)


def line(width: int, value: int) -> np.ndarray:
    image = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(image).line((2, 5, 44, 30), fill=value, width=width)
    return np.array(image)


def noise(low: int, high: int) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (SIZE, SIZE)).astype(np.uint8)


thin = line(1, 80)
thin[40:41, 5:40] = 160
exr = Image.fromarray(TRUTH.astype(np.float32))
speckled = grey() + np.where(TRUTH, 0, noise(0, 12)).astype(np.uint8)
soft_line = np.array(Image.fromarray(line(5, 255)).resize((SIZE // 2,) * 2).resize((SIZE,) * 2))
cracked = line(3, 255)
cracked[line(1, 1) > 0] = 1
many = np.where(OTHER, np.where(np.arange(SIZE) < 28, 60, 180)[None], grey(0, 255)).astype(np.uint8)
classes = np.where(BOTH, np.arange(SIZE)[:, None] % 12 + 1, 0).astype(np.uint8)
opaque = Image.merge("LA", (Image.fromarray(grey()), Image.new("L", (SIZE, SIZE), 255)))
voc = colours((0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192))

MASKS = {  # name: file ending, pixels, what they mark; None: nobody can know
    "black and white": ("png", grey(), TRUTH),
    "one bit": ("png", Image.fromarray(TRUTH), TRUTH),
    "zero and one": ("png", grey(0, 1), TRUTH),
    "a class number": ("png", grey(0, 7), TRUTH),
    "several class numbers": ("png", grey(0, 1, 2), BOTH),
    "a dozen class numbers": ("png", classes, BOTH),
    "a class and the ignored border": ("png", grey(0, 1, edge=255), TRUTH),
    "two classes and the ignored border": ("png", grey(0, 1, 2, 255), BOTH),
    "a crack as a class within an ignored border": ("png", cracked, None),
    "one dim grey": ("png", grey(0, 100), TRUTH),
    "MVTec LOCO's grey": ("png", grey(0, 233), TRUTH),
    "two greys, one of them dark": ("png", grey(0, 80, 200), BOTH),
    "two greys below the middle": ("png", grey(0, 60, 120), BOTH),
    "white and a grey class": ("png", grey(0, 255, 128), BOTH),
    "four greys": ("png", many, BOTH),
    "thin lines of two greys": ("png", thin, thin > 0),
    "a thin line": ("png", line(1, 255), line(1, 255) > 0),
    "soft edges": ("png", soft(), soft() > 127),
    "a soft line": ("png", soft_line, soft_line > 127),
    "JPEG saved again as PNG": ("png", speckled, TRUTH),
    "nothing": ("png", grey(0, 0), NONE),
    "nothing, in colours": ("png", colours((0, 0, 0), (0, 0, 0)), NONE),
    "nothing, in JPEG": ("jpg", grey(0, 0), NONE),
    "JPEG": ("jpg", grey(), TRUTH),
    "JPEG of colours": ("jpg", colours((0, 0, 0), (255, 0, 0)), TRUTH),
    "JPEG of grey levels": ("jpg", grey(0, 100), None),
    "BMP": ("bmp", grey(), TRUTH),
    "TIFF of one bit": ("tif", Image.fromarray(TRUTH), TRUTH),
    "16 bits, white": ("png", grey(0, 65535, dtype=np.uint16), TRUTH),
    "16 bits, 255": ("png", grey(0, 255, dtype=np.uint16), TRUTH),
    "16 bits, numbers of defects": ("png", grey(0, 300, 301, dtype=np.uint16), BOTH),
    "fractions": ("tiff", exr, TRUTH),
    "fractions that are no shares": ("tiff", Image.fromarray(TRUTH.astype(np.float32) * 3 - 1), None),
    "red on black": ("png", colours((0, 0, 0), (255, 0, 0)), TRUTH),
    "dark red on black": ("png", colours((0, 0, 0), (60, 0, 0)), TRUTH),
    "two colours on black": ("png", colours((0, 0, 0), (255, 0, 0), (0, 0, 128)), BOTH),
    "colours of Pascal VOC with its border": ("png", voc, BOTH),
    "red on white": ("png", colours((255, 255, 255), (255, 0, 0)), None),
    "palette, black and white": ("png", palette(grey(0, 1), [0, 0, 0, 255, 255, 255]), TRUTH),
    "palette, white first": ("png", palette(grey(1, 0), [255, 255, 255, 0, 0, 0]), TRUTH),
    "palette of Pascal VOC": ("png", palette(grey(0, 1, 2, 255), VOC), BOTH),
    "palette, dark colours": ("png", palette(grey(0, 1, 2), [0, 0, 0, 40, 0, 0, 0, 40, 0]), BOTH),
    "palette of greys": ("png", palette(grey(0, 2), [0, 0, 0, 9, 9, 9, 200, 200, 200]), TRUTH),
    "opaque black and white": ("png", colours((0, 0, 0, 255), (255, 255, 255, 255)), TRUTH),
    "red paint on nothing": ("png", colours((0, 0, 0, 0), (255, 0, 0, 255)), TRUTH),
    "black paint on nothing": ("png", colours((255, 255, 255, 0), (0, 0, 0, 255)), TRUTH),
    "transparent red paint": ("png", colours((255, 0, 0, 0), (255, 0, 0, 128)), TRUTH),
    "two paints on nothing": ("png", colours((9, 9, 9, 0), (255, 0, 0, 255), (0, 200, 0, 255)), BOTH),
    "grey with opacity": ("png", opaque, TRUTH),
    "a black defect on white": ("png", grey(255, 0), None),
    "two class numbers without a zero": ("png", grey(1, 2), None),
    "all white": ("png", grey(255, 255), None),
    "grey classes with soft edges": ("png", np.where(OTHER, 100, soft()).astype(np.uint8), None),
    "a heat map": ("png", (soft(6) / 2).astype(np.uint8), None),
    "a photograph": ("png", noise(0, 256), None),
    "a dim photograph": ("jpg", noise(60, 160), None),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_pixels_of_a_mask(name, tmp_path):
    ending, pixels, truth = MASKS[name]
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    path = tmp_path / f"mask.{ending}"
    image.save(path, **({"quality": 95} if ending == "jpg" else {}))
    if truth is None:
        with pytest.raises(AmbiguousMask, match=path.name):
            read_mask(path)
        return
    marks = read_mask(path)
    assert marks.dtype == bool and marks.shape == truth.shape
    wrong = marks != truth
    assert wrong.mean() < 0.002 if ending == "jpg" else not wrong.any(), name


def test_masks_of_several_files_are_joined(tmp_path):
    folder = tmp_path / "000"
    folder.mkdir()
    Image.fromarray(TRUTH).save(folder / "000.png")
    Image.fromarray(OTHER).save(folder / "001.png")
    (folder / ".hidden.png").write_bytes(b"junk")
    assert (read_mask(folder) == BOTH).all()
    Image.fromarray(TRUTH).save(tmp_path / "0044_mask1.png")
    Image.fromarray(OTHER).save(tmp_path / "0044_mask2.png")
    Image.fromarray(~TRUTH).save(tmp_path / "0045_mask1.bmp")
    assert (read_mask(tmp_path / "0044_mask1.png") == BOTH).all()
    assert [file.name for file in mask_files(tmp_path / "0044_mask1.png")] == ["0044_mask1.png", "0044_mask2.png"]
    Image.fromarray(OTHER[:20]).save(folder / "002.png")
    with pytest.raises(DataError, match="differ in size"):
        read_mask(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no mask in this folder"):
        read_mask(tmp_path / "empty")


@pytest.mark.parametrize("damage", ["cut", "bits", "text", "empty", "missing", "huge", "mat", "mat field"])
def test_a_damaged_mask_is_one_error_that_names_the_file(damage, tmp_path):
    path = tmp_path / ("mask.mat" if damage.startswith("mat") else "mask.png")
    Image.fromarray(noise(0, 256)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "bits":
        path.write_bytes(whole[:60] + bytes(len(whole) - 60))
    elif damage == "huge":
        Image.new("1", (20_000, 9_500)).save(path)
    elif damage == "mat field":
        savemat(path, {"other": TRUTH})
    elif damage != "missing":
        path.write_bytes({"text": b"no picture", "empty": b"", "mat": b"MATLAB 5.0 MAT-file" + bytes(200)}[damage])
    with pytest.raises(DataError, match=path.name):
        read_mask(path)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_matlab_masks_are_those_that_scipy_wrote_and_damage_never_ends_the_process(compressed, dtype, tmp_path):
    rng, path = random.Random(0), tmp_path / "001.mat"
    truth = {"Boundaries": EDGE, "Segmentation": (1 + TRUTH[:40]).astype(dtype)}
    savemat(path, {"x": np.arange(3), "groundTruth": truth}, do_compression=compressed)
    assert (read_mask(path) == TRUTH[:40]).all()
    whole, same = path.read_bytes(), 0
    for trial in range(150):
        data = bytearray(whole)
        for _ in range(1 + trial % 20):
            data[rng.randrange(120, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data if trial % 3 else data[: rng.randrange(len(data))])
        try:
            marks = read_mask(path)
        except DataError as error:
            assert path.name in str(error)
        else:
            assert marks.dtype == bool and marks.ndim == 2
            same += (marks.shape == (40, SIZE)) and bool((marks == TRUTH[:40]).all())
            assert not compressed or (marks == TRUTH[:40]).all(), "a checksum tells"
    assert same < 120


def test_the_size_of_a_mask_is_that_of_its_picture(tmp_path):
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "picture.png")
    Image.fromarray(TRUTH).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png", tmp_path / "picture.png") == TRUTH).all()
    Image.fromarray(TRUTH[:, :40]).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=f"mask.png: 40 x {SIZE} pixels, its image has {SIZE} x {SIZE}"):
        read_mask(tmp_path / "mask.png", tmp_path / "picture.png")
