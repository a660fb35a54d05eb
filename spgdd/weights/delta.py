"""Delta checkpoints: the trained tensors alone, without the frozen models they belong to."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spgdd.errors import WeightsError
from spgdd.tensors import write_tensors


def apply_delta(module: nn.Module, state: Mapping[str, Tensor],
                expect: Collection[str] | None = None) -> None:
    """Copy a delta into `module`, all of it or nothing.

    Names are relative to `module`: PandaGPT's `llama_model.*` and `llama_proj.*` belong to `Vicuna`,
    AnomalyGPT's `image_decoder.*` and `prompt_learner.*` to `SPGDD`. Values take the precision and device of
    the module. `expect` lists name prefixes that the delta must cover completely, by default the first
    components of its own names; of a language model with LoRA only the LoRA tensors count. Raises
    WeightsError that lists unknown and missing names, other shapes, and tensors with NaN or infinity.
    """
    own = module.state_dict(keep_vars=True)
    prefixes = tuple({name.split(".")[0] + "." for name in state} if expect is None else expect)
    wanted = {name for name in own
              if name.startswith(prefixes) and ("lora_" in name or "llama_model." not in name)}
    problems = {
        "unknown here": state.keys() - own.keys(),
        "missing in the delta": wanted - state.keys(),
        "of another shape": [f"{name} {list(state[name].shape)}, here {list(own[name].shape)}"
                             for name in state.keys() & own.keys() if state[name].shape != own[name].shape],
        "not finite": [name for name, value in state.items() if not value.isfinite().all()],
    }
    found = [f"{len(names)} {what}: {'; '.join(sorted(names)[:8])}{'; ...' * (len(names) > 8)}."
             for what, names in problems.items() if names]
    if found:
        raise WeightsError(f"The delta does not fit this model. {' '.join(found)} Do delta and profile belong "
                           "together (size of the language model, LoRA rank)?")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def save_delta(module: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the trainable tensors of `module` and `metadata` (in the header) to a `.safetensors` file."""
    write_tensors(path, {name: parameter for name, parameter in module.named_parameters()
                         if parameter.requires_grad}, metadata)
