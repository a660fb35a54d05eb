"""Nothing damaged passes into a training run, nothing finished is lost: files, presets, folders, disks."""

import copy
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT
from spgdd.errors import DataError, SpgddError
from spgdd.imagebind import ImageFeatures
from spgdd.tensors import write_tensors
from spgdd.training import checkpoint
from spgdd.training.data import TrainingData
from spgdd.training.loop import train
from spgdd.training.settings import OPTIONS, PRESETS, TrainingSettings, load_settings
from test_training import delta, furthest, losses, one_thread  # noqa: F401
from test_training_data import data, folder, model, turns, write  # noqa: F401
from tiny_training import TinyData, settings, tiny_model

MUTATIONS = 200


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One change of a file: bits, bytes, cuts, insertions, repetitions; half of them in its first 600 bytes."""
    place = rng.randrange(min(600, len(content)) if rng.random() < 0.5 else len(content))
    length = rng.choice((1, 2, 4, 64))
    bit = bytes([content[place] ^ 1 << rng.randrange(8)])
    return rng.choice((
        lambda: content[:place] + bit + content[place + 1 :],
        lambda: content[:place] + rng.randbytes(length) + content[place + length :],
        lambda: content[:place] + content[place + length :],
        lambda: content[:place] + rng.randbytes(length) + content[place:],
        lambda: content[:place],
        lambda: content + rng.randbytes(length),
        lambda: content[:place] + b"9" + content[place + 1 :],
    ))()  # fmt: skip


def damaged(rng: random.Random, files: list[Path]) -> Iterator[tuple[Path, bytes]]:
    """One file after another with one change, with what it held; it is as before when the next one comes."""
    for _ in range(MUTATIONS):
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(mutated(content, rng))
        yield path, content
        path.write_bytes(content)


def test_a_damaged_file_of_the_feature_cache_is_refused(data):  # noqa: F811
    pictures, refused = {data.cache.path(item.pictures[0]): item.pictures[0] for item in data.items}, 0
    for path, content in damaged(random.Random(0), list(pictures)):
        try:
            data.cache.read(pictures[path])
            assert path.read_bytes() == content
        except DataError as error:
            assert "is damaged" in str(error) and "Delete it and start again" in str(error)
            refused += 1
    assert refused > 0.95 * MUTATIONS


def test_a_damaged_checkpoint_is_refused(tmp_path):
    train(tiny_model(), TinyData(), settings(epochs=1, steps=2), tmp_path)
    (path,), refused = checkpoint.every(tmp_path / "checkpoints"), 0
    whole = checkpoint.load(path)
    for _ in damaged(random.Random(0), [path / name for name in checkpoint.FILES.values()]):
        try:
            state, position = checkpoint.load(path)
            assert position == whole[1]
            for kind, values in whole[0].items():
                assert all(torch.equal(state[kind][name], value) for name, value in values.items())
        except SpgddError as error:
            assert "damaged" in str(error) and "--resume" in str(error)
            refused += 1
    assert refused > 0.95 * MUTATIONS


WRONG = (None, [], {}, "", "nan", 1e400, -1, 10**400, True, [[]], {"a": None}, "no")


def test_a_damaged_preset_is_refused_in_words_or_gives_settings_within_their_limits(tmp_path):
    rng, preset, zero, refused = random.Random(0), tmp_path / "mine.yaml", tmp_path / "mine.json", 0
    whole = yaml.safe_load((PRESETS / "recommended.yaml").read_text())
    zero.write_text(json.dumps(whole["deepspeed"]))
    shutil.copy(PRESETS / "recommended.yaml", preset)

    def put(content: dict) -> None:
        """Another value, or a key more, at some place of it."""
        within = [value for value in content.values() if isinstance(value, dict) and value]
        if within and rng.random() < 0.5:
            return put(rng.choice(within))
        content[rng.choice([*content, *content, "more", 7, None, True, 1.5])] = rng.choice(WRONG)

    def check() -> int:
        """1 if the settings are refused."""
        try:
            found = load_settings(preset, rng.choice([None, zero]))
        except SpgddError as error:
            assert str(error).startswith(("These settings cannot be used.", str(tmp_path / "mine")))
            return 1
        assert isinstance(found, TrainingSettings)
        for name, field in OPTIONS.items():
            value = getattr(found, name)
            assert type(value) is field.type or value is None is field.default, name
            if field.type in (int, float):
                assert 0 <= value < float("inf"), name
        return 0

    for _ in damaged(rng, [preset, zero]):
        refused += check()
    for _ in range(MUTATIONS):
        put(content := copy.deepcopy(whole))
        preset.write_text(yaml.safe_dump(content))
        refused += check()
    assert refused > 2 * MUTATIONS / 3


HOLD = """
import sys
from pathlib import Path
from spgdd.files import claimed
with claimed(Path(sys.argv[1]), 0):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_folder_in_use_is_refused_with_the_process_named_and_free_when_that_is_dead(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    options = settings(epochs=1, steps=2)
    with pytest.raises(SpgddError, match=f"in use by process {holder.pid} on .*choose another folder"):
        train(tiny_model(), TinyData(), options, tmp_path)
    assert not (tmp_path / "train.jsonl").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    train(tiny_model(), TinyData(), options, tmp_path)
    assert not (tmp_path / ".owner").exists()


class Other(TinyData):
    digest = "of other data"


def test_other_data_of_equal_number_do_not_resume_a_run(tmp_path):
    train(tiny_model(), TinyData(), settings(epochs=1, steps=2), tmp_path)
    with pytest.raises(SpgddError, match="another run: other data of equal number"):
        train(tiny_model(), Other(), settings(epochs=1, steps=2), tmp_path, resume=True)


def test_the_digest_of_data_is_of_all_that_examples_follow_from(model, folder, tmp_path):  # noqa: F811
    def digest(root=folder, text=None, **options):
        options = {"variants": 2, "shots": (0, 1), "turns": 2, "seed": 1} | options
        return TrainingData(model, text or root / "TADD_text.json", root, **options).digest

    shutil.copytree(folder, tmp_path / "moved")
    known = digest()
    assert known == digest() == digest(tmp_path / "moved")
    records = json.loads((folder / "TADD_text.json").read_text())
    records[3]["conversation"] = turns(1, "Another question?")
    text = write(tmp_path, records)
    others = [digest(variants=3), digest(shots=(0, 2)), digest(turns=1), digest(seed=2), digest(text=text)]
    assert len({known, *others}) == 6


def test_room_and_rights_are_asked_for_at_the_start(tmp_path, monkeypatch, data, model, folder):  # noqa: F811
    (tmp_path / "file").touch()
    with pytest.raises(SpgddError, match="file.*cannot be made .*Choose another folder"):
        train(tiny_model(), TinyData(), settings(epochs=1), tmp_path / "file")
    with pytest.raises(SpgddError, match="cannot be made .*Choose another folder"):
        TrainingData(model, folder / "TADD_text.json", folder, cache=tmp_path / "file").fill()
    unfilled = TrainingData(model, folder / "TADD_text.json", folder, cache=tmp_path / "cache")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SpgddError, match="cannot be written to.*or train without a cache"):
        unfilled.fill()
    data.fill()  # a complete one may be read-only
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(SpgddError, match=r"0.0 GB are needed in .*, 0.0 GB are free"):
        train(tiny_model(), TinyData(), settings(epochs=1), tmp_path / "run")


