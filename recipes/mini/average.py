"""The mean of runs of stage 1 or 4 that have gone on from the same one, and maybe of that one (a "model soup").

python recipes/mini/average.py --out runs/mini/mean runs/mini/{first,a,b,c}

Wortsman et al. 2022, "Model soups": better than each of them where what is asked differs from what was trained.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("imagebind.safetensors", "stage1_maps.safetensors", "delta.safetensors"):
        if (args.runs[0] / name).exists():
            states = [load_file(run / name) for run in args.runs]
            mean = {key: torch.stack([state[key].float() for state in states]).mean(0).half() for key in states[0]}
            save_file(mean, args.out / name)
    if (tokenizer := args.runs[0] / "text_tokenizer").exists():
        shutil.copytree(tokenizer, args.out / "text_tokenizer", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
