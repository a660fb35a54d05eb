"""Train the mini ImageBind, its patch decoder and its memory gates on the mini world.

    python recipes/mini/stage1_imagebind.py --out runs/mini

Four losses share one forward pass of the vision tower:
  memory    the distance of a patch to the nearest patch of another photograph of the same product, gated and fused as
            the self-prompted memory does it, must say which patches are defective, and whether the picture is;
  text map  decoded patches against sentences about a normal and a damaged product (the zero-shot map), as AnomalyGPT;
  dense     decoded defective patches against the names of the defect types;
  contrast  whole pictures against their captions, as CLIP and ImageBind.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from pool import Pool
from safetensors.torch import save_file
from texts import CAPTIONS, NAMES, OTHERS, PHRASES, TextBank, build_tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from spgdd.imagebind import MINI, ImageBind
from spgdd.selfprompt.focuser import TEMPERATURE, PatchDecoder
from spgdd.selfprompt.memory import Memory

SCALES = (1, 3, 5)


class Trainee(nn.Module):
    """Everything that stage 1 trains."""

    def __init__(self):
        super().__init__()
        self.imagebind = ImageBind(MINI)
        self.image_decoder = PatchDecoder(MINI.vision.width, MINI.joint, len(MINI.taps))
        self.memory = Memory(len(MINI.taps), MINI.vision.width, SCALES)
        self.steepness, self.threshold = nn.Parameter(torch.tensor(12.0)), nn.Parameter(torch.tensor(0.35))

    def encode_text(self, ids: Tensor) -> Tensor:
        return F.normalize(self.imagebind.encode_text(ids).float(), dim=-1)


def neighbourhood_means(grid: int, scale: int, device) -> Tensor:
    """(N, N) matrix that averages each patch of a grid with its ``scale`` x ``scale`` neighbourhood."""
    row, column = torch.meshgrid(*[torch.arange(grid, device=device)] * 2, indexing="ij")
    near = [(v.flatten()[:, None] - v.flatten()).abs() <= scale // 2 for v in (row, column)]
    return F.normalize((near[0] & near[1]).float(), p=1, dim=1)


def memory_distances(memory: Memory, query: Tensor, normal: Tensor) -> Tensor:
    """(G, T, L, S, N): distance of each patch of ``query`` (G, T, L, N, D) to the nearest patch of the same product's
    ``normal`` (G, K, L, N, D)."""
    groups, tests, _, places, _ = query.shape
    both = torch.cat([query, normal], 1)  # (G, T + K, L, N, D)
    rows = []
    for scale in memory.scales:
        means = neighbourhood_means(16, scale, query.device).to(query.dtype)
        tokens = both if scale == 1 else means @ both
        for tap, gate in enumerate(memory.gates[:, memory.scales.index(scale)]):
            units = F.normalize(tokens[:, :, tap].float() * gate, dim=-1).to(query.dtype)
            q, m = (
                units[:, :tests].flatten(1, 2),
                units[:, tests:].flatten(1, 2),
            )  # (G, T * N, D), (G, K * N, D)
            rows.append(1 - (q @ m.transpose(1, 2)).amax(-1).float().unflatten(1, (tests, places)))
    return torch.stack(rows, 2).unflatten(2, memory.gates.shape[1::-1]).transpose(2, 3)  # (G, T, S, L, N) -> L, S


def text_map_logits(decoded: Tensor, anchors: Tensor) -> Tensor:
    """(B, L, N): log-odds of abnormal for decoded tokens (B, L, N, J) and unit anchors (B, 2, J)."""
    difference = (anchors[:, 1] - anchors[:, 0]).to(decoded.dtype)[:, None, :, None]  # (B, 1, J, 1)
    length = torch.linalg.vector_norm(decoded, dim=-1, dtype=torch.float32)
    return (decoded @ difference)[..., 0].float() / length / TEMPERATURE


def map_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Balanced cross-entropy and dice on patch logits (..., N); ``weight`` 0 leaves a patch out."""
    p = logits.sigmoid()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight
    positive, negative = (target * weight).sum(), ((1 - target) * weight).sum()
    balanced = (bce * target).sum() / positive.clamp(min=1) + (bce * (1 - target)).sum() / negative.clamp(min=1)
    overlap, total = (p * target * weight).sum(-1), (p * weight).sum(-1) + (target * weight).sum(-1)
    return 0.5 * balanced + (1 - (2 * overlap + 1) / (total + 1)).mean()


