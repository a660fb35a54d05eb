"""Does ``--preset recommended`` choose as well as a person? Full size, random weights, one GPU.

    python benchmarks/training_choice.py               # about six minutes
    python benchmarks/training_choice.py --limit 24    # as on a card of 24 GB
    python benchmarks/training_choice.py --toy         # on the CPU, which has nothing to choose

Samples a second of the preset as it is, which tries what fits the memory, and with micro-batches and recomputation
given by hand, all in one process. Its first run is slower whatever its settings are, and does not count.
"""

import torch
from full_size import build, limit_gpu, parser, run_in_folder
from training_7b import load, peak, run

from spgdd.errors import SpgddError
from spgdd.training.settings import load_settings

BY_HAND = [(32, False), (16, False), (4, False), (32, True)]  # micro-batch, recomputation


def main(options) -> None:
    model, rates = build(options), []
    data, _ = load(model, options, options.samples, options.length)
    limit_gpu(options.limit)
    plain = {"log_every": 4} | ({"compile": False} if options.toy else {})
    by_hand = [{"micro_batch": micro, "checkpointing": again} for micro, again in BY_HAND]
    run(model, data, load_settings("recommended", steps=len(data) // 32, **plain), options)
    for fields in ({}, *by_hand):
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        name = ", ".join(f"{name} {value}" for name, value in fields.items()) or "untouched"
        try:
            rates.append(run(model, data, load_settings("recommended", **fields, **plain), options))
            print(f"recommended, {name}: {rates[-1]:.2f} samples/s, {peak():.1f} GB", flush=True)
        except SpgddError as error:
            print(f"recommended, {name}: {error}", flush=True)
            if not fields:
                raise
    print(f"untouched / best: {rates[0] / max(rates):.3f}")


if __name__ == "__main__":
    parser = parser(__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--limit", type=float, default=0, metavar="GB", help="let the GPU have so much")
    run_in_folder(main, parser)
