"""Settle what stage 1 leaves open. Photographs chose it, and a generated world would choose otherwise (README.md).

python recipes/mini/settle.py --out runs/mini        # a minute on two CPU cores
"""

import argparse
from pathlib import Path

import torch
from pool import TOWER_FAMILIES
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_curve
from talk import PICTURES, World, bare_model
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
    }


@torch.no_grad()
def balance(model, products: int) -> float:
    """What to add to the bias, so that good and defective pictures part best at even odds, one good one known."""
    world = World(model, products, 6, lambda known, rng: [], families=TOWER_FAMILIES)
    scores, bad = [], []
    for first in tqdm(range(0, len(world), PICTURES), desc="balance"):
        name, rows = world.known[first]["product"], range(first + 1, first + PICTURES)
        bank = model.build_bank(world.patches[[first]], name)
        maps = model.anomaly_map(world.features([*rows]), name, bank)[:, 0].cpu().numpy()
        scores += [assemble(one[None], model.profile.score_share)[0] for one in maps]
        bad += [bool(world.known[row]["defects"]) for row in rows]
    false, true, thresholds = roc_curve(bad, torch.tensor(scores).logit(1e-6))
    return -float(thresholds[(true - false).argmax()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=360)
    args = parser.parse_args()
    source, target = args.out / "stage1_maps.safetensors", args.out / "maps.safetensors"
    maps = settled(load_file(source), (1, 3, 5), get_profile("mini").scales)
    save_file(maps, target)
    maps["comparison.bias"] += balance(bare_model(args.out), args.products)
    print(f"bias {maps['comparison.bias'].item():.2f}")
    save_file(maps, target)


if __name__ == "__main__":
    main()
