"""Let the mini language model see, as PandaGPT does: LoRA and the image projection, from the image vector alone.

python recipes/mini/stage3_align.py --out runs/mini
"""

import argparse
from pathlib import Path

import torch
from talk import bare_model, look, train, verdict_accuracy

from spgdd.weights.delta import save_delta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=0.8)
    parser.add_argument("--products", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bare_model(args.out, device)
    talk = look(model, args.products, seed=100)
    with (args.out / "stage3.jsonl").open("w") as log:
        train(
            model,
            talk,
            [model.language.llama_proj],
            args.minutes,
            tokens=False,
            lr=1e-3,
            batch=args.batch,
            seed=3,
            log=log,
        )
    print(f"verdict right on training families: {verdict_accuracy(model, talk, 200, tokens=False)[0]:.3f}")
    save_delta(model.language, args.out / "pandagpt_delta.safetensors", {"stage": "PandaGPT-like alignment"})


if __name__ == "__main__":
    main()
