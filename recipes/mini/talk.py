"""Photographs to talk about: features and maps of the frozen stage 1, and what is known about each picture."""

import functools
import json
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from pool import GROUP, TRAIN_FAMILIES, TRAIN_TYPES
from torch import Tensor
from tqdm import tqdm

from spgdd.imagebind import ImageFeatures
from spgdd.imagebind.preprocess import normalise
from spgdd.model import SPGDD, load_model
from spgdd.profiles import get_profile
from spgdd.selfprompt import zero_shot_map
from spgdd.selfprompt.focuser import enlarge
from spgdd.tadd import words
from spgdd.tadd.miniworld.world import TYPES, describe, photograph, possible_types
from spgdd.weights.delta import apply_delta, load_delta


@dataclass
class Talk:
    """What is known of n pictures."""

    embedding: Tensor  # (n, J)
    patches: Tensor  # (n, L, N, D) in half precision
    few_shot: Tensor  # (n, 1, 16, 16) map against one normal picture
    zero_shot: Tensor  # (n, 1, 16, 16) map against the product's name
    samples: list[dict]

    def __post_init__(self):
        bad = [bool(sample["defects"]) for sample in self.samples]
        self.sides = [[i for i, side in enumerate(bad) if side == wanted] for wanted in (False, True)]

    def pictures(self, rows: list[int]) -> ImageFeatures:
        return ImageFeatures(self.embedding[rows], self.patches[rows].float())

    def batch(self, count: int, rng: random.Random) -> tuple[ImageFeatures, Tensor, list]:
        """Features, maps (count, 1, 224, 224), conversations. Half of the pictures are good, 3 of 4 maps few-shot."""
        rows = [rng.choice(self.sides[i % 2]) for i in range(count)]
        few = torch.rand(count, 1, 1, 1, device=self.few_shot.device) < 0.75
        maps = torch.where(few, self.few_shot[rows], self.zero_shot[rows])
        talks = [words.conversation(self.samples[i], rng, kinds=TRAIN_TYPES) for i in rows]
        return self.pictures(rows), enlarge(maps.float()), talks


@torch.no_grad()
def look(model: SPGDD, products: int, seed: int, families=TRAIN_FAMILIES, types=TRAIN_TYPES, chunk: int = 64) -> Talk:
    """Draw ``products`` products: one good picture as the normal one, one good and two damaged ones to talk about."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    parts, samples = [], []
    for start in tqdm(range(0, products, chunk), desc="photographs"):
        family = families[(start // chunk) % len(families)]
        seeds = torch.randint(2**31, (chunk, 1 + GROUP), generator=generator)
        possible = torch.tensor([i for i in possible_types(family) if TYPES[i] in types])
        kinds = possible[torch.randint(len(possible), (chunk, GROUP), generator=generator)]
        kinds[:, :2] = -1
        shots = photograph(
            family,
            *(t.flatten().to(model.device) for t in (seeds[:, :1].expand(-1, GROUP), seeds[:, 1:], kinds)),
        )
        features = model.encode(normalise(shots.images))
        patches = features.patches.unflatten(0, (chunk, GROUP))  # (chunk, 4, L, N, D)
        few = []
        for product in patches:
            few.append(model.memory.anomaly_map(product[1:], model.memory.build(product[:1])))
        name = rng.choice(words.names_of({"product": family.replace("_", " "), "family": family}))
        told = [i for i in range(chunk * GROUP) if i % GROUP]
        zero = zero_shot_map(model.image_decoder(features.patches[told]), model.anchors(name))
        small = [
            F.interpolate(m, size=(16, 16), mode="bilinear", align_corners=True).half() for m in (torch.cat(few), zero)
        ]
        parts.append((features.embedding[told], features.patches[told].half(), *small))
        known = describe(family, name, shots)
        samples += [known[i] for i in told]
    return Talk(*(torch.cat(column) for column in zip(*parts, strict=True)), samples)


def bare_model(folder: Path, device, deltas=()) -> SPGDD:
    """The mini model of a run folder: ImageBind and maps of stage 1, language model of stage 2, given deltas."""
    mini = get_profile("mini")
    files = {
        name: getattr(mini, name).removeprefix("mini/") for name in ("imagebind_file", "text_tokenizer", "language")
    }
    model = load_model(replace(mini, **files, deltas=tuple(deltas)), folder, device)
    maps = load_delta(folder / "maps.safetensors")
    apply_delta(model, {name: value for name, value in maps.items() if "." in name}, ("image_decoder", "memory"))
    return model


def train(
    model: SPGDD,
    talk: Talk,
    modules: list[torch.nn.Module],
    minutes: float,
    tokens: bool,
    lr: float,
    batch: int,
    seed: int,
    log,
) -> None:
    """Teach the language side to answer; ``tokens``: with map and focus tokens (SPGDD), else the image vector alone."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model.requires_grad_(False)
    wanted = [p for m in modules for p in m.parameters()] + [
        p for n, p in model.language.named_parameters() if "lora_" in n
    ]
    for parameter in wanted:
        parameter.requires_grad_(True)
    model.language.tokenizer.encode = functools.lru_cache(1 << 18)(model.language.tokenizer.encode)
    model.train()
    optimiser = torch.optim.AdamW(wanted, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - started) / (60 * minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        features, maps, talks = talk.batch(batch, rng)
        with torch.autocast(model.device.type, torch.bfloat16):
            prompts = model.prompt_tokens(maps, features) if tokens else None
            said = model.language.forward_loss(features.embedding, talks, prompts, 512)
        optimiser.zero_grad(set_to_none=True)
        said.loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimiser.step()
        if step % 50 == 0:
            values = {
                "step": step,
                "minutes": round((time.perf_counter() - started) / 60, 2),
                "loss": round(said.loss.item(), 4),
                "token accuracy": round(said.token_accuracy.item(), 4),
            }
            print(json.dumps(values), file=log, flush=True)
            if not math.isfinite(values["loss"]):
                raise SystemExit(f"the loss is not finite: {values}")
        step += 1
    model.eval()
    print(f"{step} steps of {batch}, loss {said.loss.item():.3f}, token accuracy {said.token_accuracy.item():.3f}")


@torch.no_grad()
def verdict_accuracy(model: SPGDD, talk: Talk, count: int, tokens: bool, few: bool = True) -> tuple[float, list[tuple]]:
    """Share of right Yes or No over ``count`` pictures, and (sample, answer) of each."""
    rows = random.Random(7).sample(range(len(talk.samples)), min(count, len(talk.samples)))
    features = talk.pictures(rows)
    maps = enlarge((talk.few_shot if few else talk.zero_shot)[rows].float())
    questions = [words.default_question(talk.samples[i]["product"]) for i in rows]
    prompts = model.prompt_tokens(maps, features) if tokens else None
    answers = model.language.generate_batch(features.embedding, questions, prompts, 40)
    pairs = [(talk.samples[i], answer.text) for i, answer in zip(rows, answers, strict=True)]
    return sum(text.startswith("Yes") == bool(sample["defects"]) for sample, text in pairs) / len(pairs), pairs
