"""Train the mini language model: a small LLaMA that has read how people talk about parts, and seen none.

python recipes/mini/stage2_language.py --out runs/mini
"""

import argparse
import io
import json
import math
import random
import time
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import appearance
from miniworld import FAMILIES
from pool import TRAIN_TYPES
from spgdd.data import words
from spgdd.language.conversation import IGNORE, encode_turns
from spgdd.language.tokenizer import LlamaTokenizer
from spgdd.places import PLACES

PIECES = 1280


def sample(rng: random.Random) -> dict:
    """Made-up facts about no picture: the text alone is learned from."""
    family = rng.choice(list(FAMILIES))
    kind, defects = rng.choice(TRAIN_TYPES), []
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3))):
        area, x, y = rng.uniform(0.0005, 0.1), rng.randrange(180), rng.randrange(180)
        defects.append(
            {
                "type": kind,
                "place": rng.choice(PLACES),
                "area": area,
                "contrast": rng.uniform(0.06, 0.6),
                "severity": rng.choice(("minor", "moderate", "severe")),
                "box": [x, y, x + rng.randint(5, 40), y + rng.randint(5, 40)],
            }
        )
    name = rng.choice(words.names_of({"product": family.replace("_", " "), "family": family}))
    colours = [rng.uniform(0, 255) for _ in range(3)]
    return {"product": name, "family": family, "size": [224, 224], "defects": defects, "colours": colours}


def conversation(rng: random.Random) -> list[dict]:
    """Mostly about defects, as an inspector talks; else about what anyone sees."""
    known = sample(rng)
    if rng.random() < 0.8:
        return words.conversation(known, rng, kinds=TRAIN_TYPES)
    return appearance.conversation(known, rng)


def conversations(rng: random.Random, count: int) -> list[list[dict]]:
    return [conversation(rng) for _ in range(count)]


def build_tokenizer(folder: Path) -> LlamaTokenizer:
    """A sentencepiece model in LLaMA's manner: byte pairs, bytes for the rest, white space kept, a piece ``##``."""
    known = words.grammar.VOCABULARY["product_names"]
    lines = [turn["value"] for turns in conversations(random.Random(0), 20000) for turn in turns]
    lines += [words.default_question(name) for names in known.values() for name in names] * 20
    lines += ["### Human: <Img>", "</Img>", "### Assistant:"] * 2000
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        user_defined_symbols=["##"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return LlamaTokenizer(folder / "tokenizer.model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(args.out / "language")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(device)
    rng, rows = random.Random(1), []
    for turns in conversations(rng, 40000):
        ids, _ = encode_turns(tokenizer, turns, 160)
        rows.append([tokenizer.bos, *tokenizer.encode("### Human: <Img>"), *ids])
    print(
        f"{len(tokenizer)} pieces, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{sum(map(len, rows)) / len(rows):.0f} tokens a conversation"
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    started, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - started) / (60 * args.minutes)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        chosen = [torch.tensor(row) for row in rng.sample(rows, args.batch)]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1).to(device)
        labels = torch.where(ids < 0, IGNORE, ids)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), labels=labels).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0:
            print(
                json.dumps(
                    {
                        "step": step,
                        "minutes": round((time.perf_counter() - started) / 60, 2),
                        "loss": round(loss.item(), 4),
                    }
                ),
                flush=True,
            )
        step += 1
    print(f"{step} steps, loss {loss.item():.3f}")
    model.save_pretrained(args.out / "language")


if __name__ == "__main__":
    main()
