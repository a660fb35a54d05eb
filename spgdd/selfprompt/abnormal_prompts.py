"""Learned abnormal prompts of the TDDF and the losses that teach them (PromptAD: Li et al., CVPR 2024)."""

from collections.abc import Callable, Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.selfprompt.focuser import text_prompts, unpadded

CONTEXT = 4  # learned vectors of a prompt: in place of "a photo of a", before state and name
MATCHING = 1e-3  # weight of the matching loss (PromptAD's lambda)
MARGIN = 0.05  # of the triplet loss, in distance of unit vectors: 5 to 7 of log-odds at the map's temperature


class AbnormalPrompts(nn.Module):
    """One learned prompt beside each hand-written abnormal sentence: P = 10.

    The sentence's first words are moved by learned ``offsets`` (P, 4, W) in the text tower's embedding space, the same
    for every product. PromptAD starts from random vectors; here they start at the words (offsets 0, as CoOp may), so
    before training the learned prompts are the hand-written ones, and weight decay leads back to them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(len(text_prompts("")["abnormal"]), CONTEXT, width))

    def forward(
        self,
        embed: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor, Tensor], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        products: Sequence[str],
    ) -> Tensor:
        """Unit vectors (n, P, J) float32 of n products, in one run of the text tower.

        ``tokenizer`` turns m sentences into ids (m, 77) that end with their largest, ``embed`` ids into token
        embeddings (m, S, W), ``encode_text`` ids and embeddings into vectors (m, J).
        """
        ids = unpadded(tokenizer([text for product in products for text in text_prompts(product)["abnormal"]]))
        ids = ids.to(self.offsets.device)  # only now: a GPU is not waited for
        tokens = embed(ids)  # (n*P, S, W), the first being the start of text
        moved = F.pad(self.offsets, (0, 0, 1, tokens.shape[1] - 1 - CONTEXT)).repeat(len(products), 1, 1)
        vectors = encode_text(ids, (tokens + moved).to(tokens.dtype))
        return F.normalize(vectors.float(), dim=-1).unflatten(0, (len(products), -1))


def matching_loss(hand_written: Tensor, learned: Tensor) -> Tensor:
    """PromptAD's alignment of the prompts, unit vectors (..., Q, J) and (..., P, J), mean over products.

    || mean over Q of w_hand - mean over P of w_learned ||^2, to be weighted by ``MATCHING``.
    """
    return (hand_written.mean(-2) - learned.mean(-2)).square().sum(-1).mean()


def triplet_loss(decoded: Tensor, anchors: Tensor, mask: Tensor, margin: float = MARGIN) -> Tensor:
    """Each patch nearer to its own anchor than to the other one by a margin, mean over images.

    ``decoded`` (B, L, N, J), ``anchors`` unit vectors (2, J) or (B, 2, J) of [normal, abnormal], ``mask`` (B, H, W) of
    0 and 1, in pixels or patches; a patch counts on either side by the share of its pixels there.

    Of a patch z/||z||: max(0, d(z, own) - d(z, other) + margin), d Euclidean. PromptAD's explicit anomaly margin is the
    normal side alone, with margin 0, for want of abnormal images. The two sides of an image weigh the same however
    small the defect. A margin above the distance of the anchors, which bounds d(z, other) - d(z, own), is never met.
    """
    taps, places = decoded.shape[1:3]
    units = F.normalize(decoded.float(), dim=-1).flatten(1, 2)  # (B, L*N, J)
    distance = torch.cdist(units, anchors.expand(len(decoded), -1, -1)).unflatten(1, (taps, places))  # (B, L, N, 2)
    hinge = F.relu(distance - distance.flip(-1) + margin).mean(1)  # (B, N, 2)
    share = F.adaptive_avg_pool2d(mask.float(), isqrt(places)).flatten(1)  # (B, H, W) -> (B, N)
    weights = torch.stack([1 - share, share], dim=-1)  # (B, N, 2)
    count = weights.sum(1)  # (B, 2)
    sides = (weights * hinge).sum(1) / count.clamp(min=torch.finfo(count.dtype).tiny)
    return (sides.sum(1) / (count > 0).sum(1)).mean()
