"""Let the mini language model see, as PandaGPT does: LoRA and the image projection, from the image vector alone.

As PandaGPT's, its lessons are about what a picture shows, and not about defects.

python recipes/mini/stage3_align.py --out runs/mini
"""

import argparse
from pathlib import Path

import torch

import appearance
from spgdd.model import SPGDD
from spgdd.training.data import Batch
from spgdd.training.loop import train
from spgdd.training.objective import TrainingLoss
from spgdd.training.settings import load_settings
from spgdd.weights.delta import save_delta
from worlds import World, bare_model


def language_loss(model: SPGDD, batch: Batch, max_length: int) -> TrainingLoss:
    """Of answers without map and prompt tokens."""
    said = model.language.forward_loss(batch.features.embedding, batch.conversations, max_length=max_length)
    return TrainingLoss(said.loss, said.loss, {}, said.token_accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=2000, help="nine pictures of each, 5 MB")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(3)
    model = bare_model(args.out)
    pictures = World(model, args.products, 3, appearance.conversation)
    settings = load_settings(Path(__file__).with_name("language.yaml"), steps=args.steps, batch=args.batch)
    train(model, pictures, settings, args.out / "stage3", objective=language_loss, resume=True)
    save_delta(model.language, args.out / "pandagpt_delta.safetensors", {"stage": "PandaGPT-like alignment"})


if __name__ == "__main__":
    main()
