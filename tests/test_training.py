"""The training loop: what a step is made of, stopping and going on, one rank and two, settings, logs, the command."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import spgdd.training.log
from conftest import ROOT
from spgdd import cli
from spgdd.errors import DataError, SpgddError
from spgdd.tensors import read_tensors
from spgdd.training import checkpoint, fit, prepare
from spgdd.training.log import TrainingError
from spgdd.training.loop import learning_rate_at, train
from spgdd.training.objective import spgdd_loss
from spgdd.training.settings import TrainingSettings, load_settings
from spgdd.training.validation import validate
from spgdd.training.worker import Worker
from spgdd.weights.delta import apply_delta
from tiny_training import TinyData, settings, tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def delta(folder):
    return load_file(folder / "delta.safetensors")


def furthest(first, second):
    """The largest difference between two deltas."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def losses(history, name="loss"):
    return [line[name] for line in history if "loss" in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run to compare with: folder, lines of its log, the model."""
    folder, model = tmp_path_factory.mktemp("plain"), tiny_model()
    torch.set_num_threads(1)
    return folder, train(model, TinyData(), settings(epochs=1, lora_dropout=0.0), folder), model


# A step


def test_a_batch_may_be_cut_as_memory_asks(plain, tmp_path):
    """Language loss by answer tokens, pixel losses by images: the sum of the parts is the whole."""
    folder, history, _ = plain
    cut = train(tiny_model(), TinyData(), settings(epochs=1, lora_dropout=0.0, micro_batch=1), tmp_path)
    for name in ("loss", "language", "token_accuracy"):
        assert losses(cut, name) == pytest.approx(losses(history, name), abs=2e-5), name
    assert losses(cut, "gradient_norm") == pytest.approx(losses(history, "gradient_norm"), rel=2e-4)  # some 50 at first
    assert furthest(delta(folder), delta(tmp_path)) < 1e-4


def test_recomputation_and_padding_change_nothing(plain, tmp_path):
    options = {"epochs": 1, "lora_dropout": 0.0, "checkpointing": True, "pad_to": 64}
    again = train(tiny_model(), TinyData(), settings(**options), tmp_path)
    assert losses(again) == pytest.approx(losses(plain[1]), abs=2e-5)
    assert furthest(delta(plain[0]), delta(tmp_path)) < 1e-4


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_in_half_precision_recomputation_finds_the_same_gradients(device, dtype, dropout, compiled, monkeypatch):
    original, backend = torch.nn.Module.compile, {"cpu": "aot_eager", "cuda": "inductor"}[device]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend=backend, fullgraph=True))

    def gradients(checkpointing):
        torch._dynamo.reset()
        model, data = tiny_model(dtype).to(device), TinyData()
        batch = data.collate([data.example(index, 0) for index in range(4)]).to(device)
        options = settings(lora_dropout=dropout, checkpointing=checkpointing, compile=compiled)
        with prepare.prepared(model, options, encoded=True) as parameters:
            torch.manual_seed(1)
            spgdd_loss(model, batch, 64).total.backward()
            return torch.cat([each.grad.flatten() for name, each in parameters.items() if "lora" in name])

    plain, recomputed = gradients(False), gradients(True)
    assert (plain - recomputed).norm() < 1e-6 * plain.norm()


@pytest.mark.parametrize(
    ("most", "given", "expected"),
    [
        ((20, 40), {}, (16, False)), ((5, 40), {}, (4, False)), ((3, 20), {}, (16, True)), ((3, 1), {}, (1, True)),
        ((20, 40), {"checkpointing": True}, (16, True)), ((2, 2), {"checkpointing": False}, (2, False)),
        ((7, 40), {"micro_batch": 8}, (8, True)), ((0, 0), {}, None),
    ],
)  # fmt: skip
def test_as_many_examples_as_fit_without_recomputation_and_else_with_it(monkeypatch, capsys, most, given, expected):
    """``most``: what fits without and with recomputation."""
    monkeypatch.setattr(fit, "SPARE", 0)
    model, data, options = tiny_model(), TinyData(96), settings(**{"batch": 16, "checkpointing": None} | given)

    def objective(model, batch, max_length):
        if len(batch.keys) > most[prepare.base(model).model.layers[0].gradient_checkpointing]:
            raise torch.OutOfMemoryError("tried")
        return spgdd_loss(model, batch, max_length)

    with prepare.prepared(model, options, encoded=True) as parameters:
        worker = Worker(None, parameters, options, half=False)
        if expected is None:
            with pytest.raises(SpgddError, match="Not even one example fits .*--quantize 4bit"):
                fit.fitted(model, data, options, worker, objective)
            return
        found = fit.fitted(model, data, options, worker, objective)
        assert (found.micro_batch, found.checkpointing) == expected
        assert prepare.base(model).model.layers[0].gradient_checkpointing == expected[1]
        assert not any(parameter.grad is not None for parameter in parameters.values())
    assert f"takes {expected[0]} examples at once, with" in capsys.readouterr().err


def test_what_did_not_fit_is_gone_before_the_vision_tower_comes_back(tmp_path, monkeypatch):
    model, held = tiny_model(), []

    def objective(model, batch, max_length):
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    tower = model.imagebind.modality_trunks["vision"]
    monkeypatch.setattr(tower, "to", lambda device: held and held.append(held[0]()))
    with pytest.raises(SpgddError, match="Step 1 does not fit .*--checkpointing, or a --micro_batch below 8"):
        train(model, TinyData(), settings(batch=8), tmp_path, objective=objective)
    assert held[1:] == [None]


def test_rows_of_zeros_in_the_output_layer_change_nothing(monkeypatch):
    model, data = tiny_model(), TinyData()
    batch, head = data.collate([data.example(index, 0) for index in range(4)]), prepare.base(model).lm_head
    weight, found = head.weight.clone(), []

    def compute():
        with prepare.prepared(model, settings(lora_dropout=0.0), encoded=True) as parameters:
            total = spgdd_loss(model, batch, 64).total
            total.backward()
            found.append([total.detach(), *(parameter.grad for parameter in parameters.values())])
            return len(head.weight), head(torch.ones(32)).shape

    assert compute() == (448, (400,)), "answers cannot have other pieces"
    assert torch.equal(head.weight, weight) and head(torch.ones(32)).shape == (400,)
    monkeypatch.setattr(prepare, "padded", nullcontext)
    assert compute() == (400, (400,))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_layers_compile_to_one_graph_and_are_left_as_they_were(plain, tmp_path, monkeypatch):
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model()
    options = {"epochs": 1, "steps": 2, "lora_dropout": 0.0, "compile": True, "pad_to": 64, "schedule": "constant"}
    train(model, TinyData(), settings(**options), tmp_path)
    # LLaMA's layers have one. The text tower has another with gradients, and for 14 and for 10 sentences without them.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    layers = *prepare.base(model).model.layers, *model.imagebind.modality_trunks["text"].blocks
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_only_lora_and_the_projection_and_the_own_parts_learn(plain):
    fresh, trained = dict(tiny_model().named_parameters()), dict(plain[2].named_parameters())
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    written = delta(plain[0])
    assert changed <= written.keys() and "language.llama_proj.weight" in changed
    assert {name.split(".")[0] for name in changed} == {
        "language", "image_decoder", "prompt_learner", "memory", "comparison", "focus", "memory_tokens",
        "abnormal_prompts",
    }  # fmt: skip
    assert all("lora_" in name for name in written if "llama_model" in name)
    assert not any(module.training for module in plain[2].modules())


def test_the_delta_makes_another_model_the_same(plain):
    folder, _, model = plain
    other = tiny_model()
    apply_delta(other, read_tensors(folder / "delta.safetensors"))
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in other.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_trained_in_float32(plain, tmp_path, dtype):
    model = tiny_model(dtype)
    history = train(model, TinyData(), settings(epochs=1, lora_dropout=0.0, learning_rate=1e-4), tmp_path)
    assert all(value.dtype == torch.float32 for value in delta(tmp_path).values())
    assert losses(history)[0] == pytest.approx(losses(plain[1])[0], abs=0.02)
    position = checkpoint.load(checkpoint.every(tmp_path / "checkpoints")[-1])[1]
    overflown = sum(norm is None for norm in losses(history, "gradient_norm"))
    assert position["loss_scale"].get("scale", 1.0) == (2.0**16 / 2**overflown if dtype == torch.float16 else 1.0)


def test_at_an_overflow_the_step_is_left_out_the_loss_scale_falls_and_it_rises_again():
    weight = torch.nn.Parameter(torch.ones(3))
    worker = Worker(None, {"weight": weight}, settings(), half=True)
    worker.scaler.set_growth_interval(3)
    factors = (1e38, 2**15, 0), (1e38, 2**14, 0), (1e-3, 2**14, 1), (1e-3, 2**14, 1), (1e-3, 2**15, 1)
    for number, (factor, expected, moves) in enumerate(factors):
        before = weight.detach().clone()
        worker.backward((weight * factor).sum())
        norm = worker.step(1e-2)
        assert worker.scaler.get_scale() == expected, number
        assert bool(norm.isfinite()) == bool(moves) == (not torch.equal(weight, before)), number


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.00077), ("linear", 1 / 90), ("constant", 1.0)])
def test_the_learning_rate_rises_and_falls(schedule, last):
    chosen = TrainingSettings(warmup=0.1, schedule=schedule, learning_rate=1.0)
    rates = [learning_rate_at(step, 100, chosen) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(last, abs=5e-4)


# Stopping and going on


def run_apart(job, folder, options, count=1):
    """Runs in processes of their own, at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [sys.executable, Path(__file__).with_name("tiny_training.py"), job, folder, json.dumps(options)]
    started = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), said[0][-3000:]


