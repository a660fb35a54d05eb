"""What stages 3 and 4 share: the model as far as it is trained, and a mini world to talk about."""

import dataclasses
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from spgdd.loading import load_model
from spgdd.model import SPGDD
from spgdd.profiles import SPGDD_PARTS, Delta, get_profile
from spgdd.tadd.miniworld import write_world
from spgdd.training.data import TrainingData
from spgdd.weights.checkpoint import read_tensors
from spgdd.weights.delta import apply_delta


def bare_model(folder: Path, deltas: tuple[Delta, ...] = ()) -> SPGDD:
    """The mini model of a run folder: ImageBind and maps of stage 1, language model of stage 2, given deltas."""
    mini = get_profile("mini")
    files = {
        name: getattr(mini, name).removeprefix("mini/") for name in ("imagebind_file", "text_tokenizer", "language")
    }
    model = load_model(dataclasses.replace(mini, **files, deltas=deltas), folder)
    maps = read_tensors(folder / "maps.safetensors")
    apply_delta(model, {name: value for name, value in maps.items() if name.startswith(SPGDD_PARTS)},
                ("image_decoder.", "memory.", "comparison."))  # fmt: skip
    return model


def drawn(folder: Path, products: int, seed: int, held_out: bool = False) -> Path:
    """A mini world of many products, drawn by all processors at once, with one TADD_text.json; once."""
    if (folder / "TADD_text.json").exists():
        return folder
    parts = max(1, min(products // 8, os.cpu_count() // 2))
    with ProcessPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        work = [
            pool.submit(write_world, folder / f"part{i}", products // parts, seed * 1000 + i, (), held_out)
            for i in range(parts)
        ]
        records = [
            record | {"image_name": f"part{i}/{record['image_name']}"}
            for i, done in enumerate(work)
            for record in done.result()
        ]
    (folder / "TADD_text.json").write_text(json.dumps(records))
    return folder


def data(model: SPGDD, folder: Path, shots: tuple[int, ...], turns: int | None = None) -> TrainingData:
    """A drawn world with the features of its pictures."""
    text, cache = folder / "TADD_text.json", folder / "features"
    found = TrainingData(model, text, folder, cache=cache, variants=0, shots=shots, turns=turns)
    found.fill()
    return found
