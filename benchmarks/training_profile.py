"""Where the time of a training step goes at full size: the parts of a step, kernels, waits, recompilations.

    python benchmarks/training_profile.py                     # one GPU with 80 GB; about two minutes
    python benchmarks/training_profile.py --no-compile --trace step.json
    python benchmarks/training_profile.py --toy               # at toy size, on any machine

A part's time on the CPU is that of launching it; where a part waits for the GPU, that too. If the GPU is busy for much
less than a step takes, look for what the CPU waits for; else for the largest kernels.
"""

import time
from collections import Counter
from pathlib import Path

import torch
from full_size import build, parser, run_in_folder
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from training_7b import learn, load

from spgdd.training import loop
from spgdd.training.worker import Worker

BEFORE, DURING = 8, 4  # steps that are left out, and that are looked at
PARTS = ["read", "forward", "backward", "optimiser"]
INSIDE = [
    "learned_anchors",
    "few_shot",
    "map_tokens",
    "bank_tokens",
    "language.forward_loss",
    "image_decoder.forward",
]
WAITS = ["cudaStreamSynchronize", "cudaMemcpyAsync", "cudaDeviceSynchronize", "aten::item", "aten::nonzero"]


def named(name: str, function):
    """The function, seen by the profiler under this name."""

    def seen(*arguments, **options):
        with record_function(name):
            return function(*arguments, **options)

    return seen


def main(options) -> None:
    model = build(options)
    for path in INSIDE:
        *owner, name = path.split(".")
        owner = model.get_submodule(".".join(owner))
        setattr(owner, name, named(path, getattr(owner, name)))
    read, step = loop.read, Worker.step

    def timed_read(*arguments):
        stream = read(*arguments)
        while (micros := named("read", next)(stream, None)) is not None:
            yield micros

    moments = []

    def timed_step(worker, rate):
        norm = step(worker, rate)
        profiler.step()
        if torch.cuda.is_available() and profiler.step_num in (BEFORE, BEFORE + DURING):
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        return norm

    loop.read, Worker.step = timed_read, timed_step
    data, _ = load(model, options, options.batch * 8, options.length)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=kinds, schedule=schedule(wait=BEFORE - 1, warmup=1, active=DURING)) as profiler:
        learn(model, data, options, options.length, options.batch, steps=BEFORE + DURING, log_every=100,
              compile=options.compile and not options.toy)  # fmt: skip
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
    events = profiler.events()
    wall = 1e3 * (moments[-1] - moments[-1 - DURING]) / DURING
    print(f"a step of {options.batch}: {wall:.1f} ms, {1e3 * options.batch / wall:.1f} samples/s")
    busy = sum(event.time_range.elapsed_us() for event in events if event.device_type == DeviceType.CUDA) / 1e3 / DURING
    print(f"kernels and copies on the GPU: {busy:.1f} ms a step\n")
    spent, calls = Counter(), Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:
            spent[event.name] += event.time_range.elapsed_us() / 1e3 / DURING
            calls[event.name] += 1 / DURING
    for title, names in (("parts", PARTS), ("within forward", INSIDE), ("waits and copies", WAITS)):
        print(f"{title}, ms of the CPU a step")
        print("".join(f"  {name:<24}{spent[name]:10.1f}  x {calls[name]:.0f}\n" for name in names if calls[name]))
    averages = profiler.key_averages()
    if torch.cuda.is_available():
        print(averages.table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=60))
    counters = torch._dynamo.utils.counters
    print("torch.compile:", dict(counters["stats"]), "graph breaks:", dict(counters["graph_break"]))


if __name__ == "__main__":
    parser = parser(__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--no-compile", action="store_false", dest="compile")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write it for chrome://tracing")
    run_in_folder(main, parser)
