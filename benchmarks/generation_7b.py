"""Answers, diagnosis, evaluation and loading at full size: random weights made on the GPU.

    export PYTHONPATH=.:scripts
    python benchmarks/generation_7b.py --load FOLDER    # one GPU with 40 GB; FOLDER gets 18 GB; about four minutes
    python benchmarks/generation_7b.py --toy --load FOLDER    # all of it at toy size, on any machine

The floor of a token is the time of reading every weight once, at the rate of a large copy. All figures are of one run.
Random weights never end an answer, and hardly prefer one piece to the next: where two ways of computing differ by
rounding alone, their answers part, and the table says how near the two pieces were. mini's trained weights do not.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from full_size import build

import spgdd
import spgdd.language.vicuna
from spgdd.diagnosis import Diagnoser
from spgdd.evaluation.protocol import evaluate, folder_tasks
from spgdd.imagebind import MINI
from spgdd.language import Vicuna
from spgdd.loading import load_model
from spgdd.model import SPGDD
from spgdd.profiles import LANGUAGE_PARTS, Profile, get_profile
from spgdd.weights.delta import save_delta
from write_standins import _tokenizer

PROMPT, TOKENS = 137, 60
PICTURES = Path(__file__).resolve().parent.parent / "data/mini"


def row(what: str, value: str) -> None:
    print(f"{what:<62} {value}", flush=True)


def seconds(job, repeats: int = 5) -> float:
    """Median duration, after one call that warms up."""
    laps = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        job()
        wait()
        laps.append(time.perf_counter() - start)
    return statistics.median(laps[1:])


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def model_with_files(options) -> SPGDD:
    """Profile spgdd-7b with random weights; where a folder is given, its files are written there on the way."""
    folder, profile = options.load or Path(tempfile.mkdtemp()), get_profile("spgdd-7b")
    base, path = folder / profile.language, folder / profile.imagebind_file
    base.mkdir(parents=True, exist_ok=True)
    (base / "tokenizer.model").write_bytes(_tokenizer())

    def save(llama, imagebind) -> None:  # as published: the base in float16, ImageBind in float32
        dtype = llama.dtype
        llama.half().save_pretrained(base)
        llama.to(dtype)
        path.parent.mkdir(exist_ok=True)
        torch.save({name: value.float().cpu() for name, value in imagebind.state_dict().items()}, path)

    model = build(options, tokenizer=base / "tokenizer.model", prepare=save if options.load else None)
    for name, value in model.language.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.02)
    if options.load:
        state = {name: value.cpu() for name, value in model.named_parameters() if value.requires_grad}
        first, second = (folder / delta.file for delta in profile.deltas)
        first.parent.mkdir(parents=True, exist_ok=True)
        torch.save({n.removeprefix("language."): v for n, v in state.items() if n.startswith(LANGUAGE_PARTS)}, first)
        save_delta(model, second, {})
    return model


def rate(options) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randn(10**6 if options.toy else 10**9, device=options.device)
    target = torch.empty_like(source)
    speed = 2 * source.nbytes / seconds(lambda: target.copy_(source), 20)
    if torch.cuda.is_available():
        del source, target
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # these 8 GB are the benchmark's own
    return speed


def by_transformers(language: Vicuna, prompts: list[torch.Tensor], tokens: int) -> list[list[int]]:
    """Ids of transformers' own `generate`, LoRA beside the base as peft has it."""
    can_decode, spgdd.language.vicuna.can_decode = spgdd.language.vicuna.can_decode, lambda llama: False
    try:
        return [answer.ids for prompt in prompts for answer in language._answers([prompt], tokens)]
    finally:
        spgdd.language.vicuna.can_decode = can_decode


@torch.no_grad()
def answers(language: Vicuna, options) -> None:
    llama = language.llama_model.get_base_model()
    weights = sum(p.nbytes for p in llama.parameters()) - llama.model.embed_tokens.weight.nbytes
    speed = rate(options)
    floor = weights / speed
    row("weights read for a token; rate of a copy", f"{weights / 1e9:.2f} GB; {speed / 1e12:.2f} TB/s")
    row("floor of a token", f"{1e3 * floor:.2f} ms")
    prompt = torch.randn(1, PROMPT, language.hidden, device=options.device, dtype=llama.dtype) * 0.02
    own = lambda tokens: language._answers([prompt], tokens)[0].ids  # noqa: E731
    start = time.perf_counter()
    own(TOKENS)
    row("the first answer of all, with the capture of the graph", f"{time.perf_counter() - start:.2f} s")
    first, whole = seconds(lambda: own(1)), seconds(lambda: own(TOKENS))
    row(f"first token after {PROMPT} embeddings", f"{1e3 * first:.1f} ms")
    row("each further token", f"{1e3 * (whole - first) / (TOKENS - 1):.2f} ms")
    share = whole / TOKENS / floor
    row(f"{TOKENS} tokens, the first included", f"{1e3 * whole:.0f} ms, {share:.2f} x the floor (bar 2.2)")
    theirs = seconds(lambda: by_transformers(language, [prompt], TOKENS), 2)
    share = theirs / TOKENS / floor
    row(f"{TOKENS} tokens by transformers' generate", f"{1e3 * theirs:.0f} ms, {share:.2f} x the floor")
    ids, other = own(TOKENS), by_transformers(language, [prompt], TOKENS)[0]
    same = next((n for n, pair in enumerate(zip(ids, other, strict=True)) if len(set(pair)) > 1), TOKENS)
    near = "no difference"
    if same < TOKENS:
        said = torch.cat([prompt, language._embed(other[:same])], dim=1)
        logits = llama(inputs_embeds=said, logits_to_keep=1).logits[0, -1].float()
        top = logits.topk(2).values
        near = f"there transformers' two likeliest are {top[0] - top[1]:.4f} apart, of {top[0]:.2f}"
    row("ids as generate's", f"{same} of {TOKENS}; {near}")


