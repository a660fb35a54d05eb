"""Training data: examples are what the files say, the cache survives everything, an epoch's order is a function."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import ROOT, check
from spgdd.data.describe import describe
from spgdd.data.index import Index, index_folder
from spgdd.data.masks import read_mask
from spgdd.errors import DataError, ImageError, SpgddError
from spgdd.files import write_json
from spgdd.imagebind.preprocess import preprocess
from spgdd.images import read_image
from spgdd.loading import load_model
from spgdd.prefetch import prefetched
from spgdd.profiles import get_profile
from spgdd.training import cache as cache_module
from spgdd.training.cache import PictureFile
from spgdd.training.data import TrainingData

MINI = ROOT / "data" / "mini"
PRODUCTS = ("nut", "leather", "wood")  # 2 good pictures to train, a good one and two defective ones to test


@pytest.fixture(scope="module")
def model():
    profile = get_profile("mini")
    return load_model(dataclasses.replace(profile, deltas=profile.deltas[:1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three products of data/mini with their text, and a chat file about two of the pictures."""
    folder = tmp_path_factory.mktemp("tadd")
    for product in PRODUCTS:
        shutil.copytree(MINI / product, folder / product)
    records = json.loads((MINI / "TADD_text.json").read_text())
    write_json(folder / "TADD_text.json", [r for r in records if r["image_name"].startswith(PRODUCTS)], indent=1)
    chat = [{"image_name": f"{product}/test/good/000", "conversation": turns(3)} for product in PRODUCTS[:2] * 2]
    write_json(folder / "chat.json", chat, indent=1)
    return folder


@pytest.fixture(scope="module")
def data(model, folder, tmp_path_factory):
    data = TrainingData(model, folder / "TADD_text.json", folder, chat=folder / "chat.json", chat_images=folder,
                        cache=tmp_path_factory.mktemp("cache"), variants=2)  # fmt: skip
    data.fill()
    return data


def turns(count: int, text: str = "What is it?") -> list[dict]:
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "A thing."}] * count


def write(folder: Path, records: list[dict]) -> Path:
    write_json(folder / "text.json", records, indent=1)
    return folder / "text.json"


# what an example is


def test_examples_are_what_the_files_say(model, folder, data):
    records = {r["image_name"]: r["conversation"] for r in json.loads((folder / "TADD_text.json").read_text())}
    rows = {row.image: row for row in index_folder(folder).rows}
    made = [index for index, item in enumerate(data.items) if item.masked and item.talks]
    assert len(made) == len(records) == 15
    for index in made:
        example = data.example(index, epoch=0)
        name = Path(example.key).relative_to(folder).as_posix()
        assert example.conversation == records[name] and example.product == rows[name].product
        mask = read_mask(folder / rows[name].mask) if rows[name].mask else np.zeros((224, 224), bool)
        assert ((example.seen.mask.numpy() > 127) == mask).all()
    image = folder / name
    expected = model.imagebind.encode_image(preprocess([read_image(image)], "squash"))
    check("feature cache: patches, half precision", example.seen.patches, expected.patches[0], rtol=1e-3)
    check("feature cache: embedding", example.seen.embedding, expected.embedding[0], rtol=1e-5)


def test_normal_pictures_are_good_ones_of_the_product_and_never_the_picture_itself(data, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        TrainingData, "_read", lambda self, picture: (drawn.append(picture), self.cache.read(picture))[1]
    )
    counts = Counter()
    for epoch in range(6):
        for index, item in enumerate(data.items):
            drawn.clear()
            example = data.example(index, epoch)
            picture, normals = drawn[0], drawn[1:]
            images = [normal.image for normal in normals]
            counts[len(images)] += item.masked
            assert len(example.normals) == len(images) and picture.image not in images
            for image in images:  # PRODUCT/train/good/NAME
                assert image.parts[-3:-1] == ("train", "good") and image.parts[-4] == item.product
            assert item.masked or not images
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 20  # 2 for 4, as there are not more


