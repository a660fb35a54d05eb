"""The self-prompted memory (MSSPMM): a query's patch tokens against those of the product's normal images."""

from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.errors import WeightsError

CHUNK = 2**24  # most values of one temporary tensor of the search: 64 MB in float32


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """What a product looks like when nothing is wrong."""

    tokens: Tensor  # (L, S, M, D): M entries per tap and scale, before the gates
    origin: Tensor  # (L, S, M) int32: number of the normal image that each entry is from
    scales: tuple[int, ...]  # S side lengths of the neighbourhoods, in patches
    normals: int  # number of normal images
    rotate: bool = False  # whether each of them is in it at 0, 90, 180 and 270 degrees

    @property
    def entries(self) -> Tensor:
        """Those of the last tap at the first scale, as ``SPGDD.prompt_tokens`` takes them: (1, M, D)."""
        return self.tokens[None, -1, 0]


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
    def build(
        self, patches: Tensor, rotate: bool = False, budget: int | None = None, origin: Tensor | None = None
    ) -> MemoryBank:
        """Bank of patch tokens (V, L, N, D); at most ``budget`` entries per tap and scale.

        ``origin`` (V,) is the number of the normal image that each row is a view of; by default each is its own. With
        ``rotate`` the rows are the tokens of ``rotations(images)``, four in a row for each normal image.
        """
        if rotate and len(patches) % 4:
            raise ValueError(f"rotate=True takes the tokens of rotations(images), 4 each; got {len(patches)}")
        if origin is None:
            origin = torch.arange(len(patches)) // (4 if rotate else 1)
        tokens = self.tokens(patches)
        origin = origin.to(tokens.device, torch.int32).repeat_interleave(patches.shape[2]).expand(tokens.shape[:3])
        bank = MemoryBank(tokens, origin, self.scales, len(origin[0, 0].unique()), rotate)
        return subsample(bank, budget) if budget else bank

    def tokens(self, patches: Tensor) -> Tensor:
        """Entries of a bank of every patch: tokens of normal images (..., K, L, N, D) -> (..., L, S, K*N, D).

        They are float32 where neighbours are averaged, as a query's are: half precision would round the means.
        """
        scales = torch.stack([neighbourhoods(patches, scale) for scale in self.scales], -3)  # (..., K, L, S, N, D)
        tokens = scales.movedim(-5, -3).flatten(-3, -2)
        return tokens if max(self.scales) > 1 else tokens.to(patches.dtype)

    def compare(self, patches: Tensor, tokens: Tensor, barred: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, L, N, D) against the tokens (G, L, S, M, D) of G banks, B / G queries in a row for each.

        Returns the distances (B, L, S, N) float32 to the best entry, 0 to 2, and that entry's index (B, L, S, N).
        Tokens of the first scales alone are compared at these. ``barred`` (B, L, S, M), True: the query is not compared
        with this entry.
        """
        banks = len(tokens)
        distances, indices = [], []
        for number in range(tokens.shape[2]):
            query = neighbourhoods(patches, self.scales[number])
            query = query.unflatten(0, (banks, -1)).transpose(1, 2).flatten(0, 1)  # (G*L, B/G, N, D)
            entries = tokens[:, :, number].flatten(0, 1).to(query.device)  # (G*L, M, D)
            gate = self.gates[:, number].repeat(banks, 1)  # (G*L, D)
            masked = barred
            if barred is not None:
                masked = barred[:, :, number].unflatten(0, (banks, -1)).transpose(1, 2).flatten(0, 1)
            for values, found in zip(closest(query, entries, gate, masked), (distances, indices), strict=True):
                found.append(values.unflatten(0, (banks, -1)).transpose(1, 2).flatten(0, 1))  # (B, L, N)
        return torch.stack(distances, 2), torch.stack(indices, 2)

    def fuse(self, distances: Tensor) -> Tensor:
        """A_mem on the patch grid: distances (..., L, S, N) -> (..., N)."""
        weights = self.fusion.flatten().softmax(0).view_as(self.fusion)
        return (distances * weights[..., None]).sum((-3, -2))

    def require_fit(self, bank: MemoryBank) -> None:
        """Raises WeightsError for a bank of other taps, scales or channels."""
        taps, scales, width = self.gates.shape
        if bank.scales != self.scales or (len(bank.tokens), bank.tokens.shape[3]) != (taps, width):
            raise WeightsError(
                f"the memory has entries {tuple(bank.tokens.shape)} at scales {bank.scales}, the model {taps} taps of "
                f"{width} channels at scales {self.scales}. Make it again: `spgdd memory build`."
            )


def on_grid(values: Tensor) -> Tensor:
    """Values of the patches of a square (..., N), row by row, -> (..., G, G)."""
    return values.unflatten(-1, (isqrt(values.shape[-1]),) * 2)


def rotations(images: Tensor) -> Tensor:
    """Images at 0, 90, 180, 270 degrees counter-clockwise: (K, C, S, S) -> (4K, C, S, S), four in a row."""
    return torch.stack([images.rot90(turns, (2, 3)) for turns in range(4)], dim=1).flatten(0, 1)


def neighbourhoods(patches: Tensor, scale: int) -> Tensor:
    """Patch tokens (..., N, D) -> float32 means over scale x scale patches; at the edge, of those there are."""
    if scale == 1:
        return patches.float()
    grid = isqrt(patches.shape[-2])
    means = averaging(grid, scale, patches.device)  # the same for rows and columns of the square
    rows = means @ patches.float().unflatten(-2, (grid, grid)).flatten(-2)  # (..., G, G*D)
    return (means @ rows.unflatten(-1, (grid, -1))).flatten(-3, -2)  # (..., G, G, D) -> (..., N, D)


@cache
def averaging(grid: int, scale: int, device: torch.device) -> Tensor:
    """Matrix (G, G) whose row averages the places within ``scale`` around each place of a line of G."""
    with torch.inference_mode(False):
        places = torch.arange(grid, device=device)
        near = (places[:, None] - places).abs() <= scale // 2
        return F.normalize(near.float(), p=1, dim=1)


def closest(query: Tensor, entries: Tensor, gate: Tensor, barred: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gated cosine distance of tokens (G, B, N, D) to the best of entries (G, M, D), and its index, (G, B, N) each.

    ``gate`` (G, D); ``barred`` as in ``nearest``.
    """
    query = F.normalize(query.float() * gate[:, None, None], dim=-1)
    best, index = nearest(query, F.normalize(entries.float() * gate.detach()[:, None], dim=-1), barred)
    if torch.is_grad_enabled():  # the search is without gradient: the winners once more
        winners = entries.gather(1, index.flatten(1)[..., None].expand(-1, -1, entries.shape[-1])).view_as(query)
        best = (query * F.normalize(winners.float() * gate[:, None, None], dim=-1)).sum(-1)
    return 1 - best, index


