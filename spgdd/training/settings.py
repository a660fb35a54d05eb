"""What a training run is: a preset, a .yaml file of the fields of ``TrainingSettings``, and options that go before it.

A key without effect is an error.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from spgdd.errors import SpgddError

PRESETS = Path(__file__).with_name("presets")


def option(default, help: str, **limits):
    """A field with its help. Numbers are above 0, or at least ``least``, and below ``below``; texts one of ``choices``.

    ``changes``: a run may go on with another value; the others would make another run of it.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class TrainingSettings:
    """Every field is also an option of ``spgdd train``."""

    epochs: int = option(1, "rounds over the data")
    steps: int = option(0, "optimiser steps in place of epochs; 0: as many as the epochs take", least=0)
    batch: int = option(16, "examples of one optimiser step, over all GPUs and accumulation")
    micro_batch: int = option(0, "examples that are taken at once; 0: as many as a GPU has memory for", least=0,
                              changes=True)  # fmt: skip
    max_tgt_len: int = option(1024, "tokens of a conversation, without image and prompt tokens")
    learning_rate: float = option(1e-3, "at the end of the warm-up")
    betas: tuple = option((0.9, 0.95), "of AdamW")
    eps: float = option(1e-8, "of AdamW", below=1)
    weight_decay: float = option(0.001, "of AdamW", least=0)
    clip: float = option(1.0, "largest norm of the gradients")
    warmup: float = option(0.1, "share of the steps with a rising learning rate", least=0, below=1)
    schedule: str = option("cosine", "how it falls to zero afterwards: cosine, linear, or constant (not at all)",
                           choices=("cosine", "linear", "constant"))  # fmt: skip
    lora_dropout: float = option(0.1, "share of LoRA's inputs that is left out", least=0, below=1)
    seed: int = option(42, "of the order of the data and all that is random", least=0)
    precision: str = option("auto", "of the frozen models: auto, float32, bfloat16 or float16", changes=True,
                            choices=("auto", "float32", "bfloat16", "float16"))  # fmt: skip
    quantize: str = option("none", "the frozen language model in 8bit or 4bit (QLoRA; needs bitsandbytes)",
                           choices=("none", "8bit", "4bit"), changes=True)  # fmt: skip
    checkpointing: bool = option(None, "recompute each layer in the backward pass: less memory, a third slower "
                                 "(default: where a GPU's memory asks for it)", changes=True)  # fmt: skip
    compile: bool = option(False, "torch.compile each layer: minutes at the start, faster steps", changes=True)
    pad_to: int = option(16, "sequences get a multiple of so many tokens", changes=True)
    log_every: int = option(10, "steps between lines of the log", changes=True)
    save_every: int = option(500, "steps between checkpoints", changes=True)
    keep: int = option(2, "checkpoints that stay", changes=True)
    evaluate_every: int = option(0, "steps between evaluations on held-out samples; 0: none", least=0, changes=True)
    evaluate_on: int = option(64, "held-out samples of one evaluation", changes=True)
    answers: int = option(3, "of them shown with question and answer", least=0, changes=True)
    deepspeed: dict = dataclasses.field(default_factory=dict, metadata={"changes": True})  # what only DeepSpeed needs


OPTIONS = {field.name: field for field in dataclasses.fields(TrainingSettings) if field.name != "deepspeed"}
PASSED = ("zero_optimization", "communication_data_type", "comms_logger", "flops_profiler", "aio", "steps_per_print",
          "wall_clock_breakdown", "dump_state")  # fmt: skip
ELSEWHERE = {  # what DeepSpeed's files may hold and is set for both engines alike
    "optimizer": "learning_rate, betas, eps and weight_decay",
    "scheduler": "warmup and schedule",
    "gradient_clipping": "clip",
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "gradient_accumulation_steps": "micro_batch; there are as many as a batch takes",
    "bf16": "precision",
    "fp16": "precision",
    "activation_checkpointing": "checkpointing",
}


def load_settings(
    preset: str | Path = "recommended", deepspeed: str | Path | None = None, **options
) -> TrainingSettings:
    """Settings of a preset (name, or path of a .yaml file) and fields that go before it.

    ``deepspeed``: a .json file in place of the preset's section of that name. Raises SpgddError that lists every
    unknown or impossible key.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    path = PRESETS / f"{preset}.yaml" if str(preset) in known else Path(preset)
    if not path.is_file():
        raise SpgddError(f"There is no preset {preset!r}: choose one of {', '.join(known)}, or give a .yaml file.")
    own = _read(path, yaml.safe_load)
    section = own.pop("deepspeed", {})
    if deepspeed:
        section = _read(Path(deepspeed), json.loads)
    errors = _unknown(path, own, OPTIONS) + _unknown("options", options, OPTIONS)
    errors += _deepspeed_errors(deepspeed or path, section)
    given = own | options
    fields = {key: _value(key, given[key], errors) for key in given.keys() & OPTIONS.keys()}
    if errors:
        raise SpgddError("These settings cannot be used.", *dict.fromkeys(errors))
    return TrainingSettings(**fields, deepspeed=section)


def _read(path: Path, parse: Callable[[str], object]) -> dict:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SpgddError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpgddError(f"{path} must hold keys with values, not a {type(content).__name__}.")
    return content


def _deepspeed_errors(where: str | Path, section) -> list[str]:
    """What is wrong with the settings for DeepSpeed; of ZeRO's own it is asked, where it is installed."""
    zero = section.get("zero_optimization", {}) if isinstance(section, dict) else None
    if not isinstance(zero, dict):
        return [f"{where}: deepspeed and its zero_optimization must hold keys with values, received {section!r}."]
    errors = [f"{where}: {key} has no effect here; instead: {ELSEWHERE[key]}." for key in section if key in ELSEWHERE]
    errors += _unknown(where, section, {*PASSED, *ELSEWHERE})
    if not zero or Path(where).parent == PRESETS:  # DeepSpeed takes seconds to import
        return errors
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError
    except ImportError:
        return errors
    try:
        DeepSpeedZeroConfig(**{str(key): value for key, value in zero.items()})
    except ValidationError as wrong:
        errors += [f"{where}: {'.'.join(map(str, ('zero_optimization', *e['loc'])))}: {e['msg']}."
                   for e in wrong.errors()]  # fmt: skip
    return errors


def _unknown(where: str | Path, keys: Iterable, known: Iterable[str]) -> list[str]:
    found = []
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            found.append(f"{where}: there is no {key}; {hint}")
    return found


def _value(key: str, value, errors: list[str]):
    """The value in the field's type; what it cannot be goes to the errors."""
    kind, limits, wanted = OPTIONS[key].type, OPTIONS[key].metadata, None
    if value is None is OPTIONS[key].default:
        return None
    if kind is float and type(value) in (int, str):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-2 as a text
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        wanted = kind.__name__
    elif "choices" in limits and value not in limits["choices"]:
        wanted = f"one of {', '.join(limits['choices'])}"
    elif kind in (int, float) and not (0 < value < float("inf") or value == limits.get("least")):
        wanted = "at least 0" if "least" in limits else "above 0"
    elif "below" in limits and value >= limits["below"]:
        wanted = f"below {limits['below']}"
    elif kind is tuple and not (len(value) == 2 and all(isinstance(x, (int, float)) and 0 <= x < 1 for x in value)):
        wanted = "two numbers from 0 to below 1"
    if wanted:
        errors.append(f"{key} must be {wanted}, received {value!r}.")
    return value
