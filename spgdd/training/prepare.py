"""The model on its way into training and out of it: what learns, what is compiled, and what leaves the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from spgdd.language import Vicuna
from spgdd.model import SPGDD
from spgdd.profiles import LANGUAGE_PARTS, SPGDD_PARTS
from spgdd.training.settings import TrainingSettings


def base(model: SPGDD) -> nn.Module:
    """The language model that LoRA was put into."""
    return model.language.llama_model.get_base_model()


def learned(model: SPGDD) -> dict[str, nn.Parameter]:
    """What is trained, by name: LoRA, the projection and the parts that are SPGDD's own; nothing else has gradients.

    In the order in which each, laid end to end as DeepSpeed does, starts at a multiple of its own alignment: behind one
    of a single value all would start at odd places, where kernels on a GPU stop with "misaligned address".
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        ours = name.startswith(tuple(f"{part}." for part in (*SPGDD_PARTS, *LANGUAGE_PARTS)))
        parameter.requires_grad_(ours and ("lora_" in name or "llama_model." not in name))
        if parameter.requires_grad:
            parameters[name] = parameter
    return dict(sorted(parameters.items(), key=lambda item: -(item[1].numel() & -item[1].numel())))


def recompute_layers(model: SPGDD, on: bool) -> None:
    """Whether the language model's layers are computed again in the backward pass, and what they made is not kept."""
    for layer in base(model).model.layers:
        layer.gradient_checkpointing = on
        layer._gradient_checkpointing_func = partial(recompute, use_reentrant=False)


@contextmanager
def casting_inputs(language: Vicuna, on: bool) -> Iterator[None]:
    """Whether peft takes the inputs of LoRA's layers to float32, the precision of their weights.

    Not while training in half precision: there autocast takes the weights to the inputs. It must be the same in the
    forward pass and wherever that is recomputed, else dropout draws another mask the second time.
    """
    layers = [layer for layer in language.modules() if isinstance(layer, LoraLayer)]
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = on
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = value


@contextmanager
def padded(head: nn.Linear) -> Iterator[None]:
    """The frozen output layer with rows of zeros up to a multiple of 64, and without their logits.

    LLaMA has 32,000 pieces, Vicuna v0 one more: for an odd width cuBLAS falls back to kernels that are several times
    slower. Left alone where it is not plain, or where accelerate moves its weight between devices.
    """
    pieces = head.out_features
    if type(head) is not nn.Linear or hasattr(head, "_hf_hook") or pieces % 64 == 0:
        yield
        return
    head.weight = nn.Parameter(F.pad(head.weight.data, (0, 0, 0, -pieces % 64)), requires_grad=False)
    hook = head.register_forward_hook(lambda head, inputs, logits: logits[..., :pieces])  # for answers too
    try:
        yield
    finally:
        hook.remove()
        head.weight = nn.Parameter(head.weight.data[:pieces], requires_grad=False)


@contextmanager
def prepared(model: SPGDD, settings: TrainingSettings, encoded: bool) -> Iterator[dict[str, nn.Parameter]]:
    """The model ready to be trained, with what is ``learned``; left in evaluation mode, as it was.

    ``encoded``: pictures have been through the vision tower, so that it may leave the device meanwhile.
    """
    language, llama, device = model.language, base(model), model.device
    for layer in language.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout["default"] = nn.Dropout(settings.lora_dropout)
    language.pad_to = settings.pad_to
    # Learned prompts pass through the text tower in each step.
    texts = model.imagebind.modality_trunks["text"].blocks if model.abnormal_prompts is not None else []
    recompute_layers(model, bool(settings.checkpointing))
    if settings.compile:
        for layer in (*llama.model.layers, *texts):
            layer.compile()
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for maps and prompt learner
    if encoded:
        _ = model.fingerprint  # reads the tower
        model.imagebind.modality_trunks["vision"].to("cpu")
    model.train()
    model.imagebind.eval()
    try:
        with padded(llama.lm_head), casting_inputs(language, llama.dtype == torch.float32):
            yield learned(model)
    finally:
        model.eval()
        model.zero_grad()
        model.imagebind.modality_trunks["vision"].to(device)
        torch.set_float32_matmul_precision(precision)
        recompute_layers(model, False)
        for layer in (*llama.model.layers, *texts):
            layer._compiled_call_impl = None
        language.pad_to = 1
