"""What mini answers and how a small network learns stay as they were recorded, whatever is rearranged inside.

    python tests/test_frozen.py    # records anew, for a change that is meant: its message says what changed
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

import spgdd
from conftest import FIXTURES, ROOT
from spgdd.evaluation.protocol import evaluate, folder_tasks
from spgdd.tensors import read_tensors
from spgdd.training.loop import train
from tiny_training import TinyData, settings, tiny_model

RECORD = FIXTURES / "frozen.json"
QUERIES = ("gear/test/stain/000", "weave/test/hole/000", "screw/test/good/000", "pill/test/thread/000",
           "circuit_board/test/glue/000", "wood/test/burn/000")  # fmt: skip
NORMALS = 0, 1, 2  # data/mini has two good pictures a product; a third one is its good test picture
STEP = 32  # pixels between the map values that are kept


def diagnoses() -> dict[str, dict]:
    """Of each query with each number of normal pictures and of tiles: all that its JSON says, and some map values."""
    diagnoser, found = spgdd.load("mini", device="cpu"), {}
    for query in QUERIES:
        product = query.split("/")[0]
        folder = ROOT / "data/mini" / product
        good = [folder / "train/good/000.jpg", folder / "train/good/001.jpg", folder / "test/good/000.jpg"]
        for count in NORMALS:
            for tiles in (1, 2):
                done = diagnoser.diagnose(
                    ROOT / f"data/mini/{query}.jpg", good[:count] or None, product.replace("_", " "), tiles=tiles
                )
                values = done.square_map[::STEP, ::STEP].ravel().tolist()
                known = done.ask("What kind of defect is it?").to_dict() | {"values": [round(v, 7) for v in values]}
                del known["image"]
                found[f"{query} normals {count} tiles {tiles}"] = known
    return found


def scores() -> dict[str, float]:
    """Of pictures of data/mini, evaluated with one and two normal pictures."""
    tasks = folder_tasks(ROOT / "data/mini", ["gear", "weave", "ring", "concrete"])
    runs = evaluate(spgdd.load("mini", device="cpu"), tasks, (0, 1, 2), (0,), text=False, progress=False)
    return {f"{p['picture']} normals {run['shots']}": p["score"] for run in runs for p in run["pictures"]}


def learning() -> dict[str, list[float]]:
    """The losses of 20 steps of a network of a few thousand parameters, and a norm of each tensor of its delta."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options = settings(steps=20, checkpointing=False, lora_dropout=0.1)
        lines = train(tiny_model(), TinyData(), options, folder)
        delta = read_tensors(Path(folder) / "delta.safetensors")
        norms = {name: value.double().norm().item() for name, value in delta.items()}
    return {"losses": [line["loss"] for line in lines], "norms": [norms[name] for name in sorted(norms)]}


def same(found, recorded, tolerance: float = 2e-4):  # other processors round otherwise
    """Whether texts and counts are equal and numbers within the tolerance, however deep they lie."""
    if isinstance(recorded, dict):
        return found.keys() == recorded.keys() and all(same(found[k], recorded[k], tolerance) for k in recorded)
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(same(*pair, tolerance) for pair in zip(found, recorded, strict=True))
    if isinstance(recorded, float):
        return found == pytest.approx(recorded, abs=tolerance)
    return found == recorded


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_every_diagnosis_is_as_recorded(recorded):
    found = diagnoses()
    assert found.keys() == recorded["diagnoses"].keys()
    for case, known in recorded["diagnoses"].items():
        for name, value in known.items():
            assert same(found[case][name], value), f"{case}: {name} was {value}, is {found[case][name]}"


def test_every_score_of_an_evaluation_is_as_recorded(recorded):
    assert same(scores(), recorded["scores"])


def test_a_small_training_takes_the_recorded_course(recorded):
    found = learning()
    assert same(found["losses"], recorded["learning"]["losses"], 2e-5), found["losses"]
    assert same(found["norms"], recorded["learning"]["norms"], 2e-4)


if __name__ == "__main__":
    table = {"diagnoses": diagnoses(), "scores": scores(), "learning": learning()}
    RECORD.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