def test_a_full_disk_ends_a_run_in_words_and_what_is_finished_is_kept(tmp_path, monkeypatch):
    options, left = settings(epochs=1, save_every=2), [7]  # files that there is room for: two checkpoints and a bit

    def full(path, *content):
        left[0] -= 1
        if left[0] < 0:
            raise SpgddError(f"{path}: cannot be written (No space left on device).")
        return write_tensors(path, *content)

    whole = train(tiny_model(), TinyData(), options, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(SpgddError, match="cannot be written.*Kept in .*: step-00000002, step-00000004"):
            train(tiny_model(), TinyData(), options, tmp_path / "full")
    assert not list((tmp_path / "full/checkpoints").glob("*.part"))
    again = train(tiny_model(), TinyData(), options, tmp_path / "full", resume=True)
    assert losses(again) == losses(whole)
    assert furthest(delta(tmp_path / "full"), delta(tmp_path / "whole")) == 0.0


def test_features_that_are_not_finite_are_not_kept(model, folder, tmp_path, monkeypatch):  # noqa: F811
    encode = type(model.imagebind).encode_image

    def broken(self, images):
        embedding, patches = encode(self, images)
        patches[0, 0, 0, 0] = torch.nan
        return ImageFeatures(embedding, patches)

    monkeypatch.setattr(type(model.imagebind), "encode_image", broken)
    unfilled = TrainingData(model, folder / "TADD_text.json", folder, cache=tmp_path)
    with pytest.raises(DataError, match=r"vision tower makes of .*\.jpg is not finite"):
        unfilled.fill()
    assert len(list(tmp_path.rglob("*.safetensors"))) < 24
