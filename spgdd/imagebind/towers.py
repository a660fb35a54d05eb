"""The six ImageBind towers, with the parameter names of ``imagebind_huge.pth``.

A tower is preprocessor -> trunk -> head -> postprocessor. Tokens are batch-first, (B, N, D), all the way.
The stochastic depth and dropout of the published training are left out: they do nothing in inference.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.imagebind.config import ImageBindConfig, ImageFeatures, TowerConfig
from spgdd.imagebind.preprocess import MEAN, STD

LOGIT_SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}  # text: initial
PATCH_GRIDS = {"audio": (12, 19), "depth": (14, 14), "thermal": (14, 14)}  # rows and columns of 16 px patches
IMU_CHANNELS, IMU_SAMPLES, IMU_WINDOW = 6, 2000, 8
LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # stems alone keep torch's 1e-5


class Attention(nn.Module):
    """Self-attention with the parameters of ``nn.MultiheadAttention(add_bias_kv=bias_kv)``."""

    def __init__(self, width: int, heads: int, bias_kv: bool):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        # One learned key and value that every token may attend to.
        self.bias_k = nn.Parameter(torch.zeros(1, 1, width)) if bias_kv else None
        self.bias_v = nn.Parameter(torch.zeros(1, 1, width)) if bias_kv else None
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = F.linear(tokens, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)  # (B, N+1, D)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
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

    def __init__(self, width: int, heads: int, bias_kv: bool):
        super().__init__()
        self.attn = Attention(width, heads, bias_kv)
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
    def __init__(self, size: TowerConfig, pre_norm: bool, bias_kv: bool):
        super().__init__()
        self.pre_transformer_layer = nn.Sequential(LayerNorm(size.width)) if pre_norm else nn.Sequential()
        self.blocks = nn.ModuleList(Block(size.width, size.heads, bias_kv) for _ in range(size.depth))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, taps=()) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, N, D) after all blocks, and a list of those after each block named in ``taps``."""
        tokens, tapped = self.pre_transformer_layer(tokens), []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, mask)
            if index in taps:
                tapped.append(tokens)
        return tokens, tapped


class VisionStem(nn.Module):
    """Patches of images (B, 3, H, W) or of 2-frame clips (B, 3, 2, H, W) -> (B, gh, gw, D)."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        size = (2, patch, patch)
        self.proj = nn.Sequential(nn.Identity(), nn.Conv3d(3, width, size, stride=size, bias=False))

    def forward(self, pixels: Tensor) -> Tensor:
        conv = self.proj[1]
        if pixels.ndim == 4:  # an image is a clip of two equal frames, so the two halves of the kernel add up
            tokens = F.conv2d(pixels, conv.weight.sum(2), stride=conv.stride[1:])
        else:
            tokens = conv(pixels).squeeze(2)  # (B, D, 1, gh, gw) -> (B, D, gh, gw)
        return tokens.permute(0, 2, 3, 1)


class MapStem(nn.Module):
    """Patches of one-channel maps (B, 1, H, W) -> (B, gh, gw, D): spectrogram, depth or thermal image."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(1, width, 16, stride=stride, bias=False)
        self.norm_layer = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm_layer(self.proj(maps).permute(0, 2, 3, 1))


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


class IMUPreprocessor(nn.Module):
    """Signal (B, 6, 2000) -> CLS and one token per window of 8 samples, (B, 251, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + IMU_SAMPLES // IMU_WINDOW, width).normal_(std=0.02))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        project = nn.Linear(IMU_CHANNELS * IMU_WINDOW, width, bias=False)
        self.imu_stem = nn.Sequential(OrderedDict(proj=project, norm_layer=nn.LayerNorm(width)))

    def forward(self, signal: Tensor) -> Tensor:
        windows = signal.unfold(-1, IMU_WINDOW, IMU_WINDOW).transpose(1, 2)  # (B, 250, 6, 8)
        tokens = self.imu_stem(windows.flatten(2))  # (B, 250, D)
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed


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
    """Multiply by exp(log_logit_scale), at most 100; the scale is learned or a fixed buffer."""

    def __init__(self, scale: float, learned: bool):
        super().__init__()
        self.log_logit_scale = (nn.Parameter if learned else nn.Buffer)(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log_logit_scale.exp().clamp(max=100)


def build_preprocessor(modality: str, config: ImageBindConfig) -> nn.Module:
    width = config.tower(modality).width
    if modality == "vision":
        side = config.image_size // config.patch
        return GridPreprocessor(width, "rgbt_stem", VisionStem(width, config.patch), (side, side))
    if modality == "text":
        return TextPreprocessor(width, config.vocab_size, config.context)
    if modality == "imu":
        return IMUPreprocessor(width)
    stem = MapStem(width, stride=10 if modality == "audio" else 16)
    return GridPreprocessor(
        width, "depth_stem" if modality == "depth" else "rgbt_stem", stem, PATCH_GRIDS[modality]
    )


def build_head(modality: str, width: int, joint: int) -> nn.Module:
    norm, project = LayerNorm(width), nn.Linear(width, joint, bias=False)
    if modality == "text":
        return nn.Sequential(OrderedDict(proj=nn.Sequential(norm, project)))
    # The published heads pick the CLS token at index 1 (done before the head here); imu has dropout at 2.
    unused = [nn.Identity()] * (2 if modality == "imu" else 1)
    return nn.Sequential(norm, *unused, project)


def build_postprocessor(modality: str) -> nn.Module:
    """What follows the scaling to unit length, which is index 0 in the published model."""
    if modality == "vision":
        return nn.Identity()
    return nn.Sequential(nn.Identity(), LogitScale(LOGIT_SCALES[modality], learned=modality == "text"))


class ImageBind(nn.Module):
    """The towers asked for, each embedding its inputs in the same space of width J.

    ``modalities`` are names out of ``MODALITIES``. Weights are random here; ``load_imagebind`` reads a file.
    """

    mean, std = MEAN, STD  # of its pictures

    def __init__(self, config: ImageBindConfig, modalities=("vision", "text")):
        super().__init__()
        sizes = {m: config.tower(m) for m in modalities}
        self.config, self.modalities = config, tuple(sizes)
        self.taps, self.width, self.joint = len(config.taps), config.vision.width, config.joint
        self.modality_preprocessors = nn.ModuleDict({m: build_preprocessor(m, config) for m in sizes})
        self.modality_trunks = nn.ModuleDict(
            {m: Trunk(size, m == "vision", m not in ("vision", "text")) for m, size in sizes.items()}
        )
        self.modality_heads = nn.ModuleDict(
            {m: build_head(m, size.width, config.joint) for m, size in sizes.items()}
        )
        self.modality_postprocessors = nn.ModuleDict({m: build_postprocessor(m) for m in sizes})

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

    def encode(self, modality: str, inputs: Tensor) -> Tensor:
        """Embedding (B, J) of any modality: unit length for vision, else as long as its logit scale.

        Inputs: vision (B, 3, H, W), text ids (B, 77), audio (B, 1, 128, 204), depth and thermal
        (B, 1, 224, 224), imu (B, 6, 2000). With clips as second dimension, as in (B, clips, 1, 128, 204) for
        audio or (B, clips, 3, 2, H, W) for video, it is their mean, not normalised again (as published).
        """
        if inputs.ndim < 5:
            return self._run_tower(modality, inputs)[0]
        embedding = self._run_tower(modality, inputs.flatten(0, 1))[0]  # (B*clips, J)
        return embedding.unflatten(0, inputs.shape[:2]).mean(1)

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
