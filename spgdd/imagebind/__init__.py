"""ImageBind: one embedding space for images, text and four more senses."""

from spgdd.imagebind.config import HUGE, MINI, MODALITIES, ImageBindConfig, TowerConfig
from spgdd.imagebind.preprocess import normalise, preprocess, to_pixels
from spgdd.imagebind.pretrained import load_imagebind
from spgdd.imagebind.text_tokenizer import TextTokenizer
from spgdd.imagebind.towers import ImageBind, ImageFeatures

__all__ = [
    "HUGE", "MINI", "MODALITIES", "ImageBind", "ImageBindConfig", "ImageFeatures", "TextTokenizer",
    "TowerConfig", "load_imagebind", "normalise", "preprocess", "to_pixels",
]  # fmt: skip
