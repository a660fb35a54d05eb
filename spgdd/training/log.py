"""What a run reports: lines of JSON, a bar in the shell, a curve in a notebook.

A step leaves its figures on the device; they are fetched, summed over the ranks and checked once per line of the log,
so that a GPU never waits for them.
"""

import io
import itertools
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub.utils import is_notebook
from torch import Tensor
from tqdm import tqdm

from spgdd.errors import SpgddError
from spgdd.files import write_text


class TrainingError(SpgddError):
    """The loss is no longer a number."""


class Log:
    """``folder``/train.jsonl, and a view of it. ``done``: steps that the run has behind it."""

    def __init__(self, folder: Path, worker, total: int, batch: int, done: int):
        self.worker, self.batch, self.path, self.waiting, self.view = worker, batch, folder / "train.jsonl", [], None
        before = read(self.path) if worker.rank == 0 else []
        self.lines = worker.gather([line for line in before if line["step"] <= done])[0]  # later ones come again
        if worker.rank == 0:
            write_text(self.path, "".join(map(as_text, self.lines)))
            self.view = (Curve if is_notebook() else Bar)(total, self.lines)
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came before, an evaluation for example, is no time of the steps."""
        self.started = time.perf_counter()

    def step(
        self, step: int, figures: dict[str, Tensor], keys: list[str], rate: float, norm: Tensor, tokens: float
    ) -> None:
        """Note a step; ``figures`` and ``keys`` are this rank's shares of it, the rest is the same on all."""
        self.waiting.append((step, figures, keys, rate, norm, tokens))

    def write(self, epoch: float, checkpoints: Path) -> None:
        """One line for the steps since the last. Raises TrainingError that names the batch of a loss without value."""
        if not self.waiting:
            return
        steps, figures, keys, rates, norms, tokens = zip(*self.waiting, strict=True)
        own = [dict(zip(row, torch.stack(list(row.values())).tolist(), strict=True)) for row in figures]
        rows = []  # of each step, summed over the ranks
        for number, shares in enumerate(zip(*self.worker.gather(own), strict=True)):
            rows.append({name: sum(share.get(name, 0.0) for share in shares) for share in shares for name in share})
            if not math.isfinite(rows[-1]["loss"]):
                self.stop(steps[number], keys[number], own[number], checkpoints)
        seconds = time.perf_counter() - self.started
        means = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
        line = {"step": steps[-1], "epoch": round(epoch, 4)}
        line |= {name: round(sum(values) / len(values), 6) for name, values in means.items()}
        norm = float(norms[-1])  # in float16 gradients may overflow, and the step is left out; JSON knows no infinity
        line |= {
            "learning_rate": rates[-1], "gradient_norm": round(norm, 6) if math.isfinite(norm) else None,
            "samples_per_second": round(len(steps) * self.batch / seconds, 3),
            "tokens_per_second": round(sum(tokens) / seconds, 1), "seconds": round(seconds, 3),
        }  # fmt: skip
        if torch.cuda.is_available():
            line["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        self.waiting = []
        self.put(line)
        self.restart_clock()

    def stop(self, step: int, keys: list[str], own: dict[str, float], checkpoints: Path) -> None:
        bad = [] if all(map(math.isfinite, own.values())) else keys
        named = ", ".join(itertools.chain.from_iterable(self.worker.gather(bad)))
        saved = max(checkpoints.glob("step-*"), default=None)
        raise TrainingError(
            f"The loss of step {step} is not a number. Its examples: {named}. Look at them; otherwise a lower "
            f"learning_rate may mend it. The last checkpoint is {saved}; what the model holds now is spoiled."
        )

    def put(self, line: dict) -> None:
        """One line more."""
        self.lines.append(line)
        if self.view:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(as_text(line))
            except OSError as error:
                raise SpgddError(f"{self.path}: cannot be written ({error.strerror}). Checkpoints are kept.") from error
            self.view.show(line)

    def close(self) -> None:
        if self.view:
            self.view.close()


def as_text(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def read(path: Path) -> list[dict]:
    """The lines of a log; one that a killed run left unfinished is not there."""
    lines = []
    with suppress(ValueError):
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            lines.append(json.loads(text))
    return lines


class Bar:
    """A progress bar; evaluations are printed above it."""

    def __init__(self, total: int, lines: list[dict]):
        done = max((line["step"] for line in lines), default=0)
        self.bar = tqdm(total=total, initial=done, unit="step", smoothing=0.1)

    def show(self, line: dict) -> None:
        self.bar.update(line["step"] - self.bar.n)
        if "held_out" not in line:
            rate = f"{line['learning_rate']:.1e}"
            self.bar.set_postfix(loss=line["loss"], accuracy=line["token_accuracy"], rate=rate, refresh=False)
            return
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in line["held_out"].items())
        self.bar.write(f"step {line['step']}, held out: {figures}")
        for said in line["answers"]:
            self.bar.write("  {question}\n    expected: {expected}\n    answered: {answered}".format(**said))

    def close(self) -> None:
        self.bar.close()


class Curve:
    """Loss and token accuracy over the steps, redrawn in place; one picture stays in the notebook."""

    SECONDS = 2  # between pictures

    def __init__(self, total: int, lines: list[dict]):
        self.total, self.lines, self.handle, self.drawn = total, lines, None, 0.0  # lines: those of the log, it grows

    def show(self, line: dict) -> None:
        if time.monotonic() - self.drawn > self.SECONDS:
            self.close()

    def close(self) -> None:
        from IPython.display import Image, display
        from matplotlib.figure import Figure

        steps, held_out = ([line for line in self.lines if key in line] for key in ("loss", "held_out"))
        if not steps:
            return
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, 2), ("loss", "token_accuracy"), strict=True):
            axes.plot([line["step"] for line in steps], [line[name] for line in steps], label="training")
            if held_out:
                values = [line["held_out"][name] for line in held_out]
                axes.plot([line["step"] for line in held_out], values, "o-", label="held out")
                axes.legend()
            axes.set(xlabel="step", ylabel=name.replace("_", " "), xlim=(0, self.total))
            axes.grid(alpha=0.3)
        step, speed = steps[-1]["step"], f", {steps[-1]['samples_per_second']:.1f} samples/s"
        figure.suptitle(f"step {step} of {self.total}" + speed * (step < self.total))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        picture = Image(buffer.getvalue(), metadata={"alt": f"Loss and share of right tokens up to step {step}."})
        if self.handle:
            self.handle.update(picture)
        else:
            self.handle = display(picture, display_id=True)
        self.drawn = time.monotonic()
