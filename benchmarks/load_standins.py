"""Load full-size stand-ins of profile anomalygpt-7b strictly into the real-size model, and run the three checks.

    python benchmarks/load_standins.py FOLDER [cpu | cuda]

FOLDER gets 19 GB of stand-ins; a Vicuna that merge_vicuna.py left there is used. Needs 20 GB of RAM or of GPU
memory. Each step prints its seconds and the peak of resident memory; what does not fit raises an error.

Measured on two cores of an AMD EPYC without GPU, in float16: 5.1 GB of stand-ins 11 s, ImageBind's six towers
(mapped) under 1 s, Vicuna with both deltas 24 s, checks 461 s; peak 17.0 GB with the mapped files.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from imagebind_senses import WHOLE, AllSenses
from spgdd.cli.checks import run_checks
from spgdd.imagebind import MODALITIES, load_imagebind
from spgdd.weights.verify import status
from write_standins import standin

PARTS = ["imagebind-huge", "pandagpt-7b", "anomalygpt-mvtec"]


def step(title: str, start: float) -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{title}: {time.monotonic() - start:.0f} s, peak so far {peak:.1f} GB", flush=True)
    return time.monotonic()


def main(folder: Path, device: str) -> None:
    start = time.monotonic()
    merged = any(row.usable for row in status("vicuna-7b-v0", folder))
    standin(PARTS if merged else [*PARTS, "vicuna-7b-v0"], folder, progress=False)
    start = step("stand-ins", start)
    print({row.path: row.state for name in (*PARTS, "vicuna-7b-v0") for row in status(name, folder)})

    model = load_imagebind(folder / "imagebind_ckpt/imagebind_huge.pth", WHOLE, MODALITIES, kind=AllSenses)
    count = sum(value.numel() for value in model.state_dict().values())
    assert count == 1_200_781_057 + 5_933 and not any(value.is_meta for value in model.state_dict().values())
    del model
    start = step(f"imagebind_huge.pth, all six towers, {count:,} values", start)

    for check in run_checks("anomalygpt-7b", folder, device=device, dtype=torch.float16):
        start = step(str(check), start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cpu")
