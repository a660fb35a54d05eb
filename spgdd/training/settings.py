"""What a training run is: a preset, its DeepSpeed file, and options on top of both.

A preset is two files of one name. NAME.yaml holds the fields of ``Settings``, NAME.json is a DeepSpeed file and holds
the optimiser with its learning rate, which counts without DeepSpeed too. A key that would have no effect is an error.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from spgdd.errors import SpgddError

PRESETS = Path(__file__).with_name("presets")


def setting(default, about: str):
    """A field with what it means."""
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Settings:
    """Every field is also an option of ``spgdd train``."""

    epochs: int = setting(1, "rounds over the data")
    steps: int = setting(0, "optimiser steps in place of epochs; 0: as many as the epochs take")
    batch: int = setting(16, "examples of one optimiser step, over all GPUs and accumulation")
    micro_batch: int = setting(0, "examples that one GPU takes at once; 0: its share of the batch")
    max_tgt_len: int = setting(1024, "tokens of a conversation, without image and prompt tokens")
    learning_rate: float = setting(1e-3, "at the end of the warm-up")
    betas: tuple = setting((0.9, 0.95), "of AdamW")
    eps: float = setting(1e-8, "of AdamW")
    weight_decay: float = setting(0.001, "of AdamW")
    clip: float = setting(1.0, "largest norm of the gradients")
    warmup: float = setting(0.1, "share of the steps with a rising learning rate")
    schedule: str = setting("cosine", "how it falls to zero afterwards: cosine, linear, or constant (not at all)")
    lora_dropout: float = setting(0.1, "share of LoRA's inputs that is left out")
    seed: int = setting(42, "of the order of the data and all that is random")
    precision: str = setting("auto", "of the frozen models: auto, float32, bfloat16 or float16")
    quantize: str = setting("none", 'the frozen language model in "8bit" or "4bit" (QLoRA; needs bitsandbytes)')
    checkpointing: bool = setting(False, "recompute each layer in the backward pass: less memory, a third slower")
    compile: bool = setting(False, "torch.compile each layer: minutes at the start, faster steps")
    pad_to: int = setting(16, "sequences get a multiple of so many tokens")
    log_every: int = setting(10, "steps between lines of the log")
    save_every: int = setting(500, "steps between checkpoints")
    keep: int = setting(2, "checkpoints that stay")
    evaluate_every: int = setting(0, "steps between evaluations on held-out samples; 0: none")
    evaluate_on: int = setting(64, "held-out samples of one evaluation")
    answers: int = setting(3, "of them shown with question and answer")
    sections: dict = field(default_factory=dict)  # of the DeepSpeed file, for DeepSpeed itself


# What may begin anew with `--resume`; all else makes another run of it.
FREE = {"micro_batch", "checkpointing", "compile", "precision", "quantize", "pad_to", "log_every", "save_every",
        "keep", "evaluate_every", "evaluate_on", "answers", "sections"}  # fmt: skip
CHOICES = {
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "quantize": ("none", "8bit", "4bit"),
}
ZERO_OR_MORE = {"steps", "micro_batch", "weight_decay", "warmup", "lora_dropout", "evaluate_every", "answers", "seed"}
BELOW_ONE = {"warmup", "lora_dropout", "eps"}

OPTIMIZER = {"lr": "learning_rate", "betas": "betas", "eps": "eps", "weight_decay": "weight_decay"}
TOP = {"gradient_clipping": "clip", "train_batch_size": "batch", "train_micro_batch_size_per_gpu": "micro_batch"}
PASSED = {  # DeepSpeed's own affairs: sections with their keys, None: not looked into
    "zero_optimization": set(
        "stage contiguous_gradients reduce_scatter reduce_bucket_size allgather_partitions allgather_bucket_size "
        "overlap_comm offload_param offload_optimizer sub_group_size round_robin_gradients ignore_unused_parameters "
        "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
        "stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold "
        "memory_efficient_linear zero_hpz_partition_size zero_quantized_weights zero_quantized_gradients".split()
    ),
    **dict.fromkeys("gradient_accumulation_steps steps_per_print wall_clock_breakdown communication_data_type "
                    "comms_logger flops_profiler aio dump_state".split()),
}  # fmt: skip
ELSEWHERE = {
    "scheduler": "warmup and schedule in the preset",
    "activation_checkpointing": "checkpointing in the preset",
    "zero_allow_untested_optimizer": "nothing: AdamW is tested",
    "zero_force_ds_cpu_optimizer": "nothing: offloading takes torch's AdamW",
}


def load_settings(preset: str | Path = "recommended", deepspeed: str | Path | None = None, **options) -> Settings:
    """Settings of a preset (name, or path of a .yaml file), of the DeepSpeed file (default: of its name beside it), and
    fields that go before both. Raises SpgddError that lists every unknown, contradicting or impossible key.
    """
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    path = PRESETS / f"{preset}.yaml" if str(preset) in known else Path(preset)
    if not path.is_file():
        raise SpgddError(f"There is no preset {preset!r}: choose one of {', '.join(known)}, or give a .yaml file.")
    other = Path(deepspeed) if deepspeed else path.with_suffix(".json")
    own, errors = _read(path, yaml.safe_load), []
    moved = [key for key in OPTIMIZER.values() if key in own]
    errors += [f"{path}: {key} is set in {other.name}, under optimizer.params." for key in moved]
    errors += _unknown(path, own, FIELDS)
    from_deepspeed = _deepspeed(other, errors) if deepspeed or other.is_file() else {}
    for key in own.keys() & from_deepspeed.keys():
        if own[key] != from_deepspeed[key]:
            errors.append(f"{path}: {key} is {own[key]}, but {from_deepspeed[key]} in {other}.")
    errors += _unknown("options", options, FIELDS)
    fields = {key: value for key, value in (own | from_deepspeed | options).items() if key in FIELDS | {"sections"}}
    fields = {key: _value(key, value, errors) for key, value in fields.items()}
    if errors:
        raise SpgddError("\n".join(["These settings cannot be used.", *dict.fromkeys(errors)]))
    return Settings(**fields)


FIELDS = {f.name for f in dataclasses.fields(Settings)} - {"sections"}


def _read(path: Path, parse) -> dict:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SpgddError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SpgddError(f"{path} must hold keys with values, not a {type(content).__name__}.")
    return content


def _deepspeed(path: Path, errors: list[str]) -> dict:
    """Fields of Settings from a DeepSpeed file."""
    content, fields = _read(path, json.loads), {}
    for key in content.keys() & ELSEWHERE.keys():
        errors.append(f"{path}: {key} has no effect here; instead: {ELSEWHERE[key]}.")
    errors += _unknown(path, content, {"optimizer", "fp16", "bf16", *TOP, *PASSED, *ELSEWHERE})
    optimizer = content.get("optimizer", {})
    errors += _unknown(path, optimizer, {"type", "params"}, "optimizer.")
    if (kind := optimizer.get("type", "AdamW")) not in ("Adam", "AdamW"):
        errors.append(f"{path}: optimizer.type is {kind}; training takes AdamW.")
    params = optimizer.get("params", {})
    errors += _unknown(path, params, OPTIMIZER, "optimizer.params.")
    fields |= {OPTIMIZER[key]: value for key, value in params.items() if key in OPTIMIZER}
    fields |= {TOP[key]: content[key] for key in content.keys() & TOP.keys()}
    for key, precision in (("fp16", "float16"), ("bf16", "bfloat16")):
        errors += _unknown(path, content.get(key, {}), {"enabled"}, f"{key}.")
        if content.get(key, {}).get("enabled"):
            if "precision" in fields:
                errors.append(f"{path}: fp16 and bf16 are both enabled; choose one.")
            fields["precision"] = precision
    for key in content.keys() & PASSED.keys():
        if PASSED[key]:
            errors += _unknown(path, content[key], PASSED[key], f"{key}.")
    return fields | {"sections": {key: content[key] for key in sorted(content.keys() & PASSED.keys())}}


def _unknown(where: str | Path, keys: Iterable[str], known: Iterable[str], prefix: str = "") -> list[str]:
    found = []
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(sorted(known))}."
            found.append(f"{where}: there is no {prefix}{key}; {hint}")
    return found


def _value(key: str, value, errors: list[str]):
    """The value in the field's type; what it cannot be goes to the errors."""
    kind = Settings.__annotations__[key]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-2 as a text
        except ValueError:
            pass
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        errors.append(f"{key} must be {kind.__name__}, received {value!r}.")
    elif key in CHOICES and value not in CHOICES[key]:
        errors.append(f"{key} must be one of {', '.join(CHOICES[key])}, received {value!r}.")
    elif kind in (int, float) and not (0 < value or value == 0 and key in ZERO_OR_MORE):
        errors.append(f"{key} must be {'at least 0' if key in ZERO_OR_MORE else 'above 0'}, received {value!r}.")
    elif key in BELOW_ONE and value >= 1:
        errors.append(f"{key} must be below 1, received {value!r}.")
    elif kind is tuple and not (len(value) == 2 and all(isinstance(x, (int, float)) and 0 <= x < 1 for x in value)):
        errors.append(f"{key} must be two numbers from 0 to below 1, received {value!r}.")
    return value
