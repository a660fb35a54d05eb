"""Train all that is SPGDD's own on the mini world, from stage 3 on: what notebook 05 does, longer.

python recipes/mini/stage4_spgdd.py --out runs/mini
"""

import argparse
import shutil
from pathlib import Path

import torch
from talk import bare_model, data, drawn

from spgdd.profiles import LANGUAGE_PARTS, Delta
from spgdd.training.loop import train
from spgdd.training.settings import load_settings

MAPS = "image_decoder.", "memory.", "abnormal_prompts.", "comparison.steepness", "comparison.trust"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=700, help="eight pictures each")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2, help="questions of a conversation: few, and a Yes or No counts")
    args = parser.parse_args()
    torch.manual_seed(4)
    model = bare_model(args.out, (Delta("pandagpt_delta.safetensors", LANGUAGE_PARTS, "stage 3"),))
    for name, parameter in model.named_parameters():
        if name.startswith(MAPS):  # stage 1 has trained them longer
            parameter.register_hook(torch.zeros_like)
    pictures = data(model, drawn(args.out / "world4", args.products, 4), shots=(0, 1, 1, 2, 4), turns=args.turns)
    unseen = data(model, drawn(args.out / "unseen", 64, 5, held_out=True), shots=(1,), turns=1)
    settings = load_settings(Path(__file__).with_name("language.yaml"), steps=args.steps, batch=args.batch)
    train(model, pictures, settings, args.out / "stage4", held_out=unseen, resume=True)
    shutil.copyfile(args.out / "stage4" / "delta.safetensors", args.out / "delta.safetensors")


if __name__ == "__main__":
    main()
