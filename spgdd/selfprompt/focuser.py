"""The text-driven focuser: patch tokens against sentences on normal and abnormal products (zero-shot map)."""

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.01  # similarities are divided by it before the softmax
FOCUS = 0.05  # temperature of the attention that pools patches by their anomaly

STATES = {
    "normal": ("{}", "flawless {}", "perfect {}", "unblemished {}",
               "{} without flaw", "{} without defect", "{} without damage"),
    "abnormal": ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage"),
}  # fmt: skip
TEMPLATES = ("a photo of a {}.", "a photo of the {}.")


def text_prompts(product: str) -> dict[str, list[str]]:
    """AnomalyGPT's state ensemble: 14 "normal" and 10 "abnormal" sentences; ``_`` becomes a space."""
    name = product.replace("_", " ")
    return {
        side: [template.format(state.format(name)) for state in states for template in TEMPLATES]
        for side, states in STATES.items()
    }


def text_vectors(
    encode_text: Callable[[Tensor], Tensor], tokenizer: Callable[[list[str]], Tensor], product: str
) -> tuple[Tensor, Tensor]:
    """Unit vectors float32 of the sentences on a product, normal (14, J) and abnormal (10, J).

    ``tokenizer`` turns n sentences into ids (n, 77), ``encode_text`` ids into vectors (n, J). AnomalyGPT's anchors are
    the two means, normalised.
    """
    normal, abnormal = (
        F.normalize(encode_text(unpadded(tokenizer(texts))).float(), dim=-1) for texts in text_prompts(product).values()
    )
    return normal, abnormal


def unpadded(ids: Tensor) -> Tensor:
    """Ids (n, S) up to the last end of a text, its largest id: attention is causal, what follows says nothing."""
    return ids[:, : int(ids.argmax(1).max()) + 1]


class PatchDecoder(nn.Module):
    """One linear layer per tap, from the vision width to the joint width: (B, L, N, D) -> (B, L, N, J)."""

    def __init__(self, width: int, joint: int, taps: int):
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, joint) for _ in range(taps))

    def forward(self, patches: Tensor) -> Tensor:
        taps = patches.to(self.fc[0].weight.dtype).unbind(1)
        return torch.stack([layer(tokens) for layer, tokens in zip(self.fc, taps, strict=True)], dim=1)


def zero_shot_logits(decoded: Tensor, anchors: Tensor) -> Tensor:
    """Cosine similarity over temperature, (B, L, 2, G, G) with N = G*G.

    ``decoded`` (B, L, N, J); ``anchors`` unit vectors (2, J), or (B, 2, J) where products differ.
    """
    anchors = anchors.expand(len(decoded), -1, -1)  # (B, 2, J)
    logits = torch.einsum("blnj,bcj->blcn", F.normalize(decoded.float(), dim=-1), anchors) / TEMPERATURE
    grid = isqrt(decoded.shape[2])
    return logits.unflatten(-1, (grid, grid))  # (B, L, 2, N) -> (B, L, 2, G, G)


def zero_shot_probabilities(decoded: Tensor, anchors: Tensor) -> Tensor:
    """Probabilities [normal, abnormal] of pixels, (B, L, 2, 224, 224): enlarged first, then softmax."""
    logits = zero_shot_logits(decoded, anchors)
    pixels = enlarge(logits.flatten(0, 1)).softmax(1)  # (B*L, 2, 224, 224)
    return pixels.unflatten(0, logits.shape[:2])


def over_taps(probabilities: Tensor, tap_weights: Tensor | None = None) -> Tensor:
    """Anomaly map (B, 1, 224, 224), 0 normal to 1 abnormal, of ``zero_shot_probabilities`` (B, L, 2, 224, 224).

    It is the mean over the taps, weighted by ``tap_weights`` (L,) if given.
    """
    abnormal = probabilities[:, :, 1]
    return (abnormal.mean(1) if tap_weights is None else torch.einsum("blhw,l->bhw", abnormal, tap_weights))[:, None]


def zero_shot_map(decoded: Tensor, anchors: Tensor, tap_weights: Tensor | None = None) -> Tensor:
    """Anomaly map (B, 1, 224, 224) of decoded patches; see ``zero_shot_logits`` and ``over_taps``."""
    return over_taps(zero_shot_probabilities(decoded, anchors), tap_weights)


class Focus(nn.Module):
    """Focus tokens of the TDDF: what the most anomalous patches look like, one token per tap.

    Patches are pooled with weights softmax(map / FOCUS), so the tokens follow the map to the defect; each tap's mean is
    normalised and projected to the language model: (B, L, N, D) and a map (B, 1, 224, 224) -> (B, L, H).
    """

    def __init__(self, width: int, hidden: int, taps: int):
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(width, hidden) for _ in range(taps))

    def forward(self, patches: Tensor, anomaly_map: Tensor) -> Tensor:
        grid = isqrt(patches.shape[2])
        weights = F.adaptive_avg_pool2d(anomaly_map.float(), grid).flatten(1).div(FOCUS).softmax(-1)  # (B, N)
        pooled = torch.einsum("bn,blnd->bld", weights, patches.float())
        pooled = F.layer_norm(pooled, pooled.shape[-1:])
        return torch.stack([layer(pooled[:, tap]) for tap, layer in enumerate(self.fc)], dim=1)


def enlarge(maps: Tensor, patch: int = 14) -> Tensor:
    """Patch maps (B, C, G, G) -> pixel maps (B, C, S, S), S = G * patch: bilinear, aligned corners (AnomalyGPT)."""
    size = [side * patch for side in maps.shape[-2:]]
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def focal_loss(probabilities: Tensor, mask: Tensor, gamma: float = 2.0, smooth: float = 1e-5) -> Tensor:
    """Focal loss (Lin et al. 2017), smoothed as in AnomalyGPT, mean over pixels and what stands before them.

    ``probabilities`` (..., 2, H, W) of [normal, abnormal]; ``mask`` of 0 and 1, (..., H, W) or what expands to it.
    """
    normal, abnormal = probabilities.unbind(-3)
    p_true = normal.lerp(abnormal, mask.clamp(smooth, 1 - smooth)) + smooth
    return -((1 - p_true) ** gamma * p_true.log()).mean()


def dice_loss(probability: Tensor, mask: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - Dice coefficient of the abnormal probability (..., H, W) and a 0/1 mask, mean over what stands before H."""
    overlap, *areas = (part.flatten(-2).sum(-1) for part in (probability * mask, probability, mask))
    return 1 - ((2 * overlap + smooth) / (sum(areas) + smooth)).mean()
