"""The vision and text towers of ImageBind, with the parameter names of ``imagebind_huge.pth``.

A tower is preprocessor -> trunk -> head -> postprocessor. Tokens are batch-first, (B, N, D), all the way.
The stochastic depth and dropout of the published training are left out: they do nothing in inference.
The published file holds four senses more, which SPGDD-GPT does not use: scripts/imagebind_senses.py builds them too.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.imagebind.config import ImageBindConfig, ImageFeatures, TowerConfig
from spgdd.imagebind.preprocess import MEAN, STD

LOGIT_SCALE = 1 / 0.07  # of text before training
PARTS = [f"modality_{part}" for part in ("preprocessors", "trunks", "heads", "postprocessors")]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # stems alone keep torch's 1e-5


class Attention(nn.Module):
    """Self-attention with the parameters of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = F.linear(tokens, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        # (B, N, D) -> (B, heads, N, D/heads)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, N, D)


def fuses_gelu(x: Tensor, layer: nn.Linear) -> bool:
    """Whether ``fused_gelu`` pays: in half precision on a GPU. It has no gradient, and a compiler fuses on its own."""
    half = x.dtype == layer.weight.dtype and x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and half and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def fused_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU(layer(x)) of x (..., D), its tanh form (off by at most 5e-4), in one kernel: a tenth of a tower's time."""
    rows = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
    return rows.unflatten(0, x.shape[:-1])


class Block(nn.Module):
    """Pre-norm transformer block with GELU: the exact one, but for ``fused_gelu``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.norm_1 = LayerNorm(width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=widen, act=nn.GELU(), fc2=narrow))
        self.norm_2 = LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = tokens + self.attn(self.norm_1(tokens), mask)
        normed = self.norm_2(tokens)
        if fuses_gelu(normed, self.mlp.fc1):
            return tokens + self.mlp.fc2(fused_gelu(normed, self.mlp.fc1))
        return tokens + self.mlp(normed)


class Trunk(nn.Module):
    def __init__(self, size: TowerConfig, pre_norm: bool):
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(LayerNorm(size.width)) if pre_norm else nn.Sequential()
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, taps=()) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, N, D) after all blocks, and a list of those after each block named in ``taps``."""
        tokens, tapped = self.pre_transformer_layer(tokens), []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, mask)
            if index in taps:
                tapped.append(tokens)
        return tokens, tapped


class VisionStem(nn.Module):
    """Patches of images (B, 3, H, W) -> (B, gh, gw, D)."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        size = (2, patch, patch)  # of a clip of two frames
        self.proj = nn.Sequential(nn.Identity(), nn.Conv3d(3, width, size, stride=size, bias=False))

    def forward(self, pixels: Tensor) -> Tensor:
        conv = self.proj[1]  # an image is a clip of two equal frames, so the two halves of the kernel add up
        return F.conv2d(pixels, conv.weight.sum(2), stride=conv.stride[1:]).permute(0, 2, 3, 1)


class PositionEmbedding(nn.Module):
    def __init__(self, width: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + math.prod(grid), width).normal_(std=0.02))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(1, 1 + gh*gw, D), resized bicubically where the patch grid is not the one it was made for."""
        if grid == self.grid:
            return self.pos_embed
        cls_row, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.transpose(1, 2).unflatten(2, self.grid)  # (1, D, gh, gw)
        patches = F.interpolate(patches, size=grid, mode="bicubic")
        return torch.cat([cls_row, patches.flatten(2).transpose(1, 2)], dim=1)


class GridPreprocessor(nn.Module):
    """Image-like input (B, C, H, W) -> CLS and patch tokens with positions, (B, 1+N, D)."""

    def __init__(self, width: int, stem_name: str, stem: nn.Module, grid: tuple[int, int]):
        super().__init__()
        self.stem_name = stem_name
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.add_module(stem_name, stem)
        self.pos_embedding_helper = PositionEmbedding(width, grid)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.get_submodule(self.stem_name)(inputs)  # (B, gh, gw, D)
        positions = self.pos_embedding_helper(tuple(tokens.shape[1:3]))
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens.flatten(1, 2)], dim=1) + positions


