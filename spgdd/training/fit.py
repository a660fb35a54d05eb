"""How many examples a GPU takes at once, and whether it must recompute: tried, not estimated."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from spgdd.errors import SpgddError
from spgdd.model import SPGDD
from spgdd.training.prepare import recompute_layers
from spgdd.training.settings import TrainingSettings
from spgdd.training.worker import Worker

ENOUGH = 4  # examples at once: with fewer, recomputation is faster, as a GPU reads its weights again for each
SPARE = 5e8  # bytes that stay free


def fitted(model: SPGDD, data, settings: TrainingSettings, worker: Worker, objective: Callable) -> TrainingSettings:
    """Settings whose ``micro_batch`` and ``checkpointing`` suit the memory of every rank's GPU; what is given stays.

    Tried with the longest examples, a sixteenth more of them than will be taken, and without compilation, which needs
    less. Raises SpgddError where not even one example fits.
    """
    for micro, again in ways(settings, settings.batch // worker.ranks):
        if all(worker.gather(fits(model, data, settings, objective, micro, again))):
            if worker.rank == 0:
                print(f"This GPU takes {micro} examples at once, {'with' if again else 'without'} recomputation.",
                      file=sys.stderr)  # fmt: skip
            return replace(settings, micro_batch=micro, checkpointing=again)
    raise SpgddError("Not even one example fits this GPU's memory. --quantize 4bit or a lower --max_tgt_len need less.")


def ways(settings: TrainingSettings, share: int) -> Iterator[tuple[int, bool]]:
    """Pairs of micro-batch and recomputation, the fastest first."""
    sizes = [settings.micro_batch] if settings.micro_batch else [share >> i for i in range(share.bit_length())]
    for again in (False, True) if settings.checkpointing is None else (settings.checkpointing,):
        for micro in sizes:
            if again or settings.checkpointing is False or micro >= min(ENOUGH, sizes[0]):
                yield min(micro, share), again


def fits(model: SPGDD, data, settings: TrainingSettings, objective: Callable, micro: int, again: bool) -> bool:
    recompute_layers(model, again)
    count = micro + micro // 16
    plan = data.longest(count) if hasattr(data, "longest") else [data.order(0, settings.seed, count)[0]]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spare = int(SPARE + 8 * sum(parameter.numel() for parameter in learned))  # with room for AdamW's moments
    try:
        spare = torch.empty(spare, dtype=torch.uint8, device=model.device)
        with torch.compiler.set_stance("force_eager"):
            for batch in data.batches(plan, epoch=0):
                total = objective(model, batch.to(model.device), settings.max_tgt_len).total
                torch.autograd.grad(total, learned, allow_unused=True)  # which no exchange of gradients takes notice of
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        spare = batch = total = None  # noqa: F841
        torch.cuda.empty_cache()
