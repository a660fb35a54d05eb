"""The text that is written about a data set is true to its masks; the reader takes it and PandaGPT's."""

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from spgdd import cli
from spgdd.data.describe import contrast_of, describe, measure, sample_of, shape_of
from spgdd.data.index import index_folder
from spgdd.data.masks import read_mask
from spgdd.data.records import read_records
from spgdd.data.words import conversation
from spgdd.errors import DataError
from spgdd.files import write_json
from spgdd.places import PLACES, place_of

PLACE = re.compile("|".join(sorted(PLACES, key=len, reverse=True)))  # the longest names first


@pytest.fixture
def folder(tmp_path):
    """A product in MVTec's layout with a scratch at the top left and two dents."""
    rng = np.random.default_rng(0)

    def save(name, pixels):
        path = tmp_path / "metal_nut" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for number in range(3):
        save(f"train/good/{number:03}.jpg", rng.integers(90, 110, (90, 120, 3), dtype=np.uint8))
    for kind, boxes in (("scratch", [(10, 12, 14, 38)]), ("dent", [(40, 50, 50, 60), (75, 100, 85, 110)])):
        image, mask = rng.integers(90, 110, (90, 120, 3), dtype=np.uint8), np.zeros((90, 120), np.uint8)
        for top, left, bottom, right in boxes:
            image[top:bottom, left:right] = 220
            mask[top:bottom, left:right] = 255
        save(f"test/{kind}/000.png", image)
        save(f"ground_truth/{kind}/000_mask.png", mask)
    return tmp_path


def test_measured_truth(folder):
    index = index_folder(folder)
    scratch = next(sample_of(row, index.folder) for row in index.rows if row.defect_type == "scratch")
    assert scratch["product"] == "metal nut" and scratch["middle"] == "top left"
    (defect,) = scratch["defects"]
    assert (defect["type"], defect["place"], defect["box"]) == ("scratch", "top left", (12, 10, 38, 14))
    assert defect["area"] == pytest.approx(4 * 26 / (90 * 120))
    assert defect["shape"] == "long, thin and horizontal"
    assert defect["contrast"] == pytest.approx(130 / 255, abs=0.02)  # the darkest levels: 90, 220
    dents = next(sample_of(row, index.folder) for row in index.rows if row.defect_type == "dent")["defects"]
    assert [dent["place"] for dent in dents] == ["center", "bottom right"]
    assert {dent["shape"] for dent in dents} == {"compact"}


def test_pieces_that_are_near_are_one_defect_and_specks_are_none():
    mask = np.zeros((200, 200), bool)
    mask[100, 20:60] = mask[101, 63:120] = True  # a crack with a gap of 3 pixels
    mask[10:40, 150:180] = True
    mask[190, 10] = True  # a speck
    found = measure(mask, np.zeros((200, 200, 3)), "crack")
    assert [d["place"] for d in found] == ["top right", "center"]
    assert [d["box"] for d in found] == [(150, 10, 180, 40), (20, 100, 120, 102)]


def test_a_defect_that_covers_the_image_has_no_contrast():
    (defect,) = measure(np.ones((30, 30), bool), np.full((30, 30, 3), 90.0), "stain")
    assert "contrast" not in defect and defect["place"] == "center"
    sample = {"product": "tile", "family": "", "size": (30, 30), "defects": [defect]}
    assert conversation(sample, random.Random(0), 1, first=("contrast",))[1]["value"].startswith(
        "I cannot tell"
    )


def test_shapes_and_contrast():
    def shape(mask):
        y, x = np.nonzero(mask)
        return shape_of(x, y)

    assert shape(np.ones((40, 2))) == "long, thin and vertical"
    assert shape(np.eye(40)) == "long, thin and diagonal"
    assert shape(np.ones((10, 12))) == "compact" and shape(np.ones((10, 30))) == "longish"
    cross = np.zeros((41, 41))
    cross[20] = cross[:, 20] = 1
    assert shape(cross) == "irregular" and shape(np.ones((1, 1))) == "compact"
    pixels = np.full((20, 20, 3), 100.0)
    pixels[5:10, 5:10, 2] = 151
    y, x = np.nonzero(pixels[..., 2] > 100)
    assert contrast_of(x, y, pixels[..., 2] > 100, pixels) == pytest.approx(51 / 255)


def test_records_are_reproducible_and_readable(folder):
    index = index_folder(folder)
    records = describe(index, seed=4)
    assert records == describe(index, seed=4) != describe(index, seed=5)
    assert [record["image_name"] for record in records] == [row.image for row in index.rows]
    assert all(set(record) == {"image_name", "conversation"} for record in records)
    write_json(folder / "TADD_text.json", records, indent=1)
    read = read_records(folder / "TADD_text.json", folder)
    assert [record.conversation for record in read] == [record["conversation"] for record in records]
    assert all(record.image.is_file() for record in read)
    cut = read_records(folder / "TADD_text.json", folder, max_turns=1)
    assert {len(record.conversation) for record in cut} == {2}


def test_broken_images_are_left_out(folder):
    (folder / "metal_nut" / "train" / "good" / "001.jpg").write_bytes(b"no image")
    (folder / "metal_nut" / "ground_truth" / "scratch" / "000_mask.png").unlink()
    names = [record["image_name"] for record in describe(index_folder(folder))]
    assert names == [
        f"metal_nut/{name}" for name in ("test/dent/000.png", "train/good/000.jpg", "train/good/002.jpg")
    ]