class TextPreprocessor(nn.Module):
    """Token ids (B, N), N at most ``context`` -> (B, N, D)."""

    def __init__(self, width: int, vocab_size: int, context: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, context, width).normal_(std=0.01))
        self.mask = nn.Buffer(torch.full((context, context), -math.inf).triu(1))  # causal
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.pos_embed[:, : ids.shape[1]]


class LogitScale(nn.Module):
    """Multiply by exp(log_logit_scale), which is learned, at most 100."""

    def __init__(self):
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(LOGIT_SCALE)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_logit_scale.exp().clamp(max=100)


class ImageBind(nn.Module):
    """The towers asked for, out of vision and text, each embedding its inputs in the same space of width J.

    Weights are random here; ``load_imagebind`` reads a file. Raises ValueError for a tower that is unknown.
    """

    mean, std = MEAN, STD  # of its pictures

    def __init__(self, config: ImageBindConfig, modalities=("vision", "text")):
        super().__init__()
        self.config, self.modalities = config, tuple(modalities)
        self.taps, self.width, self.joint = len(config.taps), config.vision.width, config.joint
        towers = {modality: self.build_tower(modality) for modality in modalities}
        for part in PARTS:  # in this order random weights are drawn
            self.add_module(part, nn.ModuleDict({modality: next(tower) for modality, tower in towers.items()}))

    def build_tower(self, modality: str) -> Iterator[nn.Module]:
        """The PARTS of one tower, one after the other.

        Without parameters are index 0 of a postprocessor, scaling to unit length, and index 1 of the vision head,
        picking the CLS token: ``_run_tower`` does both.
        """
        config, joint = self.config, self.config.joint
        if modality == "vision":
            width, side = config.vision.width, config.image_size // config.patch
            yield GridPreprocessor(width, "rgbt_stem", VisionStem(width, config.patch), (side, side))
            yield Trunk(config.vision, pre_norm=True)
            yield nn.Sequential(LayerNorm(width), nn.Identity(), nn.Linear(width, joint, bias=False))
            yield nn.Identity()
        elif modality == "text":
            width = config.text.width
            yield TextPreprocessor(width, config.vocab_size, config.context)
            yield Trunk(config.text, pre_norm=False)
            project = nn.Sequential(LayerNorm(width), nn.Linear(width, joint, bias=False))
            yield nn.Sequential(OrderedDict(proj=project))
            yield nn.Sequential(nn.Identity(), LogitScale())
        else:
            raise ValueError(f"this ImageBind has no {modality!r} tower, only vision and text")

    @property
    def signature(self) -> list[Tensor]:
        """Weights that tell its vision tower apart from others, see ``SPGDD.fingerprint``."""
        blocks = self.modality_trunks["vision"].blocks
        return [block.attn.in_proj_weight for block in (blocks[0], blocks[-1])]

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Normalised pixels (B, 3, H, W) -> embedding (B, J) and patch tokens (B, L, N, D) of the taps."""
        embedding, tapped = self._run_tower("vision", pixels, self.config.taps)
        return ImageFeatures(embedding, torch.stack([tokens[:, 1:] for tokens in tapped], dim=1))

    def encode_text(self, ids: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Token ids (B, 77) -> (B, J), as long as the learned logit scale (as published: not unit length).

        ``tokens`` (B, N, D) take the place of the ids' embeddings, positions included: learned prompts.
        """
        return self._run_tower("text", ids, tokens=tokens)[0]

    def _run_tower(
        self, modality: str, inputs: Tensor, taps=(), tokens: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        if modality not in self.modalities:
            raise ValueError(f"only {self.modalities} were built; ask for {modality!r} in `modalities`")
        if inputs.is_floating_point():
            inputs = inputs.to(next(self.parameters()).dtype)
        preprocessor = self.modality_preprocessors[modality]
        tokens = preprocessor(inputs) if tokens is None else tokens
        length = tokens.shape[1]
        mask = preprocessor.mask[:length, :length] if modality == "text" else None
        tokens, tapped = self.modality_trunks[modality](tokens, mask, taps)
        if modality == "text":  # the end of the text has the largest id
            pooled = tokens[torch.arange(len(tokens), device=tokens.device), inputs.argmax(-1)]
        else:
            pooled = tokens[:, 0]  # CLS
        embedding = F.normalize(self.modality_heads[modality](pooled), dim=-1)  # (B, D) -> (B, J)
        return self.modality_postprocessors[modality](embedding), tapped
