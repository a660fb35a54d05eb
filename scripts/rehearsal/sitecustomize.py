"""Python reads this first in every process that gpu_rehearsal.py starts: limits of the GPU, or a toy of it."""

import os

if limit := os.environ.get("REHEARSAL_GPU_GB"):
    import torch

    def limit_memory() -> None:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(float(limit) * 1e9 / whole, 1.0))

    torch.cuda._lazy_call(limit_memory)  # when the process first uses the GPU, if ever

if os.environ.get("REHEARSAL_T4"):  # a GPU without bfloat16
    import torch

    torch.cuda.get_device_capability = lambda device=None: (7, 5)

if os.environ.get("REHEARSAL_TOY"):
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes a CPU minutes

    import torch

    import spgdd.imagebind as imagebind
    import spgdd.loading as loading

    half = torch.float16 if os.environ.get("REHEARSAL_T4") else torch.bfloat16
    loading.choose_dtype = lambda device: (half, f"{half}, as on a GPU")
    tiny = imagebind.TowerConfig(32, 4, 2)
    imagebind.HUGE = imagebind.ImageBindConfig(imagebind.TowerConfig(64, 4, 2), tiny, joint=64, taps=(0, 1, 2, 3))

    import write_standins  # which takes its sizes from there

    others = dict.fromkeys(write_standins.WHOLE.others, tiny)
    write_standins.WHOLE = type(write_standins.WHOLE)(**vars(imagebind.HUGE), others=others)
    write_standins.LLAMA["7b"], write_standins.SHARD_BYTES = (256, 352, 4), 25 * 10**6
