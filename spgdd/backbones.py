"""Vision transformers of the Hugging Face hub that see in place of ImageBind, such as DINOv2 (Oquab et al. 2023)."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.errors import WeightsError
from spgdd.imagebind import ImageFeatures
from spgdd.tensors import AGAIN, late_progress


class Backbone(nn.Module):
    """Sees as ``ImageBind`` does, by the same ``encode_image`` and attributes, and has no words."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network, self.mean, self.std = network, mean, std
        self.taps, self.patch = len(network.out_indices), network.config.patch_size
        self.width = self.joint = network.config.hidden_size  # a picture's embedding is the CLS token

    @property
    def signature(self) -> list[Tensor]:
        """Weights that tell it apart from others, see ``SPGDD.fingerprint``."""
        return list(self.parameters())

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Normalised pixels (B, 3, H, W) -> embedding (B, D), unit length, and patch tokens (B, L, N, D)."""
        layers = self.network(pixels.to(self.network.dtype)).feature_maps  # L of (B, 1 + R + N, D): CLS, R registers
        patches = pixels.shape[-2] // self.patch * (pixels.shape[-1] // self.patch)
        tokens = torch.stack([layer[:, -patches:] for layer in layers], dim=1)
        return ImageFeatures(F.normalize(layers[-1][:, 0], dim=-1), tokens)


def load_backbone(folder: Path, layers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Backbone:
    """What ``transformers.AutoBackbone`` knows, frozen and in evaluation mode, from the hub's files.

    ``layers``: whose tokens, normalised as the network's output, are compared: 1 is the first, -1 the last. Nothing is
    fetched. Raises WeightsError for files that are damaged or do not belong together.
    """
    from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig  # seconds to import

    try:
        known = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        local = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, out_indices=list(layers), reshape_hidden_states=False, **local)
        kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]  # AutoBackbone itself would ask the hub about the folder
        with late_progress():
            network, report = kind.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **local
            )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} tensors, the first is {missing[0]}")
        backbone = Backbone(network, tuple(known["image_mean"]), tuple(known["image_std"]))
    except Exception as error:  # transformers raises whatever its parts do
        reason = " ".join(str(error).split())
        raise WeightsError(f"{folder} holds no backbone that can be used: {reason}. {AGAIN}") from error
    return backbone.to(device).eval().requires_grad_(False)
