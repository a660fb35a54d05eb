"""Train the mini ImageBind, its patch decoder and its memory gates on the mini world.

    python recipes/mini/stage1_imagebind.py --out runs/mini/first
    python recipes/mini/stage1_imagebind.py --out runs/mini/a --start runs/mini/first --steps 5900 --lr 3e-4

The second form goes on from a run, with pictures at twice the side in every other step: as joint tiles are encoded.

Five losses share one forward pass of the vision tower:
  memory    the distance of a patch to the nearest patch of another photograph of the same product, gated and fused as
            the self-prompted memory does it, must say which patches are defective, and whether the picture is;
  text map  decoded patches against sentences about a normal and a damaged product (the zero-shot map), as AnomalyGPT;
  joined    so must the sum of both;
  dense     decoded defective patches against the names of the defect types;
  contrast  whole pictures against their captions, as CLIP and ImageBind.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from pool import TOWER_FAMILIES, TRAIN_FAMILIES, TRAIN_TYPES, Pool
from spgdd.imagebind import MINI, ImageBind, TextTokenizer
from spgdd.selfprompt import memory
from spgdd.selfprompt.comparison import Comparison, word_evidence
from spgdd.selfprompt.focuser import PatchDecoder
from spgdd.selfprompt.memory import Memory
from texts import CAPTIONS, NAMES, OTHERS, PHRASES, TextBank, build_tokenizer

SCALES = (1, 3)


class Trainee(nn.Module):
    """Everything that stage 1 trains."""

    def __init__(self):
        super().__init__()
        self.imagebind = ImageBind(MINI)
        self.image_decoder = PatchDecoder(MINI.vision.width, MINI.joint, len(MINI.taps))
        self.memory = Memory(len(MINI.taps), MINI.vision.width, SCALES)
        self.comparison = Comparison(len(MINI.taps))
        # Not learned, as the generated world overrates the memory and the words of the last tap: fit_comparison.py sets
        # them.
        self.comparison.steepness.requires_grad_(False).fill_(8.0)
        self.comparison.trust.requires_grad_(False).fill_(1 / len(MINI.taps))
        self.steepness, self.threshold = nn.Parameter(torch.tensor(12.0)), nn.Parameter(torch.tensor(0.35))

    def encode_text(self, ids: Tensor) -> Tensor:
        return F.normalize(self.imagebind.encode_text(ids).float(), dim=-1)


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


def losses(
    model: Trainee, batch, bank: TextBank, few: bool, compare: Callable
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parts of the loss, and what tells a person how it goes.

    ``few``: two normal pictures to compare with. ``compare``: the memory's, or what a compiler made of it.
    """
    groups, device = len(batch.pixels), batch.pixels.device
    features = model.imagebind.encode_image(batch.pixels.flatten(0, 1))
    patches = features.patches.unflatten(0, (groups, 4))  # (G, 4, L, N, D)
    covered = batch.coverage.flatten(2)  # (G, 4, N)
    target, weight = (covered > 0.03).float(), ((covered > 0.03) | (covered == 0)).float()
    bad = (batch.types >= 0).float()  # (G, 4)

    # text map: one of the family's names, two normal and two damaged sentences
    name = torch.randint(NAMES + OTHERS, (len(bank.anchors),), device=device)
    chosen = torch.cat([torch.rand(n, device=device).topk(2).indices + start for n, start in ((14, 0), (10, 14))])
    anchors = bank.anchors[torch.arange(len(name), device=device), name][:, chosen]  # (F, 4, LENGTH)
    anchors = model.encode_text(anchors.flatten(0, 1)).unflatten(0, (-1, 2, 2)).mean(2)  # (F, 2, J)
    anchors = F.normalize(anchors, dim=-1)[batch.families].repeat_interleave(4, 0)  # (G * 4, 2, J)
    decoded = model.image_decoder(patches.flatten(0, 1))  # (G * 4, L, N, J)
    text = word_evidence(decoded, anchors)  # (G * 4, L, N)
    clamped = text.clamp(-15, 15)
    t, w = (v.flatten(0, 1)[:, None].expand_as(text) for v in (target, weight))
    out = {
        "text map": map_loss(clamped, t, w),
        "text picture": F.binary_cross_entropy_with_logits(picture_logit(clamped.mean(1)), bad.flatten()),
    }

    # memory: the damaged pictures, and the second good one, against the first good one; or the damaged against both
    normal, tests = (slice(0, 2), slice(2, 4)) if few else (slice(0, 1), slice(1, 4))
    queries = patches[:, tests].flatten(0, 1)  # (G * T, L, N, D)
    distances, _ = compare(queries, model.memory.tokens(patches[:, normal]))
    fused = model.memory.fuse(distances)  # (G * T, N)
    t, w, b = (value[:, tests].flatten(0, 1) for value in (target, weight, bad))
    logits = model.steepness * (fused - model.threshold)
    single = model.steepness * (distances[:, :, 0] - model.threshold)  # (G * T, L, N): each tap must be of use
    alone = map_loss(single, t[:, None].expand_as(single), w[:, None].expand_as(single))
    out |= {
        "memory": map_loss(logits, t, w) + 0.3 * alone,
        "memory picture": F.binary_cross_entropy_with_logits(picture_logit(logits), b),
    }

    joined = model.comparison(fused, text.unflatten(0, (groups, 4))[:, tests].flatten(0, 1))
    out |= {
        "joined": map_loss(joined, t, w),
        "joined picture": F.binary_cross_entropy_with_logits(picture_logit(joined), b),
    }

    # dense: defective patches of the two last taps against the types' names
    phrases = model.encode_text(bank.phrases[:, torch.randint(PHRASES, (1,), device=device)][:, 0])  # (19, J)
    inside = (covered > 0.25).flatten()  # (G * 4 * N)
    order = (inside + torch.rand(len(inside), device=device)).topk(8 * groups).indices  # defective ones first
    vectors = decoded[:, -2:].transpose(1, 2).flatten(0, 1)[order]  # (n, 2, J)
    vectors = F.normalize(vectors.float(), dim=-1)
    kinds = torch.where(inside, batch.types.flatten().repeat_interleave(covered.shape[-1]) + 1, 0)[order]
    kinds = kinds[:, None].expand(-1, 2)
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
            "memory accuracy": ((picture_logit(logits) > 0).float() == b).float().mean(),
            "text accuracy": ((picture_logit(clamped.mean(1)) > 0).float() == bad.flatten()).float().mean(),
            "joined accuracy": ((picture_logit(joined) > 0).float() == b).float().mean(),
        }
    return out, hits


