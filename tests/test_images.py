"""Any file a person may hand over is read as they see it, or refused in one line that names it."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from spgdd.errors import ImageError
from spgdd.images import list_images, read_header, read_image

NOISE = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)


def halves(left, right, mode="RGB"):
    """A picture whose left half has one colour and whose right half has another."""
    picture = Image.new(mode, (40, 20), left)
    picture.paste(right, (20, 0, 40, 20))
    return picture


def colours(picture):
    """Centre of the left half, centre of the right half."""
    return picture.getpixel((picture.width // 4, picture.height // 2)), picture.getpixel(
        (picture.width * 3 // 4, picture.height // 2)
    )


def close(actual, expected, tolerance=3):
    assert np.abs(np.array(actual, int) - np.array(expected, int)).max() <= tolerance, (actual, expected)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_files_are_read_unchanged(tmp_path, suffix):
    path = tmp_path / f"part.{suffix}"
    Image.fromarray(NOISE).save(path, lossless=True)
    picture = read_image(path)
    assert picture.mode == "RGB" and picture.info == {"notes": [], "levels": None}
    np.testing.assert_array_equal(np.asarray(picture), NOISE)
    np.testing.assert_array_equal(np.asarray(read_image(str(path))), NOISE)
    np.testing.assert_array_equal(np.asarray(read_image(Image.open(path))), NOISE)


@pytest.mark.parametrize(
    ("mode", "left", "right", "expected"),
    [
        ("RGBA", (200, 0, 0, 255), (200, 0, 0, 0), ((200, 0, 0), (255, 255, 255))),
        ("RGBA", (0, 0, 0, 128), (0, 0, 0, 64), ((127, 127, 127), (191, 191, 191))),
        ("LA", (40, 255), (40, 0), ((40, 40, 40), (255, 255, 255))),
        ("CMYK", (0, 255, 255, 0), (255, 0, 255, 0), ((255, 0, 0), (0, 255, 0))),
        ("L", 30, 220, ((30, 30, 30), (220, 220, 220))),
        ("1", 0, 1, ((0, 0, 0), (255, 255, 255))),
    ],
)
def test_modes_look_as_they_are_meant(tmp_path, mode, left, right, expected):
    path = tmp_path / ("part.tif" if mode == "CMYK" else "part.png")
    halves(left, right, mode).save(path)
    for actual, value in zip(colours(read_image(path)), expected, strict=True):
        close(actual, value)


def test_palette_with_transparency_and_colour_key_stand_on_white(tmp_path):
    palette = halves((10, 200, 30), (200, 10, 30)).quantize(4)
    hidden = palette.getpixel((30, 10))
    palette.save(tmp_path / "palette.png", transparency=hidden)
    close(colours(read_image(tmp_path / "palette.png")), ((10, 200, 30), (255, 255, 255)))
    halves((10, 200, 30), (200, 10, 30)).save(tmp_path / "key.png", transparency=(200, 10, 30))
    close(colours(read_image(tmp_path / "key.png")), ((10, 200, 30), (255, 255, 255)))


def test_cmyk_jpeg(tmp_path):
    halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK").save(tmp_path / "print.jpg", quality=95)
    close(colours(read_image(tmp_path / "print.jpg")), ((255, 0, 0), (0, 0, 255)), 6)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_grey_is_stretched_over_its_own_range(tmp_path, dtype):
    ramp = np.linspace(1000, 3000, 60).astype(dtype).reshape(1, -1).repeat(5, 0)
    path = tmp_path / ("part.png" if dtype == np.uint16 else "part.tif")
    Image.fromarray(ramp).save(path)
    picture = np.asarray(read_image(path))[..., 0]
    assert (picture.min(), picture.max()) == (0, 255)
    np.testing.assert_allclose(picture[0], np.linspace(0, 255, 60), atol=1)
    assert read_image(path).info["notes"] == ["grey values 1000 to 3000 stretched to 0 to 255"]


def test_flat_and_not_finite_deep_grey(tmp_path):
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "flat.png")
    assert np.asarray(read_image(tmp_path / "flat.png")).max() == 0
    values = np.array([[0, 10, np.nan, np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "nan.tif")
    assert np.asarray(read_image(tmp_path / "nan.tif"))[0, :, 0].tolist() == [0, 255, 0, 255]


def test_sixteen_bit_colour_png(tmp_path):
    rows = b"".join(b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0, 0x8000) for _ in range(2))

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(data)
    picture = read_image(tmp_path / "deep.png")
    close((picture.getpixel((0, 0)), picture.getpixel((1, 1))), ((255, 0, 0), (0, 0, 128)))


def test_colour_of_twelve_bits_in_sixteen_is_refused_and_others_are_noted(tmp_path):
    from PIL import ImageFile

    dark = Image.new("RGB", (4, 4), (15, 9, 3))  # what is left of 12-bit data
    for picture, message in ((dark, "48-bit colour .* no value is above 15"), (Image.new("RGB", (4, 4), "red"), "")):
        picture.tile = [ImageFile._Tile("zip", (0, 0, 4, 4), 0, "RGB;16B")]
        if message:
            with pytest.raises(ImageError, match=message):
                read_image(picture)
        else:
            assert "48-bit colour, read with 8 bits a channel" in read_image(picture).info["notes"]


def test_a_hot_pixel_moves_no_range_and_levels_may_be_given():
    grey = np.random.default_rng(0).integers(1000, 1100, (200, 200)).astype(np.uint16)
    plain = read_image(grey)
    grey[3, 3], grey[9, 9] = 65535, 0
    hot = read_image(grey)
    assert hot.info["levels"] == pytest.approx(plain.info["levels"], abs=2)
    assert np.abs(np.asarray(hot).astype(int) - np.asarray(plain))[20:].max() <= 6
    given = read_image(grey, (0, 65535))
    assert given.info["levels"] == (0, 65535) and np.asarray(given)[20:].max() < 8


def test_an_eps_file_by_another_name_starts_no_program(tmp_path):
    (tmp_path / "part.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="not a picture"):
        read_image(tmp_path / "part.jpg")


def test_a_picture_without_any_number_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(ImageError, match="no value in it is a number"):
        read_image(tmp_path / "nan.tif")


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("mode", ["I;16", "RGBA", "RGB", "F"])
def test_memory_stays_near_the_pictures_own(tmp_path, mode):
    """Peak above what Python and the file need, in bytes a pixel, of a picture of 36 megapixels."""
    side, path = 6000, tmp_path / "large.tif"
    kinds = {"I;16": np.uint16, "F": np.float32}
    rows = np.linspace(0, 200, side).astype(kinds.get(mode, np.uint8))
    grey = np.broadcast_to(rows, (side, side))
    picture = Image.fromarray(np.ascontiguousarray(grey))
    (picture if mode in kinds else picture.convert(mode)).save(path)
    code = f"""
