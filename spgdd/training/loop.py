"""The training loop, the same for a notebook, the command, one device and many.

    history = train(model, data, load_settings("workshop"), "runs/first")

A step is a function of the weights and its number: which examples it sees, what is drawn at random and how fast it
learns follow from seed and step. That is why a run goes on exactly where it was stopped.
"""

import dataclasses
import gc
import itertools
import json
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from spgdd import __version__
from spgdd.errors import DataError, SpgddError
from spgdd.files import claimed, whole_file
from spgdd.language.conversation import IGNORE, encode_turns
from spgdd.model import SPGDD
from spgdd.prefetch import prefetched
from spgdd.training import checkpoint
from spgdd.training.fit import fitted
from spgdd.training.log import Log
from spgdd.training.objective import spgdd_loss
from spgdd.training.prepare import base, prepared
from spgdd.training.settings import TrainingSettings
from spgdd.training.validation import validate
from spgdd.training.worker import Worker


def train(
    model: SPGDD, data, settings: TrainingSettings, folder: str | Path, *, objective: Callable = spgdd_loss,
    held_out=None, engine: str = "torch", resume: bool = False, log_folder: str | Path | None = None,
) -> list[dict]:  # fmt: skip
    """Train LoRA, the projection and the parts that are SPGDD's own; returns the lines of the log.

    ``data`` and ``held_out`` are ``TrainingData`` or alike, ``objective`` is ``spgdd_loss`` or alike. Writes
    ``folder``/delta.safetensors at the end, checkpoints in ``folder``/checkpoints on the way, and the log in
    ``log_folder`` (default: ``folder``). ``resume`` goes on from the last checkpoint, or begins where there is none.
    Ctrl-C and SIGTERM save first. ``engine`` is "torch" or "deepspeed"; several processes share the batches, each with
    the model on its own device (see ``join_processes``).

    Raises SpgddError for a folder that holds a run and for settings that contradict it, TrainingError for a loss that
    is not a number, DataError for data that do not make a batch.
    """
    folder, checkpoints, claims = Path(folder), Path(folder) / "checkpoints", ExitStack()
    log_folder = Path(log_folder or folder)
    with prepared(model, settings, data.cache is not None) as parameters, stopping() as asked, claims, settled():
        loss, half = lambda batch: objective(model, batch, settings.max_tgt_len), base(model).dtype == torch.float16
        worker = Worker(loss, parameters, settings, half, engine == "deepspeed")
        room = 12 * (settings.keep + 1) * sum(parameter.numel() for parameter in parameters.values())
        for each in dict.fromkeys((folder, log_folder)):
            worker.on_first(lambda each=each: claims.enter_context(claimed(each, room)))
        there = checkpoint.every(checkpoints)
        if there and not resume:
            mend = "Go on with --resume (resume=True), or choose another folder."
            raise SpgddError(f"There is a run in {folder}. {mend}")
        if model.device.type == "cuda" and not (settings.micro_batch and settings.checkpointing is not None):
            settings = fitted(model, data, settings, worker, objective)
        length = len(data.order(0, settings.seed, settings.batch))
        total = settings.steps or settings.epochs * length
        done = resume_from(there[-1], worker, settings, data) if there else 0
        log = Log(log_folder, worker, total, settings.batch, done)

        def save() -> None:
            log.write(done / length, checkpoints)  # what is not a number is not saved
            state = worker.state()
            position = {"step": done, "examples": len(data), "data": getattr(data, "digest", None)}
            position |= {"loss_scale": worker.scaler.state_dict(), "settings": dataclasses.asdict(settings)}
            about = {"profile": model.profile.name, "step": str(done), "spgdd": __version__}
            worker.on_first(lambda: checkpoint.save(checkpoints, state, position, about, settings.keep))
            log.restart_clock()

        try:
            for micros in read(data, model, settings, worker, length, done, total):
                own = map(sum, zip(*(counts for _, counts in micros), strict=True))
                *sums, stop = map(sum, zip(*worker.gather([*own, len(asked)]), strict=True))
                if stop:  # all ranks stop before the same step
                    if done:
                        save()
                    print(f"Stopped after step {done}. --resume (resume=True) goes on from there.", file=sys.stderr)
                    raise KeyboardInterrupt if signal.SIGINT in asked else SystemExit(128 + signal.SIGTERM)
                figures = learn(worker, micros, sums, settings, done, model.device)
                rate = learning_rate_at(done, total, settings)
                with record_function("optimiser"):
                    norm = worker.step(rate)
                done += 1
                log.step(done, figures, [key for batch, _ in micros for key in batch.keys], rate, norm, sums[2])
                if done % settings.log_every == 0:
                    log.write(done / length, checkpoints)
                if held_out and settings.evaluate_every and (done % settings.evaluate_every == 0 or done == total):
                    log.put({"step": done, **validate(model, held_out, settings, objective)})
                    log.restart_clock()
                if done % settings.save_every == 0 or done == total:
                    save()
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # what they hold would leave no room for the vision tower
            micro = settings.micro_batch or settings.batch // worker.ranks
            raise SpgddError(f"Step {done + 1} does not fit the device's memory. --resume goes on from the last "
                             f"checkpoint: add --checkpointing, or a --micro_batch below {micro}.") from error
        finally:
            log.close()
            worker.close()
        worker.on_first(lambda: copy(checkpoint.every(checkpoints)[-1] / checkpoint.FILES["value"], folder))
    return log.lines


