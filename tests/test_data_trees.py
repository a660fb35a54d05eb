"""Every folder of data_trees.yaml gives its index; what is not known of a folder is reported."""

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from spgdd.data.describe import describe
from spgdd.data.index import index_folder
from spgdd.data.masks import read_mask
from spgdd.data.records import read_records
from spgdd.errors import DataError
from spgdd.files import write_json

TREES = yaml.safe_load(Path(__file__).with_name("data_trees.yaml").read_text(encoding="utf-8"))
SIZE = (12, 8)
MASKS = {  # size, and the box that is marked
    "mask": (SIZE, (3, 2, 6, 4)), "empty": (SIZE, (0, 0, 0, 0)), "large mask": ((24, 16), (3, 2, 6, 4)),
    "small mask": ((6, 4), (1, 1, 2, 2)), "broad mask": (SIZE, (0, 0, 8, 8)),
}  # fmt: skip


def draw(folder: Path, name: str, content: str = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content.startswith(("copy of ", "half of ")):
        data = (folder / content.split(" of ")[1]).read_bytes()
        path.write_bytes(data[: len(data) // 2] if content.startswith("half") else data)
    elif content in MASKS or content == "inverted mask":
        size, (left, top, right, bottom) = MASKS[content.removeprefix("inverted ")]
        pixels = np.zeros(size[::-1], np.uint8)
        pixels[top:bottom, left:right] = 255
        pixels = 255 - pixels if content.startswith("inverted") else pixels
        options = {"quality": 95} if path.suffix == ".jpg" else {}
        Image.fromarray(pixels).save(path, **options)
    elif content:
        path.write_text(content.encode().decode("unicode_escape") if "\\" in content else content, encoding="utf-8")
    else:
        rng = np.random.default_rng([*os.fsencode(name)])
        Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(path)


def grow(folder: Path, files: str) -> Path:
    for line in files.strip().splitlines():
        draw(folder, *line.split(" = ", 1))
    return folder


@pytest.mark.parametrize("tree", TREES, ids=[tree["name"] for tree in TREES])
def test_the_index_of_a_tree(tree, tmp_path):
    folder = grow(tmp_path / "data", tree["files"])
    if "error" in tree:
        with pytest.raises(DataError, match=tree["error"]):
            index_folder(folder)
        return
    index = index_folder(folder)
    expected = {}
    for line in tree["rows"].strip().splitlines():
        image, _, said = line.partition(": ")
        expected[image] = tuple(part.strip() for part in said.split("|"))
    found = {row.image: (row.subset, row.product, row.split, row.defect_type, row.mask) for row in index.rows}
    assert found == expected
    assert sorted(f"{p.kind} {p.path}" for p in index.problems) == sorted(tree.get("problems", []))
    for row in index.rows:
        assert (row.width, row.height) == SIZE
        if row.mask:
            broad = any(problem.kind == "doubtful" for problem in index.problems)
            assert read_mask(folder / row.mask, folder / row.image).sum() == (64 if broad else 6)


def test_links_to_folders_are_followed_once(tmp_path):
    outside = grow(tmp_path / "outside", "train/good/0.png\ntrain/good/1.png")
    folder = grow(tmp_path / "data", "nut/train/good/2.png")
    (folder / "bolt").symlink_to(outside, target_is_directory=True)  # a product that lies elsewhere
    (folder / "again").symlink_to(folder / "nut", target_is_directory=True)  # is read as nut
    (folder / "nut" / "loop").symlink_to(folder, target_is_directory=True)
    (outside / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "screw").symlink_to(outside, target_is_directory=True)  # the same as bolt
    index = index_folder(folder)
    pictures = ["bolt/train/good/0.png", "bolt/train/good/1.png", "nut/train/good/2.png"]
    assert [row.image for row in index.rows] == pictures
    assert {row.product for row in index.rows} == {"bolt", "nut"}
    skipped = {problem.path for problem in index.problems}
    assert skipped == {"again", "nut/loop", "bolt/up", "screw"}
    assert {problem.kind for problem in index.problems} == {"skipped"}


def test_pictures_turned_by_exif_have_the_size_that_people_see(tmp_path):
    """Of each orientation: a mask as people see it, and one as the camera stored the picture."""
    from PIL import ImageOps

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        mask = np.zeros((8, 12), np.uint8)
        mask[1:3, 2:8] = 255
        stored = Image.fromarray(mask)
        picture = tmp_path / f"{orientation}.jpg"
        Image.new("RGB", (12, 8)).save(picture, exif=exif)
        stored.save(tmp_path / "stored.png")
        stored.getexif()[0x0112] = orientation
        seen = ImageOps.exif_transpose(stored)
        seen.save(tmp_path / "seen.png", exif=b"")
        if orientation in (2, 3, 4):  # of one size either way
            for name in ("stored.png", "seen.png"):
                with pytest.raises(DataError, match="turned by EXIF"):
                    read_mask(tmp_path / name, picture)
            continue
        for name in ("stored.png", "seen.png"):
            assert (read_mask(tmp_path / name, picture) == (np.asarray(seen) > 0)).all(), (orientation, name)


def test_the_table_of_turned_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grow(tmp_path, "nut/train/good/0.png")
    path = tmp_path / "nut" / "train" / "good" / "1.jpg"
    Image.new("RGB", (20, 10), "red").save(path, exif=exif)
    Image.new("RGB", (20, 10), "blue").save(path.with_name("2.png"), exif=exif)
    whole = path.with_name("2.png").read_bytes()  # the same with its EXIF data at the end, as some programs write it
    start = whole.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(whole[start : start + 4], "big")
    late = whole[:start] + whole[end:-12] + whole[start:end] + whole[-12:]
    path.with_name("3.png").write_bytes(late)
    sizes = {(row.image[-5:], row.width, row.height) for row in index_folder(tmp_path).rows}
    assert sizes == {("0.png", 12, 8), ("1.jpg", 10, 20), ("2.png", 10, 20), ("3.png", 10, 20)}


def test_names_that_are_no_utf8_are_indexed_saved_and_read_again(tmp_path):
    import json

    name = os.fsdecode(b"nut/train/good/fl\xe4che.png")
    try:
        grow(tmp_path, name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    index = index_folder(tmp_path)
    assert [row.image for row in index.rows] == [name]
    index.save(tmp_path / "index.json")
    index.save(tmp_path / "index.csv")
    saved = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert (tmp_path / saved["rows"][0]["image"]).is_file()
    write_json(tmp_path / "text.json", describe(index))
    (record,) = read_records(tmp_path / "text.json", tmp_path)
    assert record.image == tmp_path / name
    assert "fl\\udce4che" in (tmp_path / "index.csv").read_text(encoding="utf-8")


def test_the_summary_counts_pictures_masks_and_what_is_left_out(tmp_path):
    grow(tmp_path, "nut/train/good/0.png\nnut/test/dent/1.png\nnut/test/dent/2.png\n"
         "nut/ground_truth/dent/1_mask.png = mask\nraw/1.png\nraw/2.png\nraw/3.png")  # fmt: skip
    lines = index_folder(tmp_path).summary()
    assert lines[0] == (
        f"{tmp_path}: 3 pictures of 1 products, 2 of them defective; 1 masks, 1 defective pictures without one; "
        "3 pictures skipped"
    )
    assert lines[1:] == [
        "missing: nut/test/dent/2.png (no mask for this dent image)",
        "skipped: raw (3 pictures in no known layout)",
    ]
    for number in range(10, 30):
        draw(tmp_path, f"nut/test/dent/{number}.png")
    lines = index_folder(tmp_path).summary()
    assert len(lines) == 8 and "16 more" in lines[6]
