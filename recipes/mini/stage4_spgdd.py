"""Teach the mini model to read the anomaly map: LoRA, projection, prompt learner and focus tokens together.

python recipes/mini/stage4_spgdd.py --out runs/mini
"""

import argparse
from pathlib import Path

import torch
from pool import TRAIN_TYPES
from talk import bare_model, look, train, verdict_accuracy

from spgdd.profiles import LANGUAGE_PARTS, Delta
from spgdd.tadd.miniworld.world import HELD_OUT_FAMILIES
from spgdd.weights.delta import save_delta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--products", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = Delta("pandagpt_delta.safetensors", LANGUAGE_PARTS, "stage 3")
    model = bare_model(args.out, device, [start])
    talk = look(model, args.products, seed=200)
    modules = [model.language.llama_proj, model.prompt_learner, model.focus]
    with (args.out / "stage4.jsonl").open("w") as log:
        train(model, talk, modules, args.minutes, tokens=True, lr=1e-3, batch=args.batch, seed=4, log=log)
    fresh = look(
        model,
        128 if device.type == "cuda" else 8,
        seed=300,
        families=HELD_OUT_FAMILIES,
        types=TRAIN_TYPES,
        chunk=8,
    )
    for name, data in (("training", talk), ("held-out", fresh)):
        for few in (True, False):
            share, pairs = verdict_accuracy(model, data, 300, tokens=True, few=few)
            print(f"verdict right on {name} families, {'few' if few else 'zero'}-shot: {share:.3f}")
    for sample, text in pairs[:12]:
        print([(d["type"], d["place"]) for d in sample["defects"]], "->", text)
    for module in (model.image_decoder, model.memory):
        module.requires_grad_(True)  # they belong to the delta
    save_delta(model, args.out / "delta.safetensors", {"stage": "SPGDD"})


if __name__ == "__main__":
    main()