def picture_logit(logits: Tensor) -> Tensor:
    """A soft maximum over patches (..., N)."""
    return logits.topk(3, dim=-1).values.mean(-1)


def losses(model: Trainee, batch, bank: TextBank, few: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parts of the loss, and what tells a person how it goes. ``few``: two normal pictures to compare with."""
    groups, device = len(batch.pixels), batch.pixels.device
    features = model.imagebind.encode_image(batch.pixels.flatten(0, 1))
    patches = features.patches.unflatten(0, (groups, 4))  # (G, 4, L, N, D)
    covered = batch.coverage.flatten(2)  # (G, 4, N)
    target, weight = (covered > 0.03).float(), ((covered > 0.03) | (covered == 0)).float()
    bad = (batch.types >= 0).float()  # (G, 4)

    # memory: the damaged pictures, and the second good one, against the first good one; or the damaged against both
    normal, tests = (patches[:, :2], (2, 3)) if few else (patches[:, :1], (1, 2, 3))
    distances = memory_distances(model.memory, patches[:, tests], normal)  # (G, T, L, S, N)
    fusion = model.memory.fusion.flatten().softmax(0).view(*model.memory.fusion.shape, 1)
    fused = model.steepness * ((distances * fusion).sum((2, 3)) - model.threshold)  # (G, T, N)
    single = model.steepness * (distances[:, :, :, 0] - model.threshold)  # (G, T, L, N): each tap must be of use
    t, w, b = target[:, tests], weight[:, tests], bad[:, tests]
    alone = map_loss(single, t[:, :, None].expand_as(single), w[:, :, None].expand_as(single))
    out = {
        "memory": map_loss(fused, t, w) + 0.3 * alone,
        "memory picture": F.binary_cross_entropy_with_logits(picture_logit(fused), b),
    }

    # text map: one of the family's names, two normal and two damaged sentences
    families, row = batch.families.unique(return_inverse=True)
    name = torch.randint(NAMES + OTHERS, (len(families),), device=device)
    chosen = torch.cat([torch.randperm(14)[:2], 14 + torch.randperm(10)[:2]]).to(device)
    anchors = model.encode_text(bank.anchors[families, name][:, chosen].flatten(0, 1))  # (f * 4, J)
    anchors = F.normalize(anchors.unflatten(0, (-1, 2, 2)).mean(2), dim=-1)[row].repeat_interleave(4, 0)
    decoded = model.image_decoder(patches.flatten(0, 1))  # (G * 4, L, N, J)
    text = text_map_logits(decoded, anchors).clamp(-15, 15)  # (G * 4, L, N)
    t, w = (v.flatten(0, 1)[:, None].expand_as(text) for v in (target, weight))
    out["text map"] = map_loss(text, t, w)
    out["text picture"] = F.binary_cross_entropy_with_logits(picture_logit(text.mean(1)), bad.flatten())

    # dense: defective patches of the two last taps against the types' names
    phrases = model.encode_text(bank.phrases[:, torch.randint(PHRASES, (1,)).item()])  # (19, J)
    inside = (covered > 0.25).flatten()  # (G * 4 * N)
    order = (inside + torch.rand(len(inside), device=device)).topk(8 * groups).indices  # defective ones first
    vectors = decoded[:, -2:].transpose(1, 2).flatten(0, 1)[order]  # (n, 2, J)
    vectors = F.normalize(vectors.float(), dim=-1)
    kinds = torch.where(inside, batch.types.flatten().repeat_interleave(256) + 1, 0)[order][:, None].expand(-1, 2)
    out["dense"] = F.cross_entropy((vectors @ phrases.T * 20).flatten(0, 1), kinds.flatten())

    # contrast: captions; pictures that share family, type and place share their captions
    rows = bank.caption_rows(batch.types, batch.cells)
    key = (batch.families[:, None] * 1000 + rows).flatten()
    names = torch.randint(NAMES, key.shape, device=device)
    ids = bank.captions[
        batch.families.repeat_interleave(4),
        names,
        rows.flatten(),
        torch.randint(CAPTIONS, key.shape, device=device),
    ]
    text_vectors = model.encode_text(ids)
    scale = model.imagebind.modality_postprocessors["text"][1].log_logit_scale.exp().clamp(max=100)
    similarity = features.embedding.float() @ text_vectors.T * scale
    same = (key[:, None] == key[None]).float()
    same = same / same.sum(1, keepdim=True)
    out["contrast"] = -0.5 * (same * (similarity.log_softmax(1) + similarity.T.log_softmax(1))).sum(1).mean()

    with torch.no_grad():
        hits = {
            "type accuracy": ((vectors @ phrases.T).argmax(-1) == kinds).float().mean(),
            "memory accuracy": ((picture_logit(fused) > 0).float() == b).float().mean(),
            "text accuracy": ((picture_logit(text.mean(1)) > 0).flatten().float() == bad.flatten()).float().mean(),
        }
    return out, hits


WEIGHTS = {
    "memory": 1.0,
    "memory picture": 0.5,
    "text map": 0.5,
    "text picture": 0.25,
    "dense": 0.25,
    "contrast": 0.25,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="training time; the schedule follows the clock")
    parser.add_argument("--groups", type=int, default=128, help="products a step; four photographs of each")
    parser.add_argument("--pool", type=int, default=16384, help="products kept on the device (0.6 MB each)")
    parser.add_argument("--renew", type=int, default=384, help="products drawn anew every eighth step")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    bank = TextBank(build_tokenizer(args.out / "text_tokenizer", MINI.vocab_size), device)
    model = Trainee().to(device)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    if not args.no_compile:
        model.imagebind.modality_trunks["vision"].compile()
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )

    started = time.perf_counter()
    pool = Pool(args.pool, device, args.seed)
    for _ in tqdm(range(args.pool // 512 + 1), desc="first photographs"):
        pool.renew(min(512, args.pool))
    print(f"pool filled in {time.perf_counter() - started:.0f} s")
    started, step, log = time.perf_counter(), 0, (args.out / "stage1.jsonl").open("w")
    bar = tqdm(total=100, desc="stage 1", bar_format="{desc} {percentage:3.0f}% {postfix}")
    while (done := (time.perf_counter() - started) / (60 * args.minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 300) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        if step % 8 == 0:
            pool.renew(args.renew)
        batch = pool.batch(args.groups)
        with torch.autocast(device.type, torch.bfloat16):
            parts, hits = losses(model, batch, bank, few=step % 2 == 1)
            loss = sum(WEIGHTS[name] * value for name, value in parts.items())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(model)
        if step % 50 == 0:
            values = {k: round(v.item(), 4) for k, v in (parts | hits).items()}
            if not math.isfinite(loss.item()):
                raise SystemExit(f"the loss is {loss.item()} at step {step}: {values}")
            print(
                json.dumps({"step": step, "minutes": round((time.perf_counter() - started) / 60, 2), **values}),
                file=log,
                flush=True,
            )
            bar.set_postfix_str(f"step {step} loss {loss.item():.3f} {values}", refresh=step % 500 == 0)
            bar.update(100 * done - bar.n)
        step += 1
    state = average.module.state_dict()
    print(
        f"{step} steps, {step * args.groups * 4:,} photographs seen; threshold {state['threshold'].item():.3f}, "
        f"steepness {state['steepness'].item():.2f}, fusion {state['memory.fusion'].flatten().softmax(0).tolist()}"
    )
    state = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    prefix = "imagebind."
    save_file(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        args.out / "imagebind.safetensors",
    )
    save_file({k: v for k, v in state.items() if not k.startswith(prefix)}, args.out / "maps.safetensors")


if __name__ == "__main__":
    main()