@torch.no_grad()
def nearest(query: Tensor, entries: Tensor, barred: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best cosine similarity of unit vectors (G, B, N, D) to entries (G, M, D), and its index, (G, B, N) each.

    ``barred`` (G, B, M), True: not to be found. The search goes through the entries in chunks.
    """
    groups, images, places, _ = query.shape
    best = query.new_full((groups, images, places), -torch.inf)
    index = torch.zeros_like(best, dtype=torch.long)
    step = max(1, CHUNK // best.numel())
    for start in range(0, entries.shape[1], step):
        chunk = entries[:, start : start + step].transpose(1, 2)
        similarity = (query.flatten(1, 2) @ chunk).unflatten(1, (images, places))  # (G, B, N, step)
        if barred is not None:
            similarity.masked_fill_(barred[:, :, None, start : start + step], -torch.inf)
        value, place = similarity.max(dim=-1)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, place + start, index)
    return best, index


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
    if budget >= bank.tokens.shape[2]:
        return bank
    chosen = torch.stack([torch.stack([k_centre(tokens, budget) for tokens in scales]) for scales in bank.tokens])
    tokens = bank.tokens.gather(2, chosen[..., None].expand(-1, -1, -1, bank.tokens.shape[3]))
    return replace(bank, tokens=tokens, origin=bank.origin.gather(2, chosen))