def trained(options) -> None:
    """200 answers of mini on this device, in float32, against transformers; and in batches against one by one."""
    language = load_model("mini", device=options.device).language
    asked = ("Is there any anomaly in the image?", "What is in the image?", "Where is the defect?",
             "Describe the image.", "What kind of defect is it?")  # fmt: skip
    count = 20 if options.toy else 200
    images = F.normalize(torch.randn(count, language.llama_proj.in_features, device=options.device), dim=-1)
    told = torch.randn(count, 28, language.hidden, device=options.device) * 0.05
    questions = [asked[number % 5] for number in range(count)]
    with torch.no_grad():
        prompts = [language._prompt(language._project(image), question, tokens) for image, question, tokens
                   in zip(images, questions, told.split(1), strict=True)]  # fmt: skip
    single = [language._answers([prompt], 32)[0].ids for prompt in prompts]
    batch = [answer.ids for answer in language._answers(prompts, 32)]
    theirs = by_transformers(language, prompts, 32)
    row("mini, trained: ids as generate's", f"{sum(map(list.__eq__, single, theirs))} of {count}")
    row("mini, trained: in batches as one by one", f"{sum(map(list.__eq__, single, batch))} of {count}")


def work(model: SPGDD, options) -> None:
    diagnoser, (task, *others) = Diagnoser(model), folder_tasks(PICTURES)
    normals, query = [picture.source for picture in (task.normals * 4)[:4]], task.queries[0].source
    normals = [spgdd.read_image(path).rotate(90 * turn) for turn, path in enumerate(normals)]
    model.language.stop_id = -1
    diagnose = lambda **options: diagnoser.diagnose(query, normals, task.name, **options)  # noqa: E731
    whole = seconds(lambda: diagnose(max_new_tokens=TOKENS))
    row(f"diagnosis, four normals, {TOKENS} tokens, warm", f"{whole:.3f} s (bar 0.5)")
    laps = diagnose(max_new_tokens=TOKENS).timings.items()
    row("", ", ".join(f"{name} {1e3 * lap:.0f} ms" for name, lap in laps))
    queries = [picture for one in (task, *others) for picture in one.queries] * 4  # all of one product
    task = replace(task, queries=queries[: 4 if options.toy else None])
    count = len(task.queries)
    for text, what in ((False, "without text"), (True, "with answers of 64 tokens")):
        job = lambda text=text: evaluate(diagnoser, [task], (1,), (0,), text=text, progress=False)  # noqa: E731
        row(f"evaluation {what}, {count} pictures", f"{count / seconds(job, 1):.1f} pictures/s" + " (bar 25)" * text)


def loading(profile: Profile, options) -> None:
    files = [file for file in sorted(options.load.rglob("*")) if file.is_file()]
    buffer = memoryview(bytearray(2**26))

    def read():
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    size, once = sum(file.stat().st_size for file in files), seconds(read, 1)
    row("reading the files' bytes, in the page cache", f"{once:.2f} s, {size / 1e9:.1f} GB")
    load = seconds(lambda: load_model(profile, options.load, options.device), 1)
    row("loading", f"{load:.2f} s, {load / once:.2f} x reading (bar 1.5)")
    if options.toy:
        return
    good, part = (str(next(PICTURES.rglob(f"{kind}/*.jpg"))) for kind in ("train/good", "test/*"))
    command = [sys.executable, "-m", "spgdd", "diagnose", part, "--normal", good, "--profile", profile.name,
               "--root", str(options.load), "--max-new-tokens", str(TOKENS)]  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()  # the GPU has to have room for the shell's model
    shell = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), 1)
    imports = "import spgdd.cli.diagnose, spgdd.diagnosis, spgdd.loading, spgdd.language.vicuna"
    start = seconds(lambda: subprocess.run([sys.executable, "-c", imports], check=True), 1)
    share = shell / (start + load)
    row("`spgdd diagnose` from a shell", f"{shell:.1f} s, {share:.2f} x imports ({start:.1f} s) + load (bar 2)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", type=Path, metavar="FOLDER")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.toy:
        spgdd.imagebind.HUGE = MINI
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    model = model_with_files(options)
    answers(model.language, options)
    trained(options)
    work(model, options)
    if options.device == "cuda":
        row("peak of the GPU's memory so far", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    profile = model.profile
    del model
    if options.load:
        loading(profile, options)


if __name__ == "__main__":
    main()