def test_anomalies_have_the_mask_and_the_words_of_what_was_drawn(data):
    anomalies = [index for index, item in enumerate(data.items) if not item.talks]
    assert len(anomalies) == 9 and all(len(data.items[index].pictures) == 2 for index in anomalies)
    yes = 0
    for index in anomalies:
        example = data.example(index, epoch=0)
        y, x = np.nonzero(example.seen.mask.numpy() > 0.3 * 255)
        boxes = np.array([defect["box"] for defect in example.seen.defects]).reshape(-1, 4)
        if len(boxes):
            yes += 1
            assert (boxes[:, :2].min(0) == (x.min(), y.min())).all()
            assert (boxes[:, 2:].max(0) == (x.max() + 1, y.max() + 1)).all()
            place = example.seen.defects[0]["place"]
            answers = " ".join(t["value"] for e in range(8) for t in data.example(index, e).conversation[1::2])
            assert place in answers
        else:
            assert not len(x)
        source = data.items[index].pictures[0]
        assert source.source != source.image and source.source.parts[-4:-1] == source.image.parts[-4:-3] + (
            "train",
            "good",
        )
    assert yes >= 6
    epochs = {data.example(anomalies[0], epoch).key for epoch in range(8)}
    assert len(epochs) == 2


def test_an_example_is_a_function_of_seed_epoch_and_index(model, folder, data):
    again = TrainingData(model, folder / "TADD_text.json", folder, chat=folder / "chat.json", chat_images=folder,
                         cache=data.cache.folder.parent, variants=2)  # fmt: skip
    other = TrainingData(model, folder / "TADD_text.json", folder, chat=folder / "chat.json", chat_images=folder,
                         cache=data.cache.folder.parent, variants=2, seed=1)  # fmt: skip

    def all_of(data, epoch):
        examples = (data.example(index, epoch) for index in reversed(range(len(data))))
        return [(e.key, e.conversation, [n.patches.sum().item() for n in e.normals]) for e in examples]

    assert all_of(data, 3) == all_of(again, 3)
    assert all_of(data, 3) != all_of(data, 4) and all_of(data, 3) != all_of(other, 3)


def test_each_epoch_sees_another_of_several_conversations(model, folder, tmp_path):
    for path in (folder / "nut").rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(folder))
    said = [turns(4, f"Question {number}?") for number in range(3)]
    text = write(tmp_path, [{"image_name": "nut/test/good/000.jpg", "conversation": talk} for talk in said])
    data = TrainingData(model, text, tmp_path, variants=0, turns=2, shots=(0,))
    talks = [data.example(0, epoch).conversation for epoch in range(20)]
    assert len(data) == 1 and all(talk in [other[:4] for other in said] for talk in talks)
    assert len({talk[0]["value"] for talk in talks}) == 3


# batches and their order


def test_batches_hold_the_examples_that_they_were_asked_for(data):
    order = data.order(0, 0, 4)
    for rows, batch in zip(order, data.batches(order, 0), strict=True):
        examples = [data.example(index, 0) for index in rows]
        assert batch.keys == [e.key for e in examples] and batch.conversations == [e.conversation for e in examples]
        assert batch.products == [e.product for e in examples]
        assert batch.features.patches.equal(torch.stack([e.seen.patches for e in examples]))
        for normals, example in zip(batch.normals or [None] * 4, examples, strict=True):
            wanted = torch.stack([n.patches for n in example.normals]) if example.normals else None
            assert normals is wanted is None or normals.equal(wanted)
        if batch.masks is None:
            assert batch.products == ["object"] * 4 and batch.normals is None
        else:
            assert batch.masks.equal(torch.stack([e.seen.mask for e in examples]) / 255)
    moved = batch.to("meta")
    assert moved.features.patches.device.type == "meta" and moved.keys == batch.keys


@pytest.fixture(scope="module")
def large(model, folder):
    """24 examples with masks and 100 of chat, of many lengths."""
    chat = [{"image_name": "nut/test/good/000.jpg", "conversation": turns(1 + i % 3, "why " * (i % 50))}
            for i in range(100)]  # fmt: skip
    return TrainingData(model, folder / "TADD_text.json", folder, chat=write(folder, chat), chat_images=folder)


