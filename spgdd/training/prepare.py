"""The model on its way into training and out of it: what learns, what is compiled, and what leaves the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from spgdd.model import SPGDD
from spgdd.profiles import LANGUAGE_PARTS, SPGDD_PARTS
from spgdd.training.settings import Settings


class Objective(nn.Module):
    """What is minimised, as a module: what an engine may cut up or fetch, and not the frozen encoder."""

    def __init__(self, model: SPGDD, loss: Callable, max_length: int):
        super().__init__()
        self.language = model.language
        self.ours = nn.ParameterList(p for name, p in model.named_parameters() if name.startswith(SPGDD_PARTS))
        self.compute = lambda batch: loss(model, batch, max_length)

    def forward(self, batch):
        found = self.compute(batch)
        # No parameter is left out, whatever the batch lacks: AdamW would pass it over, and ranks would not agree.
        return found._replace(total=found.total + 0.0 * sum(parameter.sum() for parameter in self.ours))


def base(model: SPGDD) -> nn.Module:
    """The language model that LoRA was put into."""
    return model.language.llama_model.get_base_model()


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
def prepared(
    model: SPGDD, settings: Settings, data, loss: Callable
) -> Iterator[tuple[Objective, dict[str, nn.Parameter]]]:
    """The model ready to be trained, with what is trained by name; left in evaluation mode, as it was."""
    parameters = {}
    for name, parameter in model.named_parameters():
        ours = name.startswith(tuple(f"{part}." for part in (*SPGDD_PARTS, *LANGUAGE_PARTS)))
        parameter.requires_grad_(ours and ("lora_" in name or "llama_model." not in name))
        if parameter.requires_grad:
            parameters[name] = parameter
    language, llama = model.language, base(model)
    for layer in language.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout["default"] = nn.Dropout(settings.lora_dropout)
    language.pad_to = settings.pad_to
    # Learned prompts pass through the text tower in each step.
    texts = model.imagebind.modality_trunks["text"].blocks if model.abnormal_prompts is not None else []
    for layer in llama.model.layers:
        layer.gradient_checkpointing = settings.checkpointing
        layer._gradient_checkpointing_func = partial(recompute, use_reentrant=False)
    if settings.compile:
        for layer in (*llama.model.layers, *texts):
            layer.compile()
    tower, device = model.imagebind.modality_trunks["vision"], model.device
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for maps and prompt learner
    if data.cache is not None:
        _ = model.fingerprint  # reads the tower
        tower.to("cpu")
    model.train()
    model.imagebind.eval()
    try:
        with padded(llama.lm_head):
            yield Objective(model, loss, settings.max_tgt_len), parameters
    finally:
        model.eval()
        model.zero_grad()
        tower.to(device)
        torch.set_float32_matmul_precision(precision)
        for layer in llama.model.layers:
            layer.gradient_checkpointing = False
        for layer in (*llama.model.layers, *texts):
            layer._compiled_call_impl = None
        language.pad_to = 1
