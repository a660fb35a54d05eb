"""What a training run is: a preset, its DeepSpeed file, and options on top of both.

A preset is two files of one name. NAME.yaml holds the fields of ``TrainingSettings``, NAME.json is a DeepSpeed file and
holds the optimiser with its learning rate, which counts without DeepSpeed too. A key without effect is an error.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable
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
    sections: dict = dataclasses.field(default_factory=dict, metadata={"changes": True})  # for DeepSpeed itself


OPTIONS = {field.name: field for field in dataclasses.fields(TrainingSettings) if field.name != "sections"}
OPTIMIZER = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
TOP = {"gradient_clipping": "clip", "train_batch_size": "batch", "train_micro_batch_size_per_gpu": "micro_batch"}
PASSED = ("zero_optimization", "communication_data_type", "comms_logger", "flops_profiler", "aio", "steps_per_print",
          "wall_clock_breakdown", "dump_state")  # fmt: skip
ELSEWHERE = {
    "scheduler": "warmup and schedule in the preset",
    "activation_checkpointing": "checkpointing in the preset",
    "gradient_accumulation_steps": "micro_batch; there are as many as a batch takes",
    "zero_allow_untested_optimizer": "nothing: AdamW is tested",
    "zero_force_ds_cpu_optimizer": "nothing: offloading takes torch's AdamW",
}


def load_settings(
    preset: str | Path = "recommended", deepspeed: str | Path | None = None, **options
) -> TrainingSettings:
    """Settings of a preset (name, or path of a .yaml file), of the DeepSpeed file (default: of its name beside it), and
    fields that go before both. Raises SpgddError that lists every unknown, contradicting or impossible key.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    path = PRESETS / f"{preset}.yaml" if str(preset) in known else Path(preset)
    if not path.is_file():
        raise SpgddError(f"There is no preset {preset!r}: choose one of {', '.join(known)}, or give a .yaml file.")
    other = Path(deepspeed) if deepspeed else path.with_suffix(".json")
    own, errors = _read(path, yaml.safe_load), []
    moved = [key for key in own if key in OPTIMIZER.values()]
    errors += [f"{path}: {key} is set in {other.name}, under optimizer.params." for key in moved]
    errors += _unknown(path, own, OPTIONS)
    from_deepspeed = _deepspeed(other, errors) if deepspeed or other.is_file() else {}
    for key in own.keys() & from_deepspeed.keys():
        if own[key] != from_deepspeed[key]:
            errors.append(f"{path}: {key} is {own[key]}, but {from_deepspeed[key]} in {other}.")
    errors += _unknown("options", options, OPTIONS)
    given = own | from_deepspeed | options
    fields = {key: _value(key, given[key], errors) for key in given.keys() & OPTIONS.keys()}
    if errors:
        raise SpgddError("These settings cannot be used.", *dict.fromkeys(errors))
    return TrainingSettings(**fields, sections=from_deepspeed.get("sections", {}))


def _read(path: Path, parse) -> dict:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SpgddError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SpgddError(f"{path} must hold keys with values, not a {type(content).__name__}.")
    return content


def _deepspeed(path: Path, errors: list[str]) -> dict:
    """Fields of TrainingSettings from a DeepSpeed file, and its "sections" that are DeepSpeed's own affair."""
    content = _read(path, json.loads)

    def section(key: str, of: dict) -> dict:
        """The keys under a key."""
        found = of.get(key, {})
        if not isinstance(found, dict):
            errors.append(f"{path}: {key} must hold keys with values, received {found!r}.")
        return found if isinstance(found, dict) else {}

    for key in content.keys() & ELSEWHERE.keys():
        errors.append(f"{path}: {key} has no effect here; instead: {ELSEWHERE[key]}.")
    errors += _unknown(path, content, {"optimizer", "fp16", "bf16", *TOP, *PASSED, *ELSEWHERE})
    optimizer = section("optimizer", content)
    errors += _unknown(path, optimizer, ("type", "params"), "optimizer.")
    if (kind := optimizer.get("type", "AdamW")) not in ("Adam", "AdamW"):
        errors.append(f"{path}: optimizer.type is {kind}; training takes AdamW.")
    params = section("params", optimizer)
    errors += _unknown(path, params, OPTIMIZER, "optimizer.params.")
    fields = {OPTIMIZER[key]: value for key, value in params.items() if key in OPTIMIZER}
    fields |= {TOP[key]: content[key] for key in content.keys() & TOP.keys()}
    for key, precision in (("fp16", "float16"), ("bf16", "bfloat16")):
        errors += _unknown(path, section(key, content), ("enabled",), f"{key}.")
        if section(key, content).get("enabled"):
            if "precision" in fields:
                errors.append(f"{path}: fp16 and bf16 are both enabled; choose one.")
            fields["precision"] = precision
    zero = section("zero_optimization", content)
    if path.parent != PRESETS:  # DeepSpeed takes seconds to import
        errors += _zero_errors(path, zero)
    return fields | {"sections": {key: content[key] for key in PASSED if key in content}}


def _zero_errors(path: Path, zero: dict) -> list[str]:
    """What DeepSpeed itself would say to its section; nothing where it is not installed, and nothing can come of it."""
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError
    except ImportError:
        return []
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if key in known})
        wrong = []
    except ValidationError as error:
        wrong = error.errors()
    told = [f"{path}: {'.'.join(map(str, ('zero_optimization', *e['loc'])))}: {e['msg']}." for e in wrong]
    return _unknown(path, zero, known, "zero_optimization.") + told


def _unknown(where: str | Path, keys: Iterable, known: Iterable[str], prefix: str = "") -> list[str]:
    found = []
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            found.append(f"{where}: there is no {prefix}{key}; {hint}")
    return found


def _value(key: str, value, errors: list[str]):
    """The value in the field's type; what it cannot be goes to the errors."""
    kind, limits = OPTIONS[key].type, OPTIONS[key].metadata
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-2 as a text
        except (ValueError, OverflowError):
            pass
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    wanted = None
    if value is None is OPTIONS[key].default:
        return None
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