import resource
from spgdd.images import read_image
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_image({str(path)!r})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024 / {side}**2)
"""
    found = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert found < 9.5, f"{found:.1f} bytes a pixel"


@pytest.mark.parametrize("suffix", ["gif", "png", "tif"])
def test_first_frame_is_used_and_noted(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"film.{suffix}", save_all=True, append_images=frames[1:])
    picture = read_image(tmp_path / f"film.{suffix}")
    close(picture.getpixel((5, 5)), (255, 0, 0))
    assert picture.info["notes"] == ["first of 3 frames"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    upright = Image.fromarray(NOISE)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL transpositions that turn it into the stored form
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "phone.png", exif=exif)
    picture = read_image(tmp_path / "phone.png")
    np.testing.assert_array_equal(np.asarray(picture), NOISE)
    np.testing.assert_array_equal(np.asarray(read_image(picture)), NOISE)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5000, 2)])
def test_extreme_sizes(tmp_path, size):
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "dot.png")
    assert read_image(tmp_path / "dot.png").size == size


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (NOISE, NOISE),
        (NOISE / 255, NOISE),
        ((NOISE / 255).astype(np.float32), NOISE),
        (NOISE[::-1], NOISE[::-1]),
        (NOISE[..., 0], NOISE[..., [0, 0, 0]]),
        (NOISE[..., :1], NOISE[..., [0, 0, 0]]),
        (NOISE[..., 0] > 99, (NOISE[..., [0, 0, 0]] > 99) * 255),
        (np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)]), NOISE),
        (np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)]), np.full(NOISE.shape, 255)),
    ],
)
def test_arrays(array, expected):
    np.testing.assert_array_equal(np.asarray(read_image(array)), expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 20, 20), np.uint8), r"shape \(3, 20, 20\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.full((4, 4), 7.0), "from 7 to 7"),
        (np.full((4, 4), np.nan), "from nan to nan"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (None, "NoneType is no image"),
    ],
)
def test_arrays_that_are_no_picture(source, message):
    with pytest.raises(ImageError, match=message):
        read_image(source)


def encoded(tmp_path, suffix, **options):
    path = tmp_path / f"part.{suffix}"
    Image.fromarray(NOISE).save(path, **options)
    return path, path.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("bmp", {}), ("gif", {}), ("webp", {}),
     ("tif", {}), ("tif", {"compression": "tiff_lzw"}), ("ppm", {})],
)  # fmt: skip
def test_truncated_file_is_an_error_and_never_half_grey(tmp_path, suffix, options):
    path, data = encoded(tmp_path, suffix, **options)
    whole = np.asarray(read_image(path))
    for length in range(1, len(data), max(1, len(data) // 25)):
        path.write_bytes(data[:length])
        try:
            picture = np.asarray(read_image(path))
        except ImageError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(picture, whole, err_msg=f"{length} of {len(data)} bytes")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError):
        read_image(path)


def test_damaged_headers_never_escape_as_other_errors(tmp_path):
    rng = np.random.default_rng(1)
    for suffix in ("jpg", "png", "gif", "tif", "webp", "bmp"):
        path, data = encoded(tmp_path, suffix)
        for _ in range(25):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 120), 4):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                read_image(path)
            except ImageError as error:
                assert str(path) in str(error)


def test_unreadable_files_say_why(tmp_path):
    for name, data, reason in [
        ("empty.png", b"", "0 bytes"),
        ("notes.jpg", b"These are only words, a few of them.", "not a picture"),
        ("phone.heic", b"\0\0\0\x18ftypheic" + bytes(100), "pillow-heif|damaged|not a picture"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=rf"{name}: .*({reason})"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="missing.png: cannot be opened .No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="a folder, not a picture"):
        read_image(tmp_path)


def test_decompression_bomb_is_refused_with_its_size_and_the_limit(tmp_path):
    Image.new("1", (30000, 20000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    with pytest.raises(
        ImageError, match=r"bomb\.png: .*600000000 pixels.*limit of 178956970 pixels.*MAX_IMAGE"
    ):
        read_image(tmp_path / "bomb.png")


def test_list_images(tmp_path):
    files = "part10.png part2.PNG part1.jpg .hidden.png ._part1.jpg notes.txt sub/part3.png Thumbs.db"
    for name in (*files.split(), ".ipynb_checkpoints/part1.png", "__MACOSX/part1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()

    def names(paths):
        return [path.name for path in list_images(paths)]

    assert names(tmp_path) == names(str(tmp_path)) == ["part1.jpg", "part2.PNG", "part10.png"]
    assert names(f"{tmp_path}/*.png") == ["part10.png"]
    assert names(f"{tmp_path}/**/part[13].*") == ["part1.jpg", "part3.png"]
    assert names([tmp_path / "notes.txt", "missing.png", tmp_path / "sub"]) == [
        "notes.txt",
        "missing.png",
        "part3.png",
    ]
    for nothing in (tmp_path / "empty", f"{tmp_path}/*.webp"):
        with pytest.raises(ImageError, match="no picture"):
            list_images(nothing)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.eps"])
def test_no_other_program_is_started_for_a_file_that_is_no_picture(tmp_path, monkeypatch, name):
    """Pillow hands EPS files to Ghostscript, whatever they are called."""
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
    for read in (read_image, read_header):
        with pytest.raises(ImageError, match=name):
            read(tmp_path / name)


def test_a_header_tells_size_and_orientation_without_decoding(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(NOISE).save(tmp_path / "a.jpg", exif=exif)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert read_header(tmp_path / "a.jpg") == (83, 61, 8)
    Image.new("1", (20_000, 9_500)).save(tmp_path / "huge.png")
    for path in (tmp_path / "huge.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageError, match=path.name):
            read_header(path)