def test_killed_twenty_times_and_resumed_the_weights_are_the_same_bit_for_bit(tmp_path):
    run_apart("chain", tmp_path, {"seed": 1, "kills": 20})
    whole, killed = (delta(tmp_path / name) for name in ("whole", "killed"))
    assert furthest(whole, killed) == 0.0
    lines = [[line["loss"] for line in spgdd.training.log.read(tmp_path / name / "train.jsonl")]
             for name in ("whole", "killed")]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 36
    kept = sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir())
    assert kept == ["step-00000035", "step-00000036"]


class Interrupted(TinyData):
    """Sends this process a signal while a step's data are read."""

    def __init__(self, number, at):
        super().__init__()
        self.number, self.left = number, at

    def collate(self, examples):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().collate(examples)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_and_the_run_goes_on(tmp_path, capfd, number, ends):
    options = settings(epochs=1, save_every=100)
    with pytest.raises(ends):
        train(tiny_model(), Interrupted(number, at=4), options, tmp_path / "cut")
    (saved,) = checkpoint.every(tmp_path / "cut/checkpoints")  # data are read ahead of their step
    assert saved.name in ("step-00000002", "step-00000003")
    assert f"Stopped after step {saved.name[-1]}." in capfd.readouterr().err
    again = train(tiny_model(), TinyData(), options, tmp_path / "cut", resume=True)
    whole = train(tiny_model(), TinyData(), options, tmp_path / "whole")
    assert losses(again) == losses(whole)
    assert furthest(delta(tmp_path / "cut"), delta(tmp_path / "whole")) == 0.0


