"""Every layout is read from a small tree of the exact published structure; damaged data sets are reported."""

import csv
import functools
import hashlib
import json
import shutil
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spgdd.data.download import DATASETS, about, download, unpack
from spgdd.data.index import index_folder
from spgdd.data.masks import read_mask
from spgdd.errors import DataError, SpgddError, WeightsError

SPLIT_HEADER = "object,split,label,image,mask"


def picture(path: Path, seed: int = 0, size=(12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def mask(path: Path, value: int = 255, size=(12, 8), filled: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[2:4, 3:6] = value * filled
    Image.fromarray(pixels).save(path)


def mvtec(root: Path, product: str = "bottle") -> Path:
    for name in ("000", "001"):
        picture(root / product / "train" / "good" / f"{name}.png", 1)
    picture(root / product / "test" / "good" / "000.png", 2)
    picture(root / product / "test" / "broken_large" / "000.png", 3)
    mask(root / product / "ground_truth" / "broken_large" / "000_mask.png")
    (root / product / "license.txt").write_text("CC BY-NC-SA 4.0")
    (root / product / "readme.txt").write_text("MVTec AD")
    return root


def visa(root: Path) -> Path:
    data, rows, labels = root / "candle" / "Data", [], []
    for number in range(3):
        picture(data / "Images" / "Normal" / f"{number:04}.JPG", 4)
        split = "train" if number < 2 else "test"
        rows.append(f"candle,{split},normal,candle/Data/Images/Normal/{number:04}.JPG,")
        labels.append(f"candle/Data/Images/Normal/{number:04}.JPG,normal,")
    for number, kind in enumerate(
        ("chunk of wax missing", '"damaged corner of packaging,weird candle wick"')
    ):
        picture(data / "Images" / "Anomaly" / f"{number:03}.JPG", 5)
        mask(data / "Masks" / "Anomaly" / f"{number:03}.png", value=number + 1)
        paths = f"candle/Data/Images/Anomaly/{number:03}.JPG", f"candle/Data/Masks/Anomaly/{number:03}.png"
        rows.append(f"candle,test,anomaly,{paths[0]},{paths[1]}")
        labels.append(f"{paths[0]},{kind},{paths[1]}")
    (root / "candle" / "image_anno.csv").write_text("\n".join(["image,label,mask", *labels]) + "\n")
    (root / "split_csv").mkdir()
    for name in ("1cls", "2cls_fewshot", "2cls_highshot"):
        (root / "split_csv" / f"{name}.csv").write_text("\n".join([SPLIT_HEADER, *rows]) + "\n")
    return root


def table(index) -> list[tuple]:
    return [(row.subset, row.product, row.split, row.defect_type, row.image, row.mask) for row in index.rows]


def test_mvtec_layout(tmp_path):
    index = index_folder(mvtec(tmp_path / "mvtec_anomaly_detection"))
    subset = "mvtec_anomaly_detection", "bottle"
    mask_path = "bottle/ground_truth/broken_large/000_mask.png"
    assert table(index) == [
        (*subset, "test", "broken_large", "bottle/test/broken_large/000.png", mask_path),
        (*subset, "test", "good", "bottle/test/good/000.png", ""),
        (*subset, "train", "good", "bottle/train/good/000.png", ""),
        (*subset, "train", "good", "bottle/train/good/001.png", ""),
    ]
    assert not index.problems and {(row.width, row.height) for row in index.rows} == {(12, 8)}


@pytest.mark.parametrize(
    "folder, subset, product",
    [
        (".", "mvtec_anomaly_detection", "bottle"),
        ("mvtec_anomaly_detection", "mvtec_anomaly_detection", "bottle"),
        ("mvtec_anomaly_detection/bottle", "bottle", "bottle"),
    ],
)
def test_mvtec_from_any_level(tmp_path, folder, subset, product):
    mvtec(tmp_path / "mvtec_anomaly_detection")
    rows = index_folder(tmp_path / folder).rows
    assert len(rows) == 4 and {row.product for row in rows} == {product}
    assert {row.subset for row in rows} == {subset}


def test_visa_with_its_tables(tmp_path):
    index = index_folder(visa(tmp_path / "VisA"))
    assert not index.problems
    assert {row[:4] for row in table(index)} == {
        ("VisA", "candle", "train", "good"),
        ("VisA", "candle", "test", "good"),
        ("VisA", "candle", "test", "chunk of wax missing"),
        ("VisA", "candle", "test", "damaged corner of packaging,weird candle wick"),
    }
    row = next(row for row in index.rows if row.defect_type.startswith("damaged"))
    assert read_mask(tmp_path / "VisA" / row.mask).sum() == 6  # class number 2 of 255 is a defect too


def test_visa_other_split_no_tables_and_missing_files(tmp_path):
    root = visa(tmp_path / "VisA")
    few = root / "split_csv" / "2cls_fewshot.csv"
    few.write_text(few.read_text().replace("candle,test,anomaly", "candle,train,anomaly", 1))
    kinds = {row.image[-7:]: row.split for row in index_folder(root, few).rows if row.mask}
    assert kinds == {"000.JPG": "train", "001.JPG": "test"}
    (root / "candle" / "Data" / "Images" / "Normal" / "0002.JPG").unlink()
    (root / "candle" / "Data" / "Masks" / "Anomaly" / "000.png").unlink()
    problems = {(problem.kind, problem.path.rpartition("/")[2]) for problem in index_folder(root).problems}
    assert problems == {("missing", "0002.JPG"), ("missing", "000.png"), ("missing", "000.JPG")}
    for name in ("split_csv/1cls.csv", "candle/image_anno.csv"):
        (root / name).unlink()
    assert {row[2:4] for row in table(index_folder(root))} == {("", "good"), ("", "anomaly")}


def test_visa_split_with_other_columns_is_refused(tmp_path):
    root = visa(tmp_path / "VisA")
    wrong = root / "split_csv" / "1cls.csv"
    wrong.write_text("object,set,label,image,mask\n")
    with pytest.raises(DataError, match="object,split,label,image,mask"):
        index_folder(root, wrong)
    index = index_folder(root)  # nobody asked for this one: the rest goes on
    assert [(problem.kind, problem.path) for problem in index.problems] == [("broken", "split_csv/1cls.csv")]
    assert len(index.rows) == 5 and {row.split for row in index.rows} == {""}


CUT_OFF = b"image,label,mask\ncandle/Data/Images/Normal/0000.JPG"


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"\x00" * 40, b"", CUT_OFF])
def test_a_damaged_visa_table_is_named_and_the_rest_goes_on(tmp_path, damage):
    root = visa(tmp_path / "VisA")
    (root / "candle" / "image_anno.csv").write_bytes(damage)
    index = index_folder(root)
    assert [(problem.kind, problem.path) for problem in index.problems] == [("broken", "candle/image_anno.csv")]
    assert {row.defect_type for row in index.rows} == {"good", "anomaly"}


def test_published_visa_split_files(real_data):
    """The split files as published name every image once, and their columns are the ones we expect."""
    for path in sorted((real_data.parent / "visa_split_csv").glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert ",".join(rows[0]) == SPLIT_HEADER and len({row["image"] for row in rows}) == len(rows) == 10821
        assert {row["label"] for row in rows if row["mask"]} == {"anomaly"}


LAYOUTS = {
    "MT": ["MT_Crack/Imgs/exp1_num_1.jpg", "MT_Free/Imgs/exp1_num_2.jpg"],
    "AITEX": ["Defect_images/0001_002_00.png", "NODefect_images/2306881-210020u/0001_000_00.png"],
    "DeepCrack": ["train_img/11111.jpg", None],
    "CFD": ["CrackForest/Images/001.jpg", None],
    "CRACK500": ["train/images/CRACK500_20160222.jpg", None],
    "KolektorSDD": ["kos01/Part0.jpg", "kos01/Part1.jpg"],
    "KolektorSDD2": ["train/10000.png", "train/10001.png"],
    "NEU-Seg": ["images/training/000001.jpg", None],
}
MASKS = {
    "MT_Crack/Imgs/exp1_num_1.png": True,
    "MT_Free/Imgs/exp1_num_2.png": False,
    "Mask_images/0001_002_00_mask.png": True,
    "train_lab/11111.png": True,
    "CrackForest/Masks/001_label.PNG": True,
    "train/masks/CRACK500_20160222.jpg": True,
    "kos01/Part0_label.bmp": True,
    "kos01/Part1_label.bmp": False,
    "train/10000_GT.png": True,
    "train/10001_GT.png": False,
    "annotations/training/000001.png": True,
}
KINDS = {
    "MT": "crack",
    "AITEX": "broken_end",
    "KolektorSDD": "defect",
    "KolektorSDD2": "defect",
    "NEU-Seg": "defect",
}


def test_tadd_layouts_side_by_side(tmp_path):
    for subset, (bad, good) in LAYOUTS.items():
        for name in filter(None, (bad, good)):
            picture(tmp_path / subset / name)
        for name, filled in MASKS.items():
            if (
                Path(name).stem.removesuffix("_mask").removesuffix("_label").removesuffix("_GT")
                in f"{bad} {good}"
            ):
                mask(tmp_path / subset / name, filled=filled)
    index = index_folder(tmp_path)
    found = {(row.subset, row.defect_type, row.image, bool(row.mask)) for row in index.rows}
    expected = {(s, KINDS.get(s, "crack"), f"{s}/{bad}", True) for s, (bad, _) in LAYOUTS.items()}
    assert found == expected | {(s, "good", f"{s}/{good}", False) for s, (_, good) in LAYOUTS.items() if good}
    assert {row.product for row in index.rows if row.subset == "MT"} == {"magnetic tile"}


def test_crackforest_matlab_mask(tmp_path):
    from scipy.io import savemat

    picture(tmp_path / "image" / "001.jpg")
    labels = np.ones((8, 12), np.uint8)
    labels[3, 4:9] = 2
    (tmp_path / "groundTruth").mkdir()
    truth = {"groundTruth": {"Segmentation": labels, "Boundaries": labels > 1}}
    savemat(tmp_path / "groundTruth" / "001.mat", truth)
    index = index_folder(tmp_path)
    assert index.rows[0].defect_type == "crack" and not index.problems
    assert read_mask(tmp_path / index.rows[0].mask).sum() == 5


def test_damage_is_reported(tmp_path):
    root = mvtec(tmp_path)
    bottle = root / "bottle"
    (bottle / "train" / "good" / "002.png").write_bytes((bottle / "train" / "good" / "001.png").read_bytes())
    whole = (bottle / "test" / "good" / "000.png").read_bytes()
    (bottle / "test" / "good" / "000.png").write_bytes(whole[: len(whole) // 2])
    picture(bottle / "test" / "scratch" / "000.png")  # no mask
    picture(bottle / "test" / "broken_large" / "001.png", 6)
    mask(bottle / "ground_truth" / "broken_large" / "001_mask.png", size=(8, 8))
    picture(bottle / "test" / "broken_large" / "002.png", 7)
    mask(bottle / "ground_truth" / "broken_large" / "002_mask.png", filled=False)
    mask(bottle / "ground_truth" / "broken_large" / "009_mask.png")
    index = index_folder(root)
    assert sorted((problem.kind, problem.path.split("/", 2)[2]) for problem in index.problems) == [
        ("broken", "broken_large/001_mask.png"),
        ("broken", "broken_large/002_mask.png"),
        ("broken", "good/000.png"),
        ("duplicate", "good/002.png"),
        ("missing", "scratch/000.png"),
        ("unused", "broken_large/009_mask.png"),
    ]
    assert {row.image.split("/", 2)[2]: bool(row.mask) for row in index.rows if row.split == "test"} == {
        "broken_large/000.png": True, "broken_large/001.png": False, "broken_large/002.png": False,
        "scratch/000.png": False,
    }  # fmt: skip
    assert {problem.kind for problem in index_folder(root, check=False).problems} == {"missing", "unused", "duplicate"}


def test_save(tmp_path):
    index = index_folder(mvtec(tmp_path / "data"))
    index.save(tmp_path / "index.csv")
    with (tmp_path / "index.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [row.image for row in index.rows]
    index.save(tmp_path / "index.json")
    saved = json.loads((tmp_path / "index.json").read_text())
    assert len(saved["rows"]) == 4 and saved["problems"] == []


@pytest.mark.parametrize("where", ["/dev/full", "file/index.csv", "folder"])
def test_an_index_that_cannot_be_written_is_one_line(tmp_path, where):
    index = index_folder(mvtec(tmp_path / "data"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SpgddError, match="cannot be written"):
        index.save(tmp_path / where)
    assert (tmp_path / "file").read_text() == "kept" and not list(tmp_path.glob(".*"))


def test_a_damaged_or_swollen_archive_is_removed(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("large.png", bytes(10_000_000))
    with pytest.raises(DataError, match="more than 20 times its size.*removed"):
        unpack(archive)
    assert not archive.exists() and not (tmp_path / "large.png").exists()
    shutil.make_archive(str(tmp_path / "b"), "xztar", mvtec(tmp_path / "data"))
    whole = (tmp_path / "b.tar.xz").read_bytes()
    for name, data in {"b.tar.xz": whole[:-200], "c.zip": b"<html>", "d.tar.xz": b"<html>", "e.tar": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is damaged"):
            unpack(tmp_path / name)
        assert not (tmp_path / name).exists()
    (tmp_path / "f.tar.xz").write_bytes(whole)
    unpack(tmp_path / "f.tar.xz")
    assert (tmp_path / "bottle" / "train" / "good" / "000.png").is_file()
    with tarfile.open(tmp_path / "g.tar", "w") as file:
        file.add(tmp_path / "bottle" / "readme.txt", "../outside.txt")
    with pytest.raises(DataError, match="g.tar is damaged"):
        unpack(tmp_path / "g.tar")
    assert not (tmp_path.parent / "outside.txt").exists()


def test_nothing_known(tmp_path):
    with pytest.raises(DataError, match="No known layout"):
        index_folder(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        index_folder(tmp_path / "nowhere")


def test_real_photographs_row_for_row(real_data):
    index = index_folder(real_data)
    with (real_data / "index.csv").open(newline="") as file:
        expected = sorted(csv.DictReader(file), key=lambda row: row["image"])
    found = [{key: str(getattr(row, key)) for key in expected[0]} for row in index.rows]
    assert sorted(found, key=lambda row: row["image"]) == expected
    assert index.problems == []


def test_download_is_verified_and_unpacked(tmp_path, monkeypatch):
    """A data set on a local server: fetched, compared with its SHA-256, unpacked, indexed."""
    published = mvtec(tmp_path / "published")
    archive = shutil.make_archive(str(tmp_path / "site" / "toy"), "zip", published)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "site")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = {
        "name": "toy.zip",
        "sources": [f"http://127.0.0.1:{server.server_port}/toy.zip"],
        "bytes": Path(archive).stat().st_size,
        "sha256": hashlib.sha256(Path(archive).read_bytes()).hexdigest(),
    }
    entry = {"title": "Toy", "licence": "CC0", "page": "", "folder": "toy"}
    monkeypatch.setitem(DATASETS, "toy", entry | {"files": [file]})
    try:
        folder = download("toy", tmp_path / "TADD")
        assert table(index_folder(folder)) and "licence: CC0" in about("toy")
        monkeypatch.setitem(
            DATASETS, "toy", entry | {"folder": "other", "files": [file | {"sha256": "0" * 64}]}
        )
        with pytest.raises(WeightsError, match="wrong file"):
            download("toy", tmp_path / "TADD")
        assert not (tmp_path / "TADD" / "other" / "toy.zip").exists()
        monkeypatch.setitem(DATASETS, "toy", entry | {"files": [file | {"bytes": 10**18}]})
        with pytest.raises(SpgddError, match="GB are free"):
            download("toy", tmp_path / "TADD")
    finally:
        server.shutdown()
    with pytest.raises(DataError, match="git clone"):
        download("mt", tmp_path)
    with pytest.raises(DataError, match="mvtec, visa"):
        download("mvtek", tmp_path)
