"""Speed and memory of training at full size, beside the published recipe: random weights, made on the GPU, no files.

    python benchmarks/training_7b.py matmul published ours     # one GPU with 80 GB; about four minutes
    python benchmarks/training_7b.py memory
    python benchmarks/training_7b.py ranks --gpus 1 2          # two GPUs
    python benchmarks/training_7b.py --batch 32 --against ../before    # this code and another checkout's, in turns
    python benchmarks/training_7b.py --toy                     # all of it at toy size, on any machine

matmul     the rate of a bf16 matrix product, with which the rest is compared
published  PandaGPT's recipe: micro-batch 1, accumulation 8, ZeRO-2 with the optimiser on the CPU, float16, the encoder
           in its published layout and on the fly, eager attention, LoRA r = 32; without SPGDD-GPT's anomaly maps
ours       ``spgdd.training`` on the same samples, with all parts of SPGDD-GPT; three epochs, the encoder run once
memory     the peak of the GPU's memory over batch, length and options
ranks      ``ours`` on these numbers of GPUs at the same micro-batch, plain and under DeepSpeed ZeRO-2

Each part has a process of its own and prints as it goes. FLOPs are 4 times the language model's parameters times
tokens; padding does not count.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from full_size import build, limit_gpu, parse, parser
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from vision_tower import Published as PublishedTower
from vision_tower import seconds_each

from spgdd.imagebind import ImageBind, preprocess
from spgdd.language import LlamaTokenizer
from spgdd.language.conversation import IGNORE, IMAGE_END, PROMPT_START, encode_turns
from spgdd.model import SPGDD
from spgdd.profiles import weights_folder
from spgdd.training.data import TrainingData
from spgdd.training.loop import train
from spgdd.training.settings import TrainingSettings, load_settings
from spgdd.training.worker import join_processes

EPOCHS = 3
PATIENCE = 300  # seconds after which a part is given up
WORDS = "there is no scratch at the top left of the metal plate and I see no other defect in it".split()


def quantise(llama: LlamaForCausalLM, imagebind: ImageBind) -> None:
    """The layers' matrices in 4 bits, as transformers does it on loading."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for part in list(llama.model.layers.modules()):
        for name, old in part.named_children():
            if isinstance(old, nn.Linear):
                small = Linear4bit(old.in_features, old.out_features, False, torch.bfloat16, quant_type="nf4")
                small.weight = Params4bit(old.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                setattr(part, name, small.to(old.weight.device))
    llama.is_loaded_in_4bit = True


def write_samples(folder: Path, count: int, length: int) -> Path:
    """Good pictures of a product, and a text file: 70 % to 100 % of so many tokens each, a third of them asked."""
    tokenizer, rng = LlamaTokenizer(weights_folder() / "mini/language/tokenizer.model"), np.random.default_rng(0)
    pictures, records, text = folder / "images/plate/train/good", [], folder / f"text_{count}_{length}.json"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path, want, said, have = pictures / f"{number:04}.jpg", rng.uniform(0.7, 1.0) * length, [], 0
        if not path.exists():
            Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(path)
        while have < want - 6:
            said += list(rng.choice(WORDS, 3))
            question, answer = " ".join(said[: len(said) // 3]), " ".join(said[len(said) // 3 :])
            talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            have = len(encode_turns(tokenizer, talk, 10**6)[0])
        records.append({"image_name": f"plate/train/good/{path.name}", "conversation": talk})
    text.write_text(json.dumps(records))
    return text


def load(model: SPGDD, options, count: int, length: int, rank: int = 0, ranks: int = 1) -> tuple[TrainingData, float]:
    """Samples whose features are in the cache, and the pictures a second that went into it."""
    if rank == 0:
        write_samples(options.folder, count, length)
    if ranks > 1:
        torch.distributed.barrier()
    text, images = options.folder / f"text_{count}_{length}.json", options.folder / "images"
    data = TrainingData(model, text, images, cache=options.folder / "features", variants=0)
    start = time.perf_counter()
    data.fill(rank, ranks)
    return data, count / (time.perf_counter() - start)


def learn(
    model: SPGDD, data: TrainingData, options, length: int, batch: int, ranks: int = 1, micro: int = 0,
    engine: str = "torch", **fields,
) -> float:
    """Samples a second of a training run at this micro-batch; the first third, that of the compiler, does not count."""
    fields = {"compile": not options.toy, "checkpointing": False, "log_every": 4} | fields
    settings = load_settings("recommended", max_tgt_len=length, batch=ranks * batch, micro_batch=micro or batch,
                             save_every=10**6, evaluate_every=0, **fields)  # fmt: skip
    return run(model, data, settings, options, engine)


def run(model: SPGDD, data: TrainingData, settings: TrainingSettings, options, engine: str = "torch") -> float:
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        lines = train(model, data, settings, folder, engine=engine)
    late = lines[len(lines) // 3 :]
    return sum(line["samples_per_second"] * line["seconds"] for line in late) / sum(line["seconds"] for line in late)


def peak() -> float:
    """GB of the GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def matmul(options) -> float:
    side = 256 if options.toy else 8192
    a, b = (torch.randn(side, side, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 / seconds_each(lambda: a @ b) / 1e12
    print(f"matrix product {side} x {side} x {side}, bf16: {rate:.1f} TFLOP/s")
    return rate


class PublishedRecipe(nn.Module):
    """What PandaGPT's training computes for one sample."""

    def __init__(self, model: SPGDD):
        super().__init__()
        self.tokenizer, self.llama_model = model.language.tokenizer, model.language.llama_model
        self.llama_proj, self.tower = model.language.llama_proj, PublishedTower(model.imagebind)

    def forward(self, pixels: Tensor, talk: list[dict]) -> Tensor:
        with torch.no_grad():
            seen = self.tower(pixels)[0]
        vector = self.llama_proj(seen.to(self.llama_proj.weight))[:, None]  # (1, 1, H)
        start = [self.tokenizer.bos, *self.tokenizer.encode(PROMPT_START)]
        ids, targets = encode_turns(self.tokenizer, talk, 1024)
        embed = self.llama_model.get_input_embeddings()
        before, text = (embed(torch.tensor([part], device=pixels.device)) for part in (start, ids))
        embeds = torch.cat([before, vector.to(before), text], dim=1)
        labels = torch.tensor([[IGNORE] * (len(start) + 1) + targets], device=pixels.device)
        mask = torch.ones_like(labels)
        return self.llama_model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss


def published(options) -> float:
    import deepspeed

    join_processes(options.device, deepspeed=True)
    records = itertools.cycle(json.loads(write_samples(options.folder, options.samples, options.length).read_text()))
    recipe = PublishedRecipe(build(options, "eager", torch.float16)).train()
    for name, parameter in recipe.named_parameters():
        parameter.requires_grad_("lora_" in name or "llama_proj" in name)
    trained = [parameter for parameter in recipe.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=recipe, model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.001, fused=True),
        config={
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8, "gradient_clipping": 1.0,
            "fp16": {"enabled": not options.toy}, "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        },
    )  # fmt: skip

    def step() -> None:
        for record in itertools.islice(records, 8):
            image = Image.open(options.folder / "images" / record["image_name"])
            engine.backward(engine(preprocess([image]).to(options.device), record["conversation"]))
            engine.step()

    rate = 8 / seconds_each(step, 12.0)
    print(f"published recipe: {rate:.2f} samples/s, {peak():.1f} GB")
    return rate


def ours(options) -> dict:
    model, found = build(options), {"rate": 0.0}
    data, filling = load(model, options, options.samples, options.length)
    tokenizer, (seen,) = model.language.tokenizer, model.look([[torch.zeros(3, 224, 224, dtype=torch.uint8)]])
    prompts = model.prompt_tokens(torch.zeros(1, 1, 224, 224, device=options.device), seen.patches[0]).shape[1]
    tokens = 2 + len(tokenizer.encode(PROMPT_START)) + len(tokenizer.encode(IMAGE_END)) + prompts
    tokens += np.mean([len(encode_turns(tokenizer, item.talks[0], options.length, "")[0]) for item in data.items])
    language = model.language.llama_model.named_parameters()
    parameters = sum(parameter.numel() for name, parameter in language if "lora_" not in name)
    print(f"{filling:.0f} pictures/s into the cache; {tokens:.0f} tokens a sample, {parameters / 1e9:.2f} G parameters")
    for batch in options.batch:
        rate = learn(model, data, options, options.length, batch, epochs=EPOCHS)
        flops, whole = 4 * parameters * tokens * rate / 1e12, EPOCHS / (1 / filling + EPOCHS / rate)
        print(f"ours, batch {batch}: {rate:.2f} samples/s, {whole:.2f} with the encoder over {EPOCHS} epochs, "
              f"{flops:.1f} TFLOP/s, {peak():.1f} GB")  # fmt: skip
        if whole > found["rate"]:
            found = {"batch": batch, "rate": whole, "tflops": flops}
    return found


def memory(options) -> None:
    cases = [  # 4 bit, batch, micro-batch, tokens of text, recomputation, GB that the GPU is limited to
        (False, 1, 1, 256, False, 0), (False, 16, 16, 256, False, 0), (False, 16, 16, 256, True, 0),
        (False, 16, 16, 512, True, 0), (False, 16, 4, 1014, True, 24), (True, 2, 2, 512, True, 15),
        (True, 2, 2, 512, False, 0), (True, 16, 4, 1014, True, 0),
    ]  # fmt: skip
    head = ("language model", "batch", "micro-batch", "tokens of text", "recomputation", "peak of GPU memory")
    print(f"| {' | '.join(head)} |\n{len(head) * '|---'}|")
    model, bits = None, None
    for four_bit, batch, micro, length, recomputation, limit in cases[: 2 if options.toy else None]:
        if four_bit != bits:
            model, bits = None, four_bit
            limit_gpu(0)  # building takes more than training
            model = build(options, prepare=quantise if four_bit else None)
        limit_gpu(limit)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            data, _ = load(model, options, 2 * batch, length)
            fields = {"steps": 2, "log_every": 1, "compile": False, "checkpointing": recomputation}
            learn(model, data, options, length, batch, micro=micro, **fields)
            shown = f"{peak():.1f} GB"
        except torch.OutOfMemoryError:
            shown = "out of memory"
        shown += f", where the GPU has {limit} GB" if limit else ""
        base, again = "4 bit" if four_bit else "bfloat16", "yes" if recomputation else "no"
        print(f"| {base} | {batch} | {micro} | {length} | {again} | {shown} |", flush=True)


def ranks(options) -> float:
    """One of the processes that torchrun started."""
    processes, batch = join_processes(options.device), options.batch[0]
    rank, count = processes.process_index, processes.num_processes
    model = build(options)
    data, _ = load(model, options, options.samples, options.length, rank, count)
    rates = {}
    for engine in ("torch", "deepspeed"):
        steps = {"steps": 4 if options.toy else 48}
        rates[engine] = learn(model, data, options, options.length, batch, count, engine=engine, **steps)
        if rank == 0:
            print(f"{engine}, {count} ranks, micro-batch {batch}: {rates[engine]:.2f} samples/s, {peak():.1f} GB")
    return rates["torch"]


def start(part: str, options, count: int = 0):
    """What a part returns that runs in a process of its own, or in so many; None if it fails."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count else []
    own = [part, "--child", "--folder", str(options.folder)]
    print(f"--- {part}", flush=True)
    result, environment = options.folder / "result.json", os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    result.write_text("null")
    try:
        command = [sys.executable, *several, __file__, *own, *options.passed]
        subprocess.run(command, timeout=PATIENCE, check=True, env=environment)
    except subprocess.SubprocessError as error:
        print(f"{part}: {type(error).__name__}", flush=True)
    return json.loads(result.read_text())


def against(options) -> None:
    """``ours`` of another checkout and of this one, in turns, each with its own code and cache."""
    rates = {}
    for turn, root in itertools.product(range(2), (options.against.resolve(), Path(__file__).resolve().parents[1])):
        command = [sys.executable, root / "benchmarks/training_7b.py", "ours", *options.passed]
        environment = os.environ | {"PYTHONPATH": str(root), "TQDM_DISABLE": "1"}
        said = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        for batch, rate, memory in re.findall(r"ours, batch (\d+): ([\d.]+) samples/s.* ([\d.]+) GB", said):
            rates.setdefault(batch, {}).setdefault(root, []).append(float(rate))
            print(f"turn {turn}, {root}: batch {batch}, {rate} samples/s, {memory} GB", flush=True)
    for batch, (before, now) in ((batch, each.values()) for batch, each in rates.items()):
        print(f"batch {batch}: {max(now) / max(before):.3f} of before")


def main(options) -> None:
    found = {part: start(part, options) for part in options.parts if part != "ranks"}
    rates = {count: start("ranks", options, count) for count in options.gpus if "ranks" in options.parts}
    rates = {count: rate for count, rate in rates.items() if rate}
    if found.get("published") and found.get("ours"):
        print(f"ours / published, the encoder in both: {found['ours']['rate'] / found['published']:.2f}")
    if found.get("matmul") and found.get("ours"):
        print(f"share of the matrix rate: {found['ours']['tflops'] / found['matmul']:.2f}")
    for count, rate in rates.items():
        print(f"{count} ranks / {min(rates)}: {rate / rates[min(rates)]:.2f}")


if __name__ == "__main__":
    parser = parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="matmul, published, ours, memory, ranks; default: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="micro-batches of ours; ranks: the first")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of ranks")
    parser.add_argument("--against", type=Path, help="root of another checkout: compare ours with its")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parse(parser)
    options.parts = options.parts or ["matmul", "published", "ours", "memory", "ranks"]
    if options.child:
        returned = globals()[options.parts[0]](options)
        if os.environ.get("RANK", "0") == "0":
            (options.folder / "result.json").write_text(json.dumps(returned))
    elif options.against:
        options.passed = [word for word in sys.argv[1:] if word not in ("--against", str(options.against))]
        against(options)
    else:
        options.passed = [word for word in sys.argv[1:] if word not in options.parts]
        with tempfile.TemporaryDirectory() as folder:
            options.folder = Path(folder)
            main(options)
