"""The self-prompted memory (MSSPMM): a query's patch tokens against those of the product's normal images."""

import json
import os
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spgdd.errors import WeightsError
from spgdd.selfprompt.focuser import enlarge

FORMAT = "spgdd-memory-bank-1"
CODED = ("scales", "normals", "rotate", "calibration")  # fields stored as JSON; the others are text
CHUNK = 2**24  # most values of one temporary tensor of the search: 64 MB in float32


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """What a product looks like when nothing is wrong."""

    tokens: Tensor  # (L, S, M, D): M entries per tap and scale, before the gates
    scales: tuple[int, ...]  # S side lengths of the neighbourhoods, in patches
    normals: int  # number of normal images
    rotate: bool = False  # whether each of them is in it at 0, 90, 180 and 270 degrees
    product: str = "object"
    profile: str = ""
    imagebind: str = ""  # fingerprint of the vision tower that made the tokens
    calibration: dict | None = None  # JSON values of whoever calibrates the score; carried, not read here

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything to one ``.safetensors`` file, whole or not at all."""
        if not self.profile:
            raise ValueError("this bank does not say which model made it: build it with SPGDD.build_bank")
        path = Path(path)
        plain = {name: getattr(self, name) for name in ("product", "profile", "imagebind")}
        coded = {name: json.dumps(getattr(self, name)) for name in CODED}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({"tokens": self.tokens.cpu().contiguous()}, partial, {"format": FORMAT, **plain, **coded})
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike, profile: str, imagebind: str, device="cpu") -> "MemoryBank":
        """Read a bank made with that profile and that vision tower (its fingerprint).

        Raises WeightsError if the file is missing or damaged, no bank, or made with another model.
        """
        path, again = Path(path), "Make the bank again from the normal images."
        if not path.is_file():
            raise WeightsError(f"there is no memory bank {path}. Build one from normal images and save it.")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tokens = file.get_tensor("tokens") if metadata.get("format") == FORMAT else None
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged or no .safetensors file ({error}). {again}") from error
        if tokens is None:
            raise WeightsError(f"{path} is no memory bank: format {metadata.get('format')}, not {FORMAT}.")
        if metadata["profile"] != profile:
            raise WeightsError(
                f"{path} was made with profile {metadata['profile']}, and the loaded model is {profile}. "
                f"Load the profile {metadata['profile']}, or: {again}"
            )
        if metadata["imagebind"] != imagebind:
            raise WeightsError(
                f"{path} was made with other ImageBind weights (fingerprint {metadata['imagebind']}, loaded "
                f"{imagebind}). {again}"
            )
        coded = {name: json.loads(metadata[name]) for name in CODED}
        coded["scales"] = tuple(coded["scales"])
        return cls(tokens, product=metadata["product"], profile=profile, imagebind=imagebind, **coded)


class Memory(nn.Module):
    """How a query is compared with a bank: 1 - the best gated cosine similarity, fused over taps and scales.

    Learned: ``gates`` (L, S, D), weights of the channels, initially ones; ``fusion`` (L, S), logits of the
    softmax over all taps and scales, initially equal. With ``scales=(1,)`` and initial values the map is
    AnomalyGPT's few-shot map. Scales are odd.
    """

    def __init__(self, taps: int, width: int, scales: tuple[int, ...] = (1,)):
        super().__init__()
        self.scales = tuple(scales)
        self.gates = nn.Parameter(torch.ones(taps, len(self.scales), width))
        self.fusion = nn.Parameter(torch.zeros(taps, len(self.scales)))

    @torch.no_grad()
    def build(self, patches: Tensor, rotate: bool = False, budget: int | None = None) -> MemoryBank:
        """Bank of patch tokens (K, L, N, D), in their dtype; at most ``budget`` entries per tap and scale.

        With ``rotate`` they are the tokens of ``rotations(images)``, four in a row for each normal image.
        """
        if rotate and len(patches) % 4:
            raise ValueError(f"rotate=True takes the tokens of rotations(images), 4 each; got {len(patches)}")
        images, taps, places, width = patches.shape
        entries = min(budget or images * places, images * places)
        tokens = patches.new_empty(taps, len(self.scales), entries, width)
        for tap in range(taps):
            for index, scale in enumerate(self.scales):
                every = neighbourhoods(patches[:, tap], scale).flatten(0, 1)  # (K*N, D)
                tokens[tap, index] = every[k_centre(every, entries)] if entries < len(every) else every
        return MemoryBank(tokens, self.scales, images // 4 if rotate else images, rotate)

    def anomaly_map(self, patches: Tensor, bank: MemoryBank) -> Tensor:
        """Anomaly map (B, 1, 224, 224) float32 of tokens (B, L, N, D): 0 as in the memory, at most 2."""
        if bank.scales != self.scales:
            raise WeightsError(f"the bank has scales {bank.scales}, the model {self.scales}: build it again.")
        images, _, places, _ = patches.shape
        weights = self.fusion.flatten().softmax(0).view_as(self.fusion)
        fused = torch.zeros(images * places, device=patches.device)
        for tap, gates in enumerate(self.gates):
            for index, gate in enumerate(gates):
                query = neighbourhoods(patches[:, tap], self.scales[index]).flatten(0, 1)  # (B*N, D)
                query = F.normalize(query * gate, dim=-1)
                tokens = bank.tokens[tap, index].to(patches.device)
                match = F.normalize(tokens[nearest(query, tokens, gate)].float() * gate, dim=-1)
                fused = fused + weights[tap, index] * (1 - (query * match).sum(-1))
        grid = isqrt(places)
        return enlarge(fused.view(images, 1, grid, grid))  # (B*N,) -> (B, 1, G, G) -> (B, 1, 224, 224)


def rotations(images: Tensor) -> Tensor:
    """Images at 0, 90, 180, 270 degrees counter-clockwise: (K, C, S, S) -> (4K, C, S, S), four in a row."""
    return torch.stack([images.rot90(turns, (2, 3)) for turns in range(4)], dim=1).flatten(0, 1)


def neighbourhoods(patches: Tensor, scale: int) -> Tensor:
    """Patch tokens (B, N, D) -> float32 means over scale x scale patches; at the edge, of those there are."""
    grid = isqrt(patches.shape[1])
    maps = patches.float().transpose(1, 2).unflatten(2, (grid, grid))  # (B, D, G, G)
    pooled = F.avg_pool2d(maps, scale, stride=1, padding=scale // 2, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2)  # (B, N, D)


@torch.no_grad()
def nearest(query: Tensor, tokens: Tensor, gate: Tensor) -> Tensor:
    """Index (Q,) of the entry of ``tokens`` (M, D) with the best gated cosine to each unit vector (Q, D).

    The search goes through the entries in chunks and keeps no (Q, M) tensor; whoever needs a gradient
    computes the similarity of the winners anew.
    """
    best = torch.full((len(query),), -torch.inf, device=query.device)
    index = torch.zeros(len(query), dtype=torch.long, device=query.device)
    step = max(1, CHUNK // max(query.shape))
    for start in range(0, len(tokens), step):
        entries = F.normalize(tokens[start : start + step].float() * gate, dim=-1)
        value, place = (query @ entries.T).max(dim=1)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, place + start, index)
    return index


@torch.no_grad()
def k_centre(tokens: Tensor, budget: int) -> Tensor:
    """Indices (budget,) of entries of ``tokens`` (M, D) that leave no other far away in cosine distance.

    Greedy k-centre as in PatchCore (Roth et al. 2022, algorithm 1), but exact (no random projection) and
    started at the entry closest to the mean, so that nothing depends on chance.
    """
    units = F.normalize(tokens.float(), dim=-1)
    chosen = torch.empty(budget, dtype=torch.long, device=units.device)
    distance = torch.full((len(units),), torch.inf, device=units.device)  # to the closest chosen entry
    index = (units @ units.mean(0)).argmax().view(1)
    for place in range(budget):
        chosen[place : place + 1] = index  # stays on the device: the loop never waits for it
        distance = torch.minimum(distance, 1 - units @ units.index_select(0, index)[0])
        distance.index_fill_(0, index, -1.0)
        index = distance.argmax().view(1)
    return chosen


def subsample(bank: MemoryBank, budget: int) -> MemoryBank:
    """The bank with at most ``budget`` entries per tap and scale, chosen by ``k_centre``."""
    budget = min(budget, bank.tokens.shape[2])
    taps = [torch.stack([tokens[k_centre(tokens, budget)] for tokens in scales]) for scales in bank.tokens]
    return replace(bank, tokens=torch.stack(taps))
