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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=4000, help="eight pictures each")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=96)
    args = parser.parse_args()
    torch.manual_seed(4)
    model = bare_model(args.out, (Delta("pandagpt_delta.safetensors", LANGUAGE_PARTS, "stage 3"),))
    pictures = data(model, drawn(args.out / "world4", args.products, 4), shots=(0, 1, 1, 2, 4))
    unseen = data(model, drawn(args.out / "unseen", 64, 5, held_out=True), shots=(1,))
    settings = load_settings(Path(__file__).with_name("language.yaml"), steps=args.steps, batch=args.batch)
    train(model, pictures, settings, args.out / "stage4", held_out=unseen, resume=True)
    shutil.copyfile(args.out / "stage4" / "delta.safetensors", args.out / "delta.safetensors")


if __name__ == "__main__":
    main()
