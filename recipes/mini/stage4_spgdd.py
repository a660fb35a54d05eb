"""Train all that is SPGDD's own on the mini world, from stage 3 on: what notebook 05 does, longer.

python recipes/mini/stage4_spgdd.py --out runs/mini
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import torch
from pool import TRAIN_TYPES
from talk import World, bare_model

from spgdd.profiles import LANGUAGE_PARTS, Delta
from spgdd.tadd.miniworld import HELD_OUT_FAMILIES
from spgdd.tadd.words import conversation
from spgdd.training.loop import train
from spgdd.training.settings import load_settings

MAPS = (
    "image_decoder.", "memory.", "abnormal_prompts.", "comparison.steepness", "comparison.trust", "comparison.doubling",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=4000, help="eight pictures of each, 4 MB")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3, help="questions of a conversation")
    args = parser.parse_args()
    torch.manual_seed(4)
    model = bare_model(args.out, (Delta("pandagpt_delta.safetensors", LANGUAGE_PARTS, "stage 3"),))
    for name, parameter in model.named_parameters():
        if name.startswith(MAPS):  # stage 1 has trained them longer, or settle.py has set them
            parameter.register_hook(torch.zeros_like)
    talk = partial(conversation, kinds=TRAIN_TYPES)
    pictures = World(model, args.products, 4, partial(talk, turns=args.turns), shots=(0, 1, 1, 2, 3), stray=0.3)
    first = partial(talk, turns=1, first=("verdict",))
    unseen = World(model, 64, 5, first, shots=(1,), families=HELD_OUT_FAMILIES)
    settings = load_settings(Path(__file__).with_name("language.yaml"), steps=args.steps, batch=args.batch)
    train(model, pictures, settings, args.out / "stage4", held_out=unseen, resume=True)
    shutil.copyfile(args.out / "stage4" / "delta.safetensors", args.out / "delta.safetensors")


if __name__ == "__main__":
    main()
