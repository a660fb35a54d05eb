"""Settle what stage 1 leaves open. Photographs chose it, and a generated world would choose otherwise (README.md).

python recipes/mini/settle.py --out runs/mini        # some minutes on two CPU cores
"""

import argparse
from itertools import product
from math import log2
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from talk import GOOD, PICTURES, World, bare_model
from torch import Tensor
from tqdm import tqdm

from spgdd.geometry import assemble
from spgdd.profiles import get_profile

STEEPNESS = 16.0  # of the memory's distances
MIDDLE = -8.0  # bias to begin with
TRUSTED = (0, 1, 2)  # taps whose words count: the last one knows the generated world by heart
COMPARED = (1, 2, 3)  # taps whose distances count: the first one sees too little
SHRINK = 0.5  # exponent of the learned gates: half way to none
NEVER = -20.0  # logit of what is fused without weight


def settled(maps: dict[str, Tensor], trained: tuple[int, ...], kept: tuple[int, ...]) -> dict[str, Tensor]:
    """Maps of stage 1 with the ``kept`` scales out of the ``trained`` ones, and the weights of taps and words."""
    scales = [trained.index(scale) for scale in kept]
    taps = len(maps["memory.gates"])
    fusion, trust = torch.full((taps, len(kept)), NEVER), torch.zeros(taps)
    fusion[list(COMPARED)], trust[list(TRUSTED)] = 0.0, 1 / len(TRUSTED)
    return maps | {
        "memory.gates": maps["memory.gates"][:, scales].float().clamp(min=0) ** SHRINK,
        "memory.fusion": fusion,
        "comparison.trust": trust,
        "comparison.steepness": torch.tensor([STEEPNESS]),
        "comparison.bias": torch.tensor([MIDDLE]),
        "comparison.doubling": torch.zeros(1),
    }


@torch.no_grad()
def even_odds(model, world: World) -> tuple[float, float]:
    """Log-odds of the score at which a picture is as likely good as defective, and how they fall with each doubling.

    By logistic regression; one to three good pictures of each product are known, one and the defective ones in doubt.
    """
    rows, bad = [], []
    for first, known in tqdm([*product(range(0, len(world), PICTURES), range(1, GOOD))], desc="even odds"):
        name, doubtful = world.known[first]["product"], range(first + GOOD - 1, first + PICTURES)
        bank = model.build_bank(world.patches[first : first + known], name)
        for found in model.anomaly_map(world.features([*doubtful]), name, bank).cpu().numpy():  # (1, 224, 224)
            score = assemble(found, model.profile.score_share)[0]
            rows.append((logit(score), log2(known)))
        bad += [bool(world.known[row]["defects"]) for row in doubtful]
    fitted = LogisticRegression(class_weight="balanced").fit(rows, bad)
    slope, doubling = fitted.coef_[0]
    return -float(fitted.intercept_[0] / slope), float(doubling / slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=360)
    args = parser.parse_args()
    source, target = args.out / "stage1_maps.safetensors", args.out / "maps.safetensors"
    maps = settled(load_file(source), (1, 3, 5), get_profile("mini").scales)
    save_file(maps, target)
    model = bare_model(args.out)
    middle, doubling = even_odds(model, World(model, args.products, 6, lambda known, rng: []))
    maps["comparison.bias"] -= middle
    maps["comparison.doubling"] += doubling
    print(*(f"{name} {maps[f'comparison.{name}'].item():.2f}" for name in ("bias", "doubling")))
    save_file(maps, target)


if __name__ == "__main__":
    main()