def test_pandagpt_instructions_and_wrong_files(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "000000123.jpg")
    talk = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "A square."}] * 3
    path = tmp_path / "pandagpt4_visual_instruction_data.json"
    path.write_text(json.dumps([{"image_name": "000000123", "conversation": talk}]))
    (record,) = read_records(path, tmp_path / "images", max_turns=2)
    assert record.image.name == "000000123.jpg" and record.conversation == talk[:4]
    for wrong, message in (
        ([{"image": "x", "conversation": talk}], "image_name"),
        ([{"image_name": "x", "conversation": talk[1:]}], "human"),
        ([{"image_name": "000000123", "conversation": []}], "human"),
        ({"a": 1}, "list"),
        ([{"image_name": "000000999", "conversation": talk}], "000000999"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=message):
            read_records(path, tmp_path / "images")
    path.write_text("[{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_records(path, tmp_path / "images")
    with pytest.raises(DataError, match="missing"):
        read_records(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_in_any_unicode_is_read(tmp_path, encoding):
    Image.new("RGB", (8, 8)).save(tmp_path / "Prüfteil.png")
    talk = [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "小"}]
    path = tmp_path / "text.json"
    path.write_text(json.dumps([{"image_name": "Prüfteil.png", "conversation": talk}], ensure_ascii=False), encoding)
    (record,) = read_records(path, tmp_path)
    assert record.conversation == talk and record.image.is_file()
    path.write_bytes("[\"Größe\"]".encode("latin-1"))
    with pytest.raises(DataError, match="text.json is no Unicode text .* Save it as UTF-8"):
        read_records(path, tmp_path)


OUTSIDE = ["../secret.png", "/etc/passwd", "a/../../b.png", "..", "..\\b.png", "C:/b.png", "C:b.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    path = tmp_path / "text.json"
    talk = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    path.write_text(json.dumps([{"image_name": name, "conversation": talk}]))
    with pytest.raises(DataError, match="record 0: image_name .* leads out"):
        read_records(path, tmp_path / "images")


def test_damaged_text_is_refused_or_says_the_same(tmp_path):
    """300 mutations of bytes, keys, values and records: an error, or the same images with as many turns."""
    rng = random.Random(0)
    entries = []
    for number in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        turns = range(2 + 2 * (number % 3))
        talk = [{"from": ("human", "gpt")[i % 2], "value": f"sentence {i} of {number}"} for i in turns]
        entries.append({"image_name": f"{number}.png", "conversation": talk})
    whole, path = json.dumps(entries, indent=1).encode(), tmp_path / "text.json"
    expected = [(entry["image_name"], len(entry["conversation"])) for entry in entries]
    junk = [None, 0, -1, 1e400, True, "", "x", [], {}, [None], {"a": 1}]
    junk += ["../0.png", "/", ".", "\0", "a" * 5000, "\ud800"]
    outcomes = {"refused": 0, "same": 0}
    for trial in range(300):
        changed = json.loads(whole)
        row = rng.choice(changed)
        turn = rng.choice(row["conversation"])
        kind = trial % 10
        if kind == 0:
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data = whole[: rng.randrange(len(whole))]
        elif kind == 2:
            at = rng.randrange(len(whole))
            data = whole[:at] + rng.randbytes(3) + whole[at:]
        elif kind == 3:
            data = whole.replace(b'"image_name": "3.png"', b'"image_name": "3.png", "image_name": "4.png"')
        elif kind == 4:
            data = b"[" * rng.randrange(1, 200_000)
        else:
            if kind == 5:
                row[rng.choice(("image_name", "conversation"))] = rng.choice(junk)
            elif kind == 6:
                turn[rng.choice(("from", "value"))] = rng.choice(junk[:5] + junk[7:11])
            elif kind == 7:
                turn.pop(rng.choice(("from", "value")))
            elif kind == 8:
                row.pop(rng.choice(("image_name", "conversation")))
            else:
                row["conversation"].insert(rng.randrange(3), rng.choice(junk))
            data = json.dumps(changed).encode()
        path.write_bytes(data)
        try:
            read = read_records(path, tmp_path)
        except DataError as error:
            assert path.name in str(error) and len(str(error)) < 500
            outcomes["refused"] += 1
            continue
        assert [(record.image.name, len(record.conversation)) for record in read] == expected, data
        outcomes["same"] += 1
    assert outcomes["refused"] > 250 and outcomes["same"], outcomes


def test_commands(folder, capsys):
    def run(*words):
        return cli.main(["tadd", *map(str, words)]), capsys.readouterr().out

    status, out = run("index", folder, "-o", folder / "index.csv")
    assert status == 0 and "5 images, 0 problems" in out and (folder / "index.csv").is_file()
    status, out = run("describe", folder, "-o", folder / "text.json")
    assert status == 0 and "5 conversations" in out
    assert len(json.loads((folder / "text.json").read_text())) == 5
    status, out = run("download", "mt")
    assert status == 0 and "git clone" in out and "licence" in out
    (folder / "metal_nut" / "ground_truth" / "dent" / "000_mask.png").unlink()
    assert run("index", folder)[0] == 1


def test_place_words_agree_with_the_masks_of_real_photographs(real_data):
    """In every record: the places that are named are the centroids of the defects and of the whole mask."""
    index = index_folder(real_data, check=False)
    rows = {row.image: row for row in index.rows}
    records = describe(index)
    assert len(records) == len(rows)
    for record in records:
        row = rows[record["image_name"]]
        text = " ".join(turn["value"] for turn in record["conversation"] if turn["from"] == "gpt")
        if not row.mask:
            assert "Yes, there" not in text and not PLACE.search(text), text
            continue
        assert "Yes, " in text and "no defect" not in text and "no anomaly" not in text, text
        y, x = np.nonzero(read_mask(real_data / row.mask))
        middle = place_of((x.mean() + 0.5) / row.width, (y.mean() + 0.5) / row.height)
        places = {defect["place"] for defect in sample_of(row, real_data)["defects"]}
        named = set(PLACE.findall(text))
        assert places | {middle} == named, (row.image, text)