def copy(file: Path, folder: Path) -> None:
    """Whole or not at all."""
    with whole_file(folder / file.name) as to:
        to.write(file.read_bytes())


def read(
    data, model: SPGDD, settings: TrainingSettings, worker: Worker, length: int, done: int, total: int
) -> Iterator[list[tuple]]:
    """This rank's micro-batches with their ``count``, a list for every step after ``done``; the next is being read."""
    share = settings.batch // worker.ranks
    micro = min(settings.micro_batch or share, share)

    def step(stream: Iterator, parts: int) -> list[tuple]:
        return [(batch, count(model, batch, settings)) for batch in itertools.islice(stream, parts)]

    def begun(pool: ThreadPoolExecutor) -> Iterator[Future]:  # the first step of an epoch during the last of another
        for epoch in itertools.count(done // length):
            first, last = max(done - epoch * length, 0), min(total - epoch * length, length)
            if last <= 0:
                return
            plan, order = [], data.order(epoch, settings.seed, settings.batch)
            if len(order) != length:  # steps and epochs would not be what they are counted as
                raise DataError(f"Epoch {epoch} has {len(order)} batches, the first {length}: they must be as many.")
            for rows in order[first:last]:
                if len(rows) % worker.ranks:
                    raise DataError(f"{len(rows)} examples, fewer than a batch, cannot be shared by "
                                    f"{worker.ranks} ranks.")  # fmt: skip
                own = rows[worker.rank :: worker.ranks]
                plan.append([own[i : i + micro] for i in range(0, len(own), micro)])
            stream = data.batches(itertools.chain.from_iterable(plan), epoch)
            for parts in plan:
                yield pool.submit(step, stream, len(parts))

    with ThreadPoolExecutor(1) as pool:
        for waiting in prefetched(begun(pool)):
            yield waiting.result()


def count(model: SPGDD, batch, settings: TrainingSettings) -> tuple[int, int, int]:
    """Answer tokens of a micro-batch, its images with masks, and all tokens of its conversations."""
    turns = [encode_turns(model.language.tokenizer, talk, settings.max_tgt_len, "") for talk in batch.conversations]
    answers = sum(target != IGNORE for _, targets in turns for target in targets)
    return answers, 0 if batch.masks is None else len(batch.keys), sum(len(ids) for ids, _ in turns)


def learn(
    worker: Worker, micros: list[tuple], sums: list[float], settings: TrainingSettings, step: int, device: torch.device
) -> dict[str, Tensor]:
    """Gradients of a step; returns this rank's shares of its figures. ``sums``: the ``count`` of the whole batch.

    A loss is a mean over the whole batch, of answer tokens or of images with masks, however ranks and accumulation cut
    it: each micro-batch's mean gets the weight of its part.
    """
    figures = {}
    with worker.step_of_many():
        for number, (batch, own) in enumerate(micros):
            draw = np.random.SeedSequence((settings.seed, step, number, worker.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(draw[0]))
            tokens, images = (part / whole if whole else 0.0 for part, whole in zip(own[:2], sums[:2], strict=True))
            with worker.one_of_step(last=number == len(micros) - 1):
                with record_function("forward"):
                    found = worker.module(batch.to(device))
                    loss = tokens * found.language + images * (found.total - found.language)
                with record_function("backward"):
                    worker.backward(loss)
            shares = {"loss": loss, "language": tokens * found.language}
            shares |= {"token_accuracy": tokens * found.token_accuracy}
            shares |= {name: images * value for name, value in found.parts.items()}
            for name, value in shares.items():
                figures[name] = figures.get(name, 0.0) + value.detach()
    return figures


def learning_rate_at(step: int, total: int, settings: TrainingSettings) -> float:
    """It rises over the warm-up, then falls as the schedule says; the first step is 0."""
    rising = round(settings.warmup * total)
    if step < rising:
        return settings.learning_rate * (step + 1) / rising
    behind = (step - rising) / (total - rising)
    shares = {"cosine": (1 + math.cos(math.pi * behind)) / 2, "linear": 1 - behind, "constant": 1.0}
    return settings.learning_rate * shares[settings.schedule]


def resume_from(path: Path, worker: Worker, settings: TrainingSettings, data) -> int:
    """Put a checkpoint into the worker; returns its step. Raises SpgddError if it is one of another run."""
    state, position = checkpoint.load(path)
    now, was = json.loads(json.dumps(dataclasses.asdict(settings))), position["settings"]
    fixed = [field.name for field in dataclasses.fields(settings) if not field.metadata.get("changes")]
    others = [f"{name} {was.get(name)!r} there, {now[name]!r} here" for name in fixed if was.get(name) != now[name]]
    if position["examples"] != len(data):
        others.append(f"{position['examples']} examples there, {len(data)} here")
    elif position["data"] != getattr(data, "digest", None):
        others.append("other data of equal number: pictures, texts, variants, turns, shots or seed differ")
    if state["value"].keys() != worker.parameters.keys():
        others.append("other parameters, of another profile")
    if others:
        raise SpgddError(f"{path} belongs to another run: {'; '.join(others)}. Resume with what it began with.")
    worker.load(state, position["step"])
    worker.scaler.load_state_dict(position["loss_scale"])
    return position["step"]


@contextmanager
def settled() -> Iterator[None]:
    """Within it Python's garbage collector leaves alone what was there before: millions of objects of libraries."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that gets the number of a signal to stop; the second Ctrl-C is the ordinary one."""
    asked = []

    def note(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
