"""What a run reports: lines of JSON, TensorBoard, a bar in the shell, a curve in a notebook.

A step leaves its figures on the device; they are fetched, summed over the ranks and checked once per line of the log,
so that a GPU never waits for them.
"""

import io
import itertools
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from spgdd.errors import SpgddError


class TrainingError(SpgddError):
    """The loss is no longer a number."""


class Log:
    """``folder``/train.jsonl and whatever else can show it. ``done``: steps that the run has behind it."""

    def __init__(self, folder: Path, worker, total: int, batch: int, done: int):
        self.worker, self.batch, self.path, self.waiting = worker, batch, folder / "train.jsonl", []
        before = read(self.path) if worker.rank == 0 else []
        self.lines = worker.gather([line for line in before if line["step"] <= done])[0]  # later ones come again
        self.shows = worker.rank == 0
        if self.shows:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines), "utf-8")
            self.board = tensorboard(folder, done)
            self.view = (Curve if in_notebook() else Bar)(total, self.lines)
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
        columns = {}
        for number, shares in enumerate(zip(*self.worker.gather(own), strict=True)):  # those of every rank
            row = {name: sum(share.get(name, 0.0) for share in shares) for share in shares for name in share}
            if not math.isfinite(row["loss"]):
                self.stop(steps[number], keys[number], own[number], checkpoints)
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        seconds = time.perf_counter() - self.started
        line = {"step": steps[-1], "epoch": round(epoch, 4)}
        line |= {name: round(sum(column) / len(column), 6) for name, column in columns.items()}
        line |= {
            "learning_rate": rates[-1], "gradient_norm": figure(norms[-1]),
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
        if not self.shows:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if self.board:
            for name, value in (line | line.get("held_out", {})).items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"held out/{name}" if "held_out" in line else name, value, line["step"])
        self.view.show(line)

    def close(self) -> None:
        if self.shows:
            self.view.close()
            if self.board:
                self.board.close()


def figure(value: Tensor) -> float | None:
    """A number for JSON, which knows no infinity: gradients in float16 may overflow, and the step is left out."""
    return round(float(value), 6) if math.isfinite(value) else None


def read(path: Path) -> list[dict]:
    """The lines of a log; one that a killed run left unfinished is not there."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def tensorboard(folder: Path, done: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it comes with spgdd[train]
        return None
    return SummaryWriter(str(folder), purge_step=done + 1)


def in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


def words(line: dict) -> list[str]:
    """An evaluation for reading."""
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in line["held_out"].items())
    told = [f"  {a['question']}\n    expected: {a['expected']}\n    answered: {a['answered']}" for a in line["answers"]]
    return [f"step {line['step']}, held out: {figures}", *told]


class Bar:
    """A progress bar; evaluations are printed above it."""

    def __init__(self, total: int, lines: list[dict]):
        from tqdm import tqdm

        done = max((line["step"] for line in lines), default=0)
        self.bar = tqdm(total=total, initial=done, unit="step", smoothing=0.1)

    def show(self, line: dict) -> None:
        self.bar.update(line["step"] - self.bar.n)
        if "held_out" in line:
            self.bar.write("\n".join(words(line)))
        else:
            rate = f"{line['learning_rate']:.1e}"
            self.bar.set_postfix(loss=line["loss"], accuracy=line["token_accuracy"], rate=rate, refresh=False)

    def close(self) -> None:
        self.bar.close()


class Curve:
    """Loss and token accuracy over the steps, redrawn in place; one picture stays in the notebook."""

    SECONDS = 2  # between pictures

    def __init__(self, total: int, lines: list[dict]):
        self.total, self.lines, self.handle, self.drawn = total, list(lines), None, 0.0

    def show(self, line: dict) -> None:
        self.lines.append(line)
        if time.monotonic() - self.drawn > self.SECONDS:
            self.draw()

    def draw(self) -> None:
        from IPython.display import Image, display
        from matplotlib.figure import Figure

        steps = [line for line in self.lines if "loss" in line]
        if not steps:
            return
        held_out = [line for line in self.lines if "held_out" in line]
        figure = Figure(figsize=(8, 2.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, 2), ("loss", "token_accuracy"), strict=True):
            axes.plot([line["step"] for line in steps], [line[name] for line in steps], label="training")
            if held_out:
                values = [line["held_out"][name] for line in held_out]
                axes.plot([line["step"] for line in held_out], values, "o-", label="held out")
                axes.legend()
            axes.set(xlabel="step", ylabel=name.replace("_", " "), xlim=(0, self.total))
            axes.grid(alpha=0.3)
        figure.suptitle(f"step {steps[-1]['step']} of {self.total}, {steps[-1]['samples_per_second']:.1f} samples/s")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        picture = Image(buffer.getvalue())
        if self.handle:
            self.handle.update(picture)
        else:
            self.handle = display(picture, display_id=True)
        self.drawn = time.monotonic()

    def close(self) -> None:
        self.draw()
