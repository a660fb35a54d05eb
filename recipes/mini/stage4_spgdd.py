"""Train all that speaks of SPGDD's maps on the mini world, from stage 3 on: what notebook 05 does, longer.

The maps are made beforehand, as a diagnosis makes them: of half of the products from the whole picture alone, of the
others from joint tiles too. What makes them is not trained here: stage 1 has trained it longer, and fit_comparison.py
has set the rest. Whether there is a defect, and where, is learned from the map alone; what it is, from patches and
memory.

python recipes/mini/stage4_spgdd.py --out runs/mini
python recipes/mini/stage4_spgdd.py --out runs/mini/e --start runs/mini --seed 10 --lr 5e-4

The second form goes on from a run, with other products.
"""

import argparse
import random
import shutil
from functools import partial
from pathlib import Path

import torch

from pool import TRAIN_TYPES
from spgdd.data.words import conversation
from spgdd.language.conversation import fold_history
from spgdd.model import SPGDD
from spgdd.profiles import LANGUAGE_PARTS, SPGDD_PARTS, Delta
from spgdd.training.data import Batch
from spgdd.training.loop import train
from spgdd.training.objective import TrainingLoss
from spgdd.training.settings import load_settings
from worlds import Diagnosed, bare_model

FROM_MAPS = ("verdict", "all_good", "where", "count", "more_than_one", "at_place", "size")  # topics that a map decides
FROM_PATCHES = ("describe", "kind", "has_kind")
VERDICT_KNOWN = 0.8  # of the conversations about patches


def conversation_about(sample: dict, rng: random.Random, foreign_patches: bool, turns: int) -> list[dict]:
    """Questions with answers; where patches and memory tell of another picture, what the map decides, without kinds.

    Where they tell of this one, mostly a verdict is part of the first question, so that nothing is learned of it: it
    shall not lean on patches, whose look changes from the generated world to photographs more than that of maps.
    """
    plain = sample | {"defects": [defect | {"type": "defect"} for defect in sample["defects"]]}
    if foreign_patches:
        topics = rng.sample(FROM_MAPS, len(FROM_MAPS))
        if rng.random() < 0.7:
            topics.insert(0, "verdict")
        return conversation(plain, rng, min(turns, len(FROM_MAPS)), TRAIN_TYPES, topics)
    first = rng.choice(FROM_PATCHES)
    if rng.random() > VERDICT_KNOWN:
        return conversation(sample, rng, turns, TRAIN_TYPES, (first,))
    seed = rng.random()  # one conversation, told twice: the verdict without the kind
    asked, verdict = conversation(plain, random.Random(seed), 1, TRAIN_TYPES, ("verdict",))
    question, *rest = conversation(sample, random.Random(seed), turns + 1, TRAIN_TYPES, ("verdict", first))[2:]
    folded = fold_history([(asked["value"], verdict["value"])], question["value"])
    return [question | {"value": folded}, *rest]


def language_loss(model: SPGDD, batch: Batch, max_length: int) -> TrainingLoss:
    """Of answers about given maps (B, 224, 224), which are in the place of masks."""
    entries = None if batch.normals[0] is None else torch.stack(batch.normals).float()  # (B, M, D)
    prompts = model.prompt_tokens(batch.masks[:, None], batch.features.patches, entries)
    said = model.language.forward_loss(batch.features.embedding, batch.conversations, prompts, max_length)
    return TrainingLoss(said.loss, said.loss, {}, said.token_accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=3000, help="nine pictures of each, 17 MB")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5, help="questions of a conversation")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=4, help="of the products, and of what begins at random")
    parser.add_argument("--start", type=Path, help="folder of the run to go on from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    deltas = [Delta("pandagpt_delta.safetensors", LANGUAGE_PARTS, "stage 3")]
    if args.start:
        deltas.append(Delta("delta.safetensors", (*LANGUAGE_PARTS, *SPGDD_PARTS), "stage 4"))
    model = bare_model(args.start or args.out, tuple(deltas))
    how = {"shots": (0, 1, 1, 2, 4), "tiled": 0.5, "foreign_vector": 0.3, "foreign_patches": 0.5}
    pictures = Diagnosed(model, args.products, args.seed, partial(conversation_about, turns=args.turns), **how)
    options = {"steps": args.steps, "batch": args.batch, "learning_rate": args.lr}
    settings = load_settings(Path(__file__).with_name("language.yaml"), **options)
    train(model, pictures, settings, args.out / "stage4", objective=language_loss, resume=True)
    shutil.copyfile(args.out / "stage4" / "delta.safetensors", args.out / "delta.safetensors")


if __name__ == "__main__":
    main()
