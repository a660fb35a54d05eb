"""The mean of runs of stage 1 that have gone on from the same one, and of that one (a "model soup").

python recipes/mini/average.py --out runs/mini runs/mini/{first,a,b,c}          # the first is the one they go on from

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
    for name in ("imagebind.safetensors", "stage1_maps.safetensors"):
        states = [load_file(run / name) for run in args.runs]
        mean = {key: torch.stack([state[key].float() for state in states]).mean(0).half() for key in states[0]}
        save_file(mean, args.out / name)
    shutil.copytree(args.runs[0] / "text_tokenizer", args.out / "text_tokenizer", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
