"""Gather the four stages' results, in half precision, as the weights that ship.

python recipes/mini/assemble.py --run runs/mini --out pretrained_ckpt/mini
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name in ("imagebind", "pandagpt_delta", "delta", "language/model"):
        target = args.out / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        state = {key: value.to(torch.float16) for key, value in load_file(args.run / f"{name}.safetensors").items()}
        save_file(state, target, {"format": "pt"})
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    for name in ("language/config.json", "language/tokenizer.model", "text_tokenizer/merges.txt"):
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.run / name, args.out / name)


if __name__ == "__main__":
    main()
