"""Images a second of ImageBind-Huge's vision tower, beside the layout in which it was published.

    python benchmarks/vision_tower.py           # a GPU with 8 GB; about a minute
    python benchmarks/vision_tower.py --toy     # seconds, on any machine

Random weights, the same in all rows; batches lie on the device already; the taps' patch tokens are part of the work.
The published layout is rebuilt here: an image repeated as a clip of two frames, Conv3d, tokens in sequence-first order,
nn.MultiheadAttention, float16.
"""

import argparse
import copy
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.imagebind import HUGE, MINI, ImageBind


class Published(nn.Module):
    """The vision tower of an ``ImageBind``, with the same weights in the published layout."""

    def __init__(self, imagebind: ImageBind):
        super().__init__()
        size, self.taps = imagebind.config.vision, imagebind.config.taps
        parts = imagebind.modality_preprocessors, imagebind.modality_trunks, imagebind.modality_heads
        self.stem, self.trunk, self.head = (copy.deepcopy(part["vision"]) for part in parts)
        for block in self.trunk.blocks:
            attention = nn.MultiheadAttention(size.width, size.heads)
            attention.load_state_dict(block.attn.state_dict())
            block.attn = attention.to(block.norm_1.weight)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pixels (B, 3, 224, 224) -> embedding (B, J) and tokens (1 + N, B, D) of each tap."""
        clips = pixels.to(self.head[0].weight)[:, :, None].repeat(1, 1, 2, 1, 1)  # (B, 3, 2, 224, 224)
        tokens = self.stem.rgbt_stem.proj[1](clips).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = torch.cat([self.stem.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.stem.pos_embedding_helper.pos_embed
        tokens, tapped = self.trunk.pre_transformer_layer(tokens).transpose(0, 1), []  # (1 + N, B, D)
        for index, block in enumerate(self.trunk.blocks):
            seen = block.norm_1(tokens)
            tokens = tokens + block.attn(seen, seen, seen, need_weights=False)[0]
            tokens = tokens + block.mlp(block.norm_2(tokens))
            if index in self.taps:
                tapped.append(tokens)
        return F.normalize(self.head(tokens.transpose(0, 1))[:, 0], dim=-1), tapped


def seconds_each(run, seconds: float = 2.0) -> float:
    """Seconds of one call, as a mean over at least so many seconds, after three calls."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for _ in range(3):
        run()
    finish()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            run()
        calls += 4
        finish()
    return (time.perf_counter() - start) / calls


@torch.inference_mode()
def main(toy: bool, batch: int, seconds: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        ours = ImageBind(MINI if toy else HUGE, ("vision",)).eval()
        pixels = torch.randn(batch, 3, 224, 224)
    published = Published(ours).half()
    ours.bfloat16()
    apart = (published(pixels[:2])[0].float() - ours.encode_image(pixels[:2]).embedding.float()).abs().max()
    print(f"{torch.__version__}, {device}, batch {batch}; embeddings differ by at most {apart:.4f}", flush=True)
    compiled = copy.deepcopy(ours)
    for block in compiled.modality_trunks["vision"].blocks:
        block.compile()
    rows = {"published, float16": published, "ours, bfloat16": ours.encode_image, "and compiled": compiled.encode_image}
    base = None
    for name, run in rows.items():
        images = batch / min(seconds_each(partial(run, pixels), seconds) for _ in range(3))
        base = base or images
        print(f"{name:<20}{images:9.1f} images/s{images / base:7.2f} x", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="the mini tower")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each of three measurements of a row")
    options = parser.parse_args()
    main(options.toy, options.batch, options.seconds)
