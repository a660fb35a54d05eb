"""A network of a few thousand parameters with every part of the system, examples for it, and runs in other processes.

python tests/tiny_training.py chain FOLDER '{"seed": 1, "kills": 20}'
python tests/tiny_training.py ranks FOLDER '[{"name": "one", "epochs": 1}]'    one process of runs
"""

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from spgdd.imagebind import ImageBind, ImageBindConfig, ImageFeatures, TowerConfig
from spgdd.language import LlamaTokenizer, LoraSettings, Vicuna
from spgdd.model import SPGDD
from spgdd.profiles import get_profile
from spgdd.training.data import Batch
from spgdd.training.loop import train
from spgdd.training.settings import load_settings

TOKENIZER = Path(__file__).parent / "fixtures/pandagpt/llama/tokenizer.model"
IMAGEBIND = ImageBindConfig(TowerConfig(16, 2, 2), TowerConfig(16, 1, 2), joint=16, vocab_size=64, taps=(0, 1))
PROFILE = dataclasses.replace(
    get_profile("spgdd-7b"), name="tiny", scales=(1, 3), prompt_channels=(2, 2, 2, 2, 2), lora_rank=4
)
WORDS = "no yes there is a scratch stain at the top left bottom right of this part it looks good bent".split()


def tokenise(texts):
    rows = [[62, *(ord(letter) % 61 for letter in text[:30]), 63] for text in texts]
    return torch.tensor([row + [0] * (32 - len(row)) for row in rows])


def tiny_model(dtype=torch.float32) -> SPGDD:
    torch.manual_seed(0)
    tokenizer = LlamaTokenizer(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, attn_implementation="sdpa",
    )  # fmt: skip
    language = Vicuna(LlamaForCausalLM(config).to(dtype), tokenizer, IMAGEBIND.joint, LoraSettings(4, 4))
    model = SPGDD(PROFILE, ImageBind(IMAGEBIND).requires_grad_(False), language, tokenise)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # so that LoRA's dropout has an effect from the start
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


class TinyData:
    """Examples drawn from (index, epoch): two thirds about pictures with masks, the rest chat."""

    cache, products = "features", ["bolt", "nut"]

    def __init__(self, size=24):
        self.size = size

    def __len__(self):
        return self.size

    def order(self, epoch, seed, batch):
        rng, streams = random.Random(f"{seed} {epoch}"), []
        for rows in (list(range(self.size * 2 // 3)), list(range(self.size * 2 // 3, self.size))):
            rng.shuffle(rows)
            streams += [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(streams)
        return streams

    def batches(self, plan, epoch):
        for rows in plan:
            yield self.collate([self.example(index, epoch) for index in rows])

    def example(self, index, epoch):
        rng, draw = random.Random(f"{index} {epoch}"), torch.Generator().manual_seed(1000 * epoch + index)
        talk = [{"from": who, "value": " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))}
                for who, longest in (("human", 6), ("gpt", 9)) * rng.randint(1, 2)]  # fmt: skip
        seen = index % 2  # good, or with a damaged corner
        patches = torch.randn(2, 256, 16, generator=draw)
        patches[:, :64] += 2.0 * seen
        mask = torch.zeros(224, 224)
        mask[:56] = seen
        normals = torch.randn(index % 3, 2, 256, 16, generator=draw)
        embedding = F.normalize(torch.randn(16, generator=draw), dim=0)
        return f"picture {index}", self.products[index % 2], talk, embedding, patches, mask, normals

    def collate(self, examples):
        keys, products, talks, embeddings, patches, masks, normals = zip(*examples, strict=True)
        chat = int(keys[0].split()[1]) >= self.size * 2 // 3
        features = ImageFeatures(torch.stack(embeddings), torch.stack(patches))
        if chat:
            return Batch(list(keys), features, ["object"] * len(keys), list(talks), None, None)
        normals = [each if len(each) else None for each in normals]
        return Batch(list(keys), features, list(products), list(talks), torch.stack(masks), normals)


def settings(**options):
    few = {"epochs": 3, "batch": 4, "max_tgt_len": 64, "learning_rate": 5e-3, "log_every": 1, "save_every": 2,
           "keep": 2, "checkpointing": False, "compile": False, "pad_to": 1, "micro_batch": 0}  # fmt: skip
    return load_settings("paper", **(few | options))


def chain(folder: Path, seed: int, kills: int) -> None:
    """One run without interruption in folder/whole, then in folder/killed one that is killed so often on its way."""
    rng, killed = random.Random(seed), 0

    def start(name):
        if (child := os.fork()) == 0:
            sys.stderr = open(os.devnull, "w")
            train(tiny_model(), TinyData(12), settings(epochs=12, save_every=1), folder / name, resume=True)
            os._exit(0)
        return child

    began = time.perf_counter()
    assert os.waitpid(start("whole"), 0)[1] == 0
    seconds = time.perf_counter() - began
    while killed < kills:
        child = start("killed")
        time.sleep(rng.uniform(0, seconds / 12))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run was over before it was killed often enough"
        killed += 1
    assert os.waitpid(start("killed"), 0)[1] == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, folder, text = sys.argv[1:]
    if job == "chain":
        chain(Path(folder), **json.loads(text))
    else:
        for options in json.loads(text):
            name, resume = options.pop("name"), options.pop("resume", False)
            engine = options.pop("engine", "torch")
            train(tiny_model(), TinyData(), settings(**options), Path(folder) / name, engine=engine, resume=resume)
        if torch.distributed.is_initialized():  # a rank that ends before the others would take their connection along
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