def test_another_runs_folder_is_refused(plain, tmp_path):
    shutil.copytree(plain[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(SpgddError, match="There is a run in .*--resume"):
        train(tiny_model(), TinyData(), settings(epochs=1), tmp_path)
    with pytest.raises(SpgddError, match="another run: epochs 1 there, 2 here; 24 examples there, 48 here"):
        train(tiny_model(), TinyData(48), settings(epochs=2, lora_dropout=0.0), tmp_path, resume=True)
    done = train(tiny_model(), TinyData(), settings(epochs=1, lora_dropout=0.0, keep=1), tmp_path, resume=True)
    assert losses(done) == losses(plain[1]), "a finished run that is resumed is finished"


class Broken(TinyData):
    """One of its examples is not a number."""

    def example(self, index, epoch):
        key, *rest = super().example(index, epoch)
        if index == 5:
            rest[3] = rest[3] * float("nan")
        return key, *rest


def test_a_loss_that_is_not_a_number_names_its_batch_and_leaves_the_last_checkpoint(tmp_path):
    options = settings(epochs=1, save_every=1, log_every=100)
    order = Broken().order(0, options.seed, options.batch)
    step = next(number for number, rows in enumerate(order, 1) if 5 in rows)
    with pytest.raises(TrainingError, match=f"step {step} is not a number. .*picture 5.*step-0000000{step - 1};"):
        train(tiny_model(), Broken(), options, tmp_path)
    last = checkpoint.load(checkpoint.every(tmp_path / "checkpoints")[-1])
    assert last[1]["step"] == step - 1
    assert all(value.isfinite().all() for values in last[0].values() for value in values.values())


class Uneven(TinyData):
    """Its second epoch is shorter."""

    def order(self, epoch, seed, batch):
        return super().order(epoch, seed, batch)[epoch:]


def test_epochs_of_different_lengths_are_told_before_a_step_of_them_and_do_not_end_a_run_early(tmp_path):
    options = settings(epochs=2, save_every=1)
    length = len(Uneven().order(0, options.seed, options.batch))
    with pytest.raises(DataError, match=f"Epoch 1 has {length - 1} batches, the first {length}: they must be as many"):
        train(tiny_model(), Uneven(), options, tmp_path)
    reached = checkpoint.load(checkpoint.every(tmp_path / "checkpoints")[-1])[1]["step"]
    assert reached == length - 1  # a step is read while the one before it is computed


# Ranks


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_two_ranks_learn_what_one_learns_and_one_goes_on_where_two_stopped(tmp_path, engine):
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    options = {"epochs": 2, "lora_dropout": 0.0, "keep": 9, "micro_batch": 1}
    run_apart("ranks", tmp_path, [options | {"name": "two", "engine": engine}], count=2)
    for name in ("resumed", "with the other"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        for path in checkpoint.every(tmp_path / name / "checkpoints")[2:]:  # as if it had stopped after the second
            shutil.rmtree(path)
    other = {"torch": "deepspeed", "deepspeed": "torch"}[engine]
    run_apart("ranks", tmp_path, [
        options | {"name": "resumed", "resume": True, "engine": engine}, options | {"name": "one"},
        options | {"name": "with the other", "resume": True, "engine": other},
    ])  # fmt: skip
    names = "two", "one", "resumed", "with the other"
    two, one, *resumed = (spgdd.training.log.read(tmp_path / name / "train.jsonl") for name in names)
    assert len(two) == len(one) == 12 and [len(lines) for lines in resumed] == [12, 12]
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert furthest(delta(tmp_path / "two"), delta(tmp_path / "one")) < 1e-4
    for name, lines in zip(names[2:], resumed, strict=True):
        assert losses(lines) == pytest.approx(losses(two), abs=1e-4)
        assert furthest(delta(tmp_path / name), delta(tmp_path / "two")) < 1e-4


# Settings


def test_the_paper_preset_is_what_its_authors_state():
    paper = load_settings("paper")
    assert (paper.epochs, paper.batch, paper.learning_rate, paper.max_tgt_len) == (50, 16, 1e-2, 1014)
    assert load_settings("paper", learning_rate=3e-4).learning_rate == 3e-4


def test_every_mistake_in_the_files_is_told_at_once(tmp_path):
    (tmp_path / "mine.yaml").write_text("epoch: 3\nlearning_rate: 0\nbatch: 8\nwarmup: 2\ncompile: yes please\n")
    (tmp_path / "mine.json").write_text(json.dumps({
        "train_batch_size": 16, "bf16": {"enable": True}, "fp16": {"enabled": True}, "gradient_cliping": 1,
        "scheduler": {"type": "WarmupDecayLR"}, "zero_optimization": {"stag": 2, "overlap_comm": "so so"},
        "optimizer": {"type": "Lion", "params": {"lr": 0, "beta": 1}},
    }))  # fmt: skip
    with pytest.raises(SpgddError) as error:
        load_settings(tmp_path / "mine.yaml", tmp_path / "mine.json", clip="no", steps=-1)
    for part in (
        "mine.yaml: there is no epoch; did you mean epochs?", "learning_rate must be above 0",
        "warmup must be below 1", "compile must be bool, received 'yes please'", "clip must be float, received 'no'",
        "steps must be at least 0", "mine.json: train_batch_size has no effect here; instead: batch",
        "bf16 has no effect here; instead: precision", "fp16 has no effect here; instead: precision",
        "scheduler has no effect here; instead: warmup and schedule", "did you mean gradient_clipping?",
        "optimizer has no effect here; instead: learning_rate, betas", "zero_optimization.stag: Extra inputs",
        "zero_optimization.overlap_comm: Input should be a valid boolean",
    ):  # fmt: skip
        assert part in str(error.value), part
    with pytest.raises(SpgddError, match="no preset 'papers': choose one of paper, recommended, workshop"):
        load_settings("papers")


def test_parameters_laid_end_to_end_start_where_kernels_may_read_them():
    start, order = 0, prepare.learned(tiny_model())
    assert {parameter.numel() & -parameter.numel() for parameter in order.values()} > {1, 2, 32}
    for parameter in order.values():
        assert start % (parameter.numel() & -parameter.numel()) == 0
        start += parameter.numel()


def test_a_deepspeed_file_goes_before_the_presets_section(tmp_path):
    zero = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "own.json").write_text(json.dumps(zero))
    assert load_settings("paper").deepspeed["zero_optimization"]["stage"] == 2
    assert load_settings("paper", tmp_path / "own.json") == dataclasses.replace(load_settings("paper"), deepspeed=zero)


# What a run tells


def test_the_log_has_figures_parts_and_answers(tmp_path):
    options = settings(epochs=1, log_every=2, evaluate_every=3, evaluate_on=6, answers=2)
    history = train(tiny_model(), TinyData(), options, tmp_path, held_out=TinyData(6), log_folder=tmp_path / "log")
    assert history == spgdd.training.log.read(tmp_path / "log/train.jsonl")
    assert [line["step"] for line in history] == [2, 3, 4, 6, 6]
    figures = history[0]
    parts = sum(figures[name] for name in ("focal", "dice", "triplet", "matching") if name in figures)
    assert {"language", "token_accuracy", "samples_per_second", "tokens_per_second", "learning_rate"} <= figures.keys()
    assert figures["loss"] > figures["language"] and parts > 0
    held_out = history[1]
    assert held_out["held_out"].keys() >= {"loss", "token_accuracy"} and len(held_out["answers"]) == 2
    assert held_out["answers"][0].keys() == {"question", "expected", "answered"}


def test_held_out_samples_are_not_every_nth():
    """Of pictures product by product these could be the first of each, all of them good."""

    class Recorded(TinyData):
        def batches(self, plan, epoch):
            self.rows = [row for rows in plan for row in rows]
            return super().batches(plan, epoch)

    data = Recorded(24)  # every second one is good
    validate(tiny_model(), data, settings(evaluate_on=12), spgdd_loss)
    assert len(set(data.rows)) == 12 and {row % 2 for row in data.rows} == {0, 1}


def test_a_notebook_gets_one_picture_that_is_redrawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import IPython.display

    shown, updated = [], []

    class Handle:
        def update(self, picture):
            updated.append(picture)

    monkeypatch.setattr(spgdd.training.log, "is_notebook", lambda: True)
    monkeypatch.setattr(spgdd.training.log.Curve, "SECONDS", 0)
    monkeypatch.setattr(IPython.display, "display", lambda picture, display_id: shown.append(picture) or Handle())
    train(tiny_model(), TinyData(), settings(epochs=1, steps=3), tmp_path)
    assert len(shown) == 1 and len(updated) == 3 and updated[-1].data[:4] == b"\x89PNG" and updated[-1].alt


def test_the_command_trains_mini_on_the_fly(tmp_path, capsys):
    text = ROOT / "data/mini/TADD_text.json"
    common = ["train", "--profile", "mini", "--preset", "workshop", "--data_path", str(text), "--on_the_fly"]
    short = ["--steps", "1", "--batch", "2", "--variants", "0", "--no-compile", "--evaluate_every", "0"]
    assert cli.main([*common, *short, "--save_path", str(tmp_path / "new/deep")]) == 0
    assert "delta.safetensors: trained" in capsys.readouterr().out
    assert read_tensors(tmp_path / "new/deep/delta.safetensors").keys() > {"language.llama_proj.weight"}
    assert cli.main([*common, *short, "--save_path", str(tmp_path / "new/deep")]) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["train", "--preset", "workshop"]) == 1
    assert "Nothing to train on: give --data_path" in capsys.readouterr().err
