"""Train mini as notebook 05 does, and measure what the text says about held-out families before and after.

    OMP_NUM_THREADS=2 python benchmarks/train_mini.py       # about five minutes on two CPU cores
    python benchmarks/train_mini.py --learning_rate 2e-3    # any setting of a training run

From the PandaGPT-like start: language model and image vector alone; maps, prompt learner and tokens are untrained.
Prints the time of every part and the share of right verdicts on good and on defective pictures.
"""

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from sklearn.metrics import roc_auc_score

from miniworld import write_world
from spgdd.agreement import says_defective
from spgdd.data.words import default_question
from spgdd.loading import load_model
from spgdd.profiles import get_profile
from spgdd.training.data import TrainingData
from spgdd.training.loop import train
from spgdd.training.settings import load_settings
from spgdd.training.validation import answers


@contextlib.contextmanager
def stage(name: str):
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    print(f"{name:<24}{time.perf_counter() - wall:6.1f} s, {time.process_time() - cpu:6.1f} s of CPU", flush=True)


def verdicts(model, data: TrainingData) -> dict[str, float]:
    """Shares of right verdicts and of answers without one to "Is there any anomaly in the image?", and Yes's AUROC."""
    said, sure, truth = [], [], []
    rows = range(len(data))
    for batch in data.batches([rows[i : i + 40] for i in range(0, len(rows), 40)], epoch=0):
        found = answers(model, batch, [default_question(product) for product in batch.products])
        said += [says_defective(answer.text) for answer in found]
        sure += [answer.yes for answer in found]
        truth += (batch.masks.amax((1, 2)) > 0).tolist()
    right = {flag: [s is flag for s, t in zip(said, truth, strict=True) if t is flag] for flag in (True, False)}
    good, defective = (sum(right[flag]) / len(right[flag]) for flag in (False, True))
    return {
        "pictures": len(said), "all": (sum(right[True]) + sum(right[False])) / len(said), "good": good,
        "defective": defective, "balanced": (good + defective) / 2, "no verdict": said.count(None) / len(said),
        "AUROC": roc_auc_score(truth, sure),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--products", type=int, default=150, help="to train on, 8 pictures each")
    add("--held-out", type=int, default=30, help="products of held-out families, 8 pictures each")
    add("--shots", type=int, nargs="+", default=[1, 2, 4])
    add("--turns", type=int, default=1, help="questions of a conversation")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, help="keeps what is drawn, encoded and trained (default: a temporary folder)")
    arguments, rest = parser.parse_known_args()
    options = dict(zip((name.removeprefix("--") for name in rest[::2]), map(json.loads, rest[1::2]), strict=True))
    settings = load_settings("workshop", **options)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        with stage("draw"):
            write_world(folder / "train", arguments.products, arguments.seed)
            write_world(folder / "held_out", arguments.held_out, arguments.seed + 1, held_out=True)
        with stage("load"):
            profile = get_profile("mini")
            model = load_model(dataclasses.replace(profile, deltas=profile.deltas[:1]))
        data, held_out = (
            TrainingData(
                model, folder / name / "TADD_text.json", folder / name, cache=folder / "cache", variants=0, shots=shots,
                turns=arguments.turns,
            )
            for name, shots in (("train", arguments.shots), ("held_out", [2]))
        )  # fmt: skip
        with stage("fill the cache"):
            data.fill()
            held_out.fill()
        with stage("verdicts before"):
            before = verdicts(model, held_out)
        with stage("train"):
            train(model, data, settings, folder / "run")
        with stage("verdicts after"):
            after = verdicts(model, held_out)
    print(f"{time.perf_counter() - started:.0f} s in all; on held-out families, in percent:")
    for name, found in (("before", before), ("after", after)):
        shares = ", ".join(f"{what} {100 * share:.1f}" for what, share in found.items() if what != "pictures")
        print(f"{name:<8}{found['pictures']} pictures: {shares}")


if __name__ == "__main__":
    main()
