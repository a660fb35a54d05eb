"""Fix how memory and words are joined, which stage 1 leaves open; photographs chose it (LOG.md).

python recipes/mini/fit_comparison.py --out runs/mini        # some minutes on two CPU cores
"""

import argparse
from math import log2
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from worlds import Diagnosed, bare_model

STEEPNESS = 16.0  # of the memory's distances
MIDDLE = -8.0  # bias to begin with
TRUSTED = (0, 1, 2)  # taps whose words count: the last one knows the generated world by heart
COMPARED = (1, 2, 3)  # taps whose distances count: the first one sees too little
SHRINK = 0.5  # exponent of the learned gates: half way to none
NO_WEIGHT = -20.0  # logit of what is fused without weight


def with_fixed_weights(maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps of stage 1, with the weights of taps and words."""
    fusion, trust = torch.full_like(maps["memory.fusion"].float(), NO_WEIGHT), torch.zeros(len(maps["memory.fusion"]))
    fusion[list(COMPARED)], trust[list(TRUSTED)] = 0.0, 1 / len(TRUSTED)
    return maps | {
        "memory.gates": maps["memory.gates"].float().clamp(min=0) ** SHRINK,
        "memory.fusion": fusion,
        "comparison.trust": trust,
        "comparison.steepness": torch.tensor([STEEPNESS]),
        "comparison.bias": torch.tensor([MIDDLE]),
        "comparison.per_doubling": torch.zeros(1),
    }


def fit_level(world: Diagnosed) -> tuple[float, float]:
    """Log-odds of the score at which a picture is as likely good as defective, and how they fall with each doubling.

    By logistic regression, over the numbers of good pictures that each picture was compared with.
    """
    odds = logit(world.scores)
    rows = [(odd, log2(len(chosen))) for odd, chosen in zip(odds, world.chosen, strict=True)]
    bad = [bool(sample["defects"]) for sample in world.known]
    fitted = LogisticRegression(class_weight="balanced").fit(rows, bad)
    slope, doubling = fitted.coef_[0]
    return -float(fitted.intercept_[0] / slope), float(doubling / slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=360)
    args = parser.parse_args()
    source, target = args.out / "stage1_maps.safetensors", args.out / "maps.safetensors"
    maps = with_fixed_weights(load_file(source))
    save_file(maps, target)
    model = bare_model(args.out)
    middle, doubling = fit_level(Diagnosed(model, args.products, 6, lambda known, rng: [], shots=(1, 2, 3)))
    maps["comparison.bias"] -= middle
    maps["comparison.per_doubling"] += doubling
    print(*(f"{name} {maps[f'comparison.{name}'].item():.2f}" for name in ("bias", "per_doubling")))
    save_file(maps, target)


if __name__ == "__main__":
    main()