def test_tadd_and_chat_alternate_and_every_batch_is_full(data, large):
    def kinds(data, batch):
        order = data.order(0, 0, batch)
        found = [{data.items[index].masked for index in rows} for rows in order]
        assert all(len(kind) == 1 for kind in found) and {len(rows) for rows in order} == {batch}
        return "".join("chat tadd".split()[kind.pop()][0] for kind in found)

    assert kinds(large, 4) == "tc" * 6  # as many of each, though there is more chat
    assert kinds(data, 4) == "tttcttt"  # all of TADD, and what chat there is
    assert [len(rows) for rows in data.order(0, 0, 100)] == [24, 4]  # less than a batch is all there is
    seen = Counter(index for epoch in range(20) for rows in large.order(epoch, 0, 5) for index in rows)
    assert len(seen) == 124  # what one epoch leaves, others see


def test_the_order_is_a_function_of_epoch_and_seed(large):
    assert large.order(1, 2, 4) == large.order(1, 2, 4)
    assert large.order(1, 2, 4) != large.order(1, 3, 4) and large.order(1, 2, 4) != large.order(2, 2, 4)
    indices = [index for rows in large.order(1, 2, 4) for index in rows]
    assert len(indices) == len(set(indices)) == 48


def test_batches_are_of_like_length(large, model):
    tokens = [len(model.language.tokenizer.encode(str(large.example(i, 0).conversation))) for i in range(len(large))]

    def padding(batches):
        return sum(max(tokens[i] for i in rows) * len(rows) for rows in batches) / sum(
            tokens[i] for r in batches for i in r
        )

    indices = [index for rows in large.order(0, 0, 4) for index in rows]
    shuffled = np.random.default_rng(0).permutation(indices).reshape(-1, 4)
    assert padding(large.order(0, 0, 4)) < 1.15 < 1.3 < padding(shuffled)


def test_one_is_started_ahead():
    started = []
    items = (started.append(i) or i for i in range(4))
    given = [(i, len(started)) for i in prefetched(items)]
    assert given == [(0, 2), (1, 3), (2, 4), (3, 4)] and list(prefetched([])) == []


# the cache


def test_without_a_cache_everything_is_the_same(model, folder, data):
    fly = TrainingData(
        model, folder / "TADD_text.json", folder, chat=folder / "chat.json", chat_images=folder, variants=2
    )
    rows = data.order(0, 0, 8)[0]
    (kept,), (made,) = data.batches([rows], 0), fly.batches([rows], 0)
    assert made.keys == kept.keys and made.conversations == kept.conversations and made.masks.equal(kept.masks)
    check("on the fly: patches", made.features.patches, kept.features.patches, rtol=2e-3)
    for a, b in zip(made.normals, kept.normals, strict=True):
        assert a is b is None or torch.allclose(a.float(), b.float(), atol=0.02)


def test_the_tower_sees_each_picture_once(model, folder, tmp_path, monkeypatch):
    seen = count_encoded(monkeypatch, model)
    text = folder / "TADD_text.json"
    first = TrainingData(model, text, folder, cache=tmp_path, variants=1)
    first.fill()
    assert sum(seen) == len(list(first.cache.folder.iterdir())) == 24  # 15 pictures, 9 anomalies
    TrainingData(model, text, folder, cache=tmp_path, variants=1, seed=5).fill()
    assert sum(seen) == 24
    TrainingData(model, text, folder, cache=tmp_path, variants=2).fill()
    assert sum(seen) == 33  # the second anomalies alone


def count_encoded(monkeypatch, model) -> list[int]:
    seen, encode = [], type(model.imagebind).encode_image

    def counting(self, images):
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(type(model.imagebind), "encode_image", counting)
    return seen


def test_a_file_belongs_to_bytes_mask_tower_and_crop(model, data, tmp_path):
    image, cache = tmp_path / "a.png", data.cache
    Image.new("RGB", (30, 20), "red").save(image)
    path = cache.path(PictureFile(image))
    shutil.copy(image, tmp_path / "b.png")
    assert cache.path(PictureFile(tmp_path / "b.png")) == path
    assert cache.path(PictureFile(image, mask=tmp_path / "b.png")) != path
    assert cache.path(PictureFile(image, source=image)) != path
    assert cache.path(PictureFile(image, source=image, number=1)) != cache.path(PictureFile(image, source=image))
    Image.new("RGB", (30, 20), "blue").save(image)
    assert cache_module.FeatureCache(cache.folder.parent, model).path(PictureFile(image)).name != path.name
    profile, qkv = model.profile, model.imagebind.modality_trunks["vision"].blocks[0].attn.in_proj_weight
    try:
        model.profile = dataclasses.replace(profile, fit="crop")
        assert cache_module.FeatureCache(tmp_path, model).folder.name != cache.folder.name
        model.profile = profile
        qkv.data[0, 0] *= -1
        del model.fingerprint
        assert cache_module.FeatureCache(tmp_path, model).folder.name != cache.folder.name
    finally:
        model.profile = profile
        qkv.data[0, 0] *= -1
        del model.fingerprint