WEIGHTS = {
    "memory": 0.5,
    "memory picture": 0.25,
    "text map": 0.5,
    "text picture": 0.25,
    "joined": 1.0,
    "joined picture": 0.5,
    "dense": 0.25,
    "contrast": 0.25,
}
AVERAGED = 4  # steps between updates of the averaged weights


class Step:
    """One training step; on a GPU recorded once and replayed, as launching its kernels one by one takes longer."""

    def __init__(self, run: Callable[[], dict[str, Tensor]], device: torch.device):
        self.run, self.graph = run, None
        if device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.values = run()

    def __call__(self) -> dict[str, Tensor]:
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6800)
    parser.add_argument("--pause", type=float, default=math.inf, help="minutes to stop after; the same command resumes")
    parser.add_argument("--groups", type=int, default=128, help="products a step; four photographs of each")
    parser.add_argument("--pool", type=int, default=24576, help="products kept on the device (0.6 MB each)")
    parser.add_argument("--renew", type=int, default=768, help="products drawn at a time")
    parser.add_argument("--every", type=int, default=24, help="steps between drawings")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="folder of the run to go on from, at both sizes")
    parser.add_argument("--disturb", type=float, default=0.0, help="how unlike the light of a product's pictures is")
    parser.add_argument("--coarse", type=float, default=0.25, help="share of products with half the detail")
    parser.add_argument("--dense", type=float, default=WEIGHTS["dense"], help="weight of the dense loss")
    parser.add_argument(
        "--families", type=int, default=len(TOWER_FAMILIES), help=f"use the first so many of {len(TRAIN_FAMILIES)}"
    )
    parser.add_argument("--types", type=int, default=len(TRAIN_TYPES), help="use the first so many (ablation)")
    parser.add_argument("--without", nargs="*", default=[], choices=WEIGHTS, help="leave losses out (ablation)")
    args = parser.parse_args()
    weights = WEIGHTS | {"dense": args.dense}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    model = Trainee().to(device)
    if args.start:
        tokenizer = TextTokenizer.load(args.start / "text_tokenizer")
        model.imagebind.load_state_dict(load_file(args.start / "imagebind.safetensors"))
        model.load_state_dict(load_file(args.start / "stage1_maps.safetensors"), strict=False)
    else:
        tokenizer = build_tokenizer(args.out / "text_tokenizer", MINI.vocab_size)
    bank = TextBank(tokenizer, device)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999**AVERAGED)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema)
    compare = model.memory.compare
    if device.type == "cuda":
        memory.CHUNK = 2**27  # pictures of twice the side have four times the patches
        model.imagebind.modality_trunks["vision"].compile(dynamic=False)
        compare = torch.compile(compare, dynamic=False)
    rate = torch.tensor(args.lr, device=device)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
        capturable=device.type == "cuda",
    )

    resumable, start = args.out / "stage1.pt", 0
    if resumable.exists():
        saved = torch.load(resumable, map_location=device, weights_only=True)
        for name, part in (("model", model), ("average", average), ("optimiser", optimiser)):
            part.load_state_dict(saved[name])
        for group in optimiser.param_groups:
            group["lr"] = rate
        start = saved["step"]
        print(f"going on after step {start}")
    started = time.perf_counter()
    times = 2 if args.start else 1  # the side of the pictures, in 224 pixels
    families = [*dict.fromkeys((*TOWER_FAMILIES, *TRAIN_FAMILIES))][: args.families]
    pool = Pool(
        args.pool // times**2, device, args.seed + start, families, TRAIN_TYPES[: args.types],
        224 * times, args.disturb, args.coarse,
    )  # fmt: skip
    renew = args.renew // times**2
    for _ in tqdm(range(args.pool // args.renew + 1), desc="first photographs"):
        pool.renew(renew)
    print(f"pool filled in {time.perf_counter() - started:.0f} s")

    def run(few: bool, smaller: int) -> dict[str, Tensor]:
        batch = pool.batch(args.groups * smaller**2 // times**2, smaller)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            parts, hits = losses(model, batch, bank, few, compare)
            loss = sum(weights[name] * value for name, value in parts.items() if name not in args.without)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in (parts | hits).items()}}

    def keep(done: int) -> None:
        parts = {"model": model, "average": average, "optimiser": optimiser}
        partial_file = resumable.with_suffix(".partial")
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": done}, partial_file)
        partial_file.replace(resumable)

    rate.fill_(0)  # what is recorded does not train yet
    sizes = {1: ((False, 1), (True, 1)), 2: ((False, 2), (True, 1), (True, 2), (False, 1))}
    steps = [Step(partial(run, *how), device) for how in sizes[times]]
    print(f"ready after {time.perf_counter() - started:.0f} s")
    started, log = time.perf_counter(), (args.out / "stage1.jsonl").open("a")
    bar = tqdm(range(start, args.steps), desc="stage 1", initial=start, total=args.steps, mininterval=5)
    step = start - 1
    for step in bar:
        warm, done = min(1, (step + 1) / 300), step / args.steps
        rate.fill_(args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))))
        values = steps[step % len(steps)]()
        if step % args.every == 0:
            pool.renew(renew)
        if step % AVERAGED == 0:
            average.update_parameters(model)
        if step % 50 == 0:
            values = {name: round(value.item(), 4) for name, value in values.items()}
            minutes = round((time.perf_counter() - started) / 60, 2)
            if not math.isfinite(values["loss"]):
                raise SystemExit(f"the loss is not finite at step {step}: {values}")
            print(json.dumps({"step": step, "minutes": minutes, **values}), file=log, flush=True)
            if minutes > args.pause:
                break
        if step % 1000 == 999:
            keep(step + 1)
    keep(step + 1)
    state = average.module.state_dict()
    print(f"{step + 1} steps")
    state = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    prefix = "imagebind."
    save_file(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        args.out / "imagebind.safetensors",
    )
    save_file({k: v for k, v in state.items() if not k.startswith(prefix)}, args.out / "stage1_maps.safetensors")


if __name__ == "__main__":
    main()