FILL = """
import dataclasses, sys
from spgdd.loading import load_model
from spgdd.profiles import get_profile
from spgdd.training import cache
from spgdd.training.data import TrainingData
cache.BATCH = 2
profile = get_profile("mini")
model = load_model(dataclasses.replace(profile, deltas=profile.deltas[:1]))
print("start", flush=True)
TrainingData(model, sys.argv[1] + "/TADD_text.json", sys.argv[1], cache=sys.argv[2], variants=2).fill()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_fill_leaves_what_it_finished_and_goes_on_there(model, folder, data, tmp_path, monkeypatch):
    whole = {path.name: path.read_bytes() for path in data.cache.folder.iterdir()}
    kept, environment = [0], {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for files in (3, 15):  # is killed soon after so many are there
        command = [sys.executable, "-c", FILL, str(folder), str(tmp_path)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        while len(list(tmp_path.rglob("*.safetensors"))) < files and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept.append(len(list(tmp_path.rglob("*.safetensors"))))
    assert kept[0] < kept[1] < kept[2] < len(whole)
    seen = count_encoded(monkeypatch, model)
    again = TrainingData(model, folder / "TADD_text.json", folder, cache=tmp_path, variants=2)
    again.fill()
    assert sum(seen) == len(whole) - kept[2]
    for item in again.items:
        for picture in item.pictures:
            ours, theirs = again.cache.read(picture), data.cache.read(picture)
            assert ours.mask.equal(theirs.mask) and ours.defects == theirs.defects
            check("feature cache: after kills", ours.patches, theirs.patches, rtol=2e-3)


def test_ranks_share_the_work_and_all_find_everything(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "BATCH", 2)
    seen = count_encoded(monkeypatch, model)

    def fill(rank):
        data = TrainingData(model, folder / "TADD_text.json", folder, cache=tmp_path, variants=1)
        data.fill(rank, ranks=3)
        data.example(0, 0)
        complete.append(len(list(data.cache.folder.glob("*.safetensors"))))

    complete = []
    ranks = [threading.Thread(target=fill, args=(rank,)) for rank in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert complete == [24] * 3 and sum(seen) <= 24 + 3 * 4  # a rank's last two batches may be another's too


# what can be wrong


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "nut", tmp_path / "nut")
    records = [{"image_name": path.relative_to(tmp_path).as_posix(), "conversation": turns(1)}
               for path in sorted((tmp_path / "nut").glob("t*/*/*.jpg"))]  # fmt: skip
    return write(tmp_path, records)


def test_a_mask_of_another_size_is_named(model, folder, tmp_path):
    text = copied(folder, tmp_path)
    mask = next((tmp_path / "nut" / "ground_truth").rglob("*.png"))
    Image.open(mask).resize((100, 90)).save(mask)
    with pytest.raises(DataError, match=f"{mask.name}: 100 x 90 pixels, its image has 224 x 224. Replace it"):
        next(TrainingData(model, text, tmp_path).batches([range(5)], 0))
    mask.write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"{mask.name}: damaged"):
        TrainingData(model, text, tmp_path, cache=tmp_path / "cache").fill()


def test_missing_and_damaged_images_are_named(model, folder, tmp_path):
    text = copied(folder, tmp_path)
    image = tmp_path / "nut" / "test" / "good" / "000.jpg"
    image.write_bytes(image.read_bytes()[:3000])
    with pytest.raises(ImageError, match="test/good/000.jpg: damaged"):
        TrainingData(model, text, tmp_path, cache=tmp_path / "cache").fill()
    image.unlink()
    with pytest.raises(DataError, match="1 of 5 images .* not below .*, for example 'nut/test/good/000.jpg'"):
        TrainingData(model, text, tmp_path)


def test_an_image_that_vanishes_is_named(model, folder, tmp_path):
    data = TrainingData(model, copied(folder, tmp_path), tmp_path, cache=tmp_path / "cache")
    (tmp_path / "nut" / "test" / "good" / "000.jpg").unlink()
    with pytest.raises(DataError, match="test/good/000.jpg cannot be read"):
        data.fill()


def test_empty_conversations_and_nothing_at_all_are_refused(model, folder, tmp_path):
    text = copied(folder, tmp_path)
    records = json.loads(text.read_text())
    records[2]["conversation"] = []
    with pytest.raises(DataError, match="record 2: a conversation is human, gpt"):
        TrainingData(model, write(tmp_path, records), tmp_path)
    with pytest.raises(DataError, match="nothing to train on"):
        TrainingData(model)
    with pytest.raises(DataError, match="--image_root_path"):
        TrainingData(model, text)


def test_a_product_without_normal_pictures_is_compared_with_words(model, folder, tmp_path):
    text = copied(folder, tmp_path)
    for good in (tmp_path / "nut").glob("t*/good"):
        shutil.rmtree(good)
    records = [r for r in json.loads(text.read_text()) if "/good/" not in r["image_name"]]
    data = TrainingData(model, write(tmp_path, records), tmp_path, shots=(4,))
    batch = next(data.batches([range(len(data))], 0))
    assert len(data) == 2 and batch.normals is None and batch.masks.amax((1, 2)).tolist() == [1, 1]


def test_a_cache_that_cannot_be_is_explained(data, folder, model, tmp_path, monkeypatch):
    unfilled = TrainingData(model, folder / "TADD_text.json", folder, cache=tmp_path)
    with pytest.raises(DataError, match="not in the feature cache .* fill it first"):
        unfilled.example(0, 0)
    picture = data.items[0].pictures[0]
    path, content = data.cache.path(picture), data.cache.path(picture).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = [content[:length] for length in (0, 5, 8, 60, header, header + 1000, len(content) - 1)]  # cut off
    damaged += [content + b"x", content.replace(b'"mask"', b'"mark"'), content.replace(b"F16", b"F32"),
                b"\xff" * len(content), content[:8] + b"[" * (len(content) - 8)]  # fmt: skip
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(DataError, match="is damaged .* Delete it and start again"):
            data.cache.read(picture)
    path.write_bytes(content)
    seen, tensors = data.cache.read(picture), load_file(path)
    assert all(torch.equal(getattr(seen, name), value) for name, value in tensors.items()) and len(tensors) == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(SpgddError, match=r"0.0 GB are needed in .*, 0.0 GB are free.*or train without a cache"):
        unfilled.fill()


def test_images_outside_of_known_layouts_are_objects(model, folder, tmp_path):
    text = copied(folder, tmp_path)
    Image.new("RGB", (50, 40), "grey").save(tmp_path / "loose.png")
    records = [*json.loads(text.read_text()), {"image_name": "loose.png", "conversation": turns(1)}]
    data = TrainingData(model, write(tmp_path, records), tmp_path, variants=0)
    example = data.example(len(data) - 1, 0)
    assert (example.product, example.masked, example.normals) == ("object", False, [])


def test_real_photographs(model, real_data, tmp_path):
    subsets = ("MT", "CFD", "MVTec_screw")
    index = index_folder(real_data, check=False)
    rows = [[row for row in index.rows if row.subset == subset or row.product == subset] for subset in subsets]
    few = [[r for r in those if r.mask][:2] + [r for r in those if not r.mask][:2] for those in rows]
    assert [len(those) for those in few] == [4, 4, 4]
    records = describe(Index(index.folder, sum(few, []), []))
    data = TrainingData(model, write(tmp_path, records), real_data, shots=(1,), variants=1)
    assert len(data) == 18 and {"magnetic tile", "road surface", "screw"} == {item.product for item in data.items}
    (batch,) = data.batches([range(18)], 0)
    assert [len(one) for one in batch.normals] == [1] * 18 and batch.features.patches.isfinite().all()
    for mask, key in zip(batch.masks, batch.keys, strict=True):
        if "anomaly" not in key:
            assert (mask.max() > 0) == ("good" not in key), key
