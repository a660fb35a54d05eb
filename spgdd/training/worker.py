"""Gradients and steps on one device or many, through accelerate: plain, over processes, or under DeepSpeed's ZeRO.

Trained parameters and AdamW's moments are float32 and are given out whole, by name, so that a run may go on with
another number of processes, with DeepSpeed or without.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from spgdd.errors import SpgddError
from spgdd.training.settings import TrainingSettings

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
State = Mapping[str, Mapping[str, Tensor]]  # "value" and the moments, each by the parameter's name
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"  # accelerate's mark, which `accelerate launch --use_deepspeed` sets too


def join_processes(device: str, deepspeed: bool = False) -> PartialState:
    """The processes of this run: those that `accelerate launch`, torchrun, `deepspeed` or a notebook_launcher started.

    Alone without them. On GPUs each gets its own, ``PartialState.device``. ``device``: "cpu" or another.
    """
    if deepspeed and "RANK" not in os.environ:  # DeepSpeed wants a group, be it of one
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return PartialState(cpu=device == "cpu")


class Objective(nn.Module):
    """The loss of a batch, as a module of nothing but what learns: that much is exchanged between processes."""

    def __init__(self, loss: Callable, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self.learned = nn.ParameterList(parameters.values())
        self.loss, self.ours = loss, [p for name, p in parameters.items() if not name.startswith("language.")]

    def forward(self, batch=None):
        """``loss`` of a batch; of none, a zero that every parameter has a gradient of.

        No parameter is left out, whatever the batch lacks: AdamW would pass it over, and ranks would not agree.
        """
        if batch is None:
            return 0.0 * sum(parameter.sum() for parameter in self.learned)
        found = self.loss(batch)
        return found._replace(total=found.total + 0.0 * sum(parameter.sum() for parameter in self.ours))


class Worker:
    """One process of a run, with its ``Objective`` and AdamW. ``half``: a base in float16, whose losses are scaled."""

    def __init__(self, loss, parameters: Mapping[str, nn.Parameter], settings: TrainingSettings, half: bool,
                 deepspeed: bool = False):  # fmt: skip
        device = next(iter(parameters.values())).device.type
        self.parameters, self.clip, self.launched = parameters, settings.clip, os.environ.get(DEEPSPEED)
        deepspeed = deepspeed or self.launched == "true"
        self.rank, self.ranks = (processes := join_processes(device, deepspeed)).process_index, processes.num_processes
        if settings.batch % self.ranks:
            raise SpgddError(f"{self.ranks} ranks cannot share a batch of {settings.batch}: choose a multiple.")
        if deepspeed and half:
            raise SpgddError("DeepSpeed trains no float16 base here: take --precision bfloat16 or --engine torch.")
        plugin = zero_plugin(settings, self.ranks) if deepspeed else None
        # Precision is the model's own affair, and so is the device.
        self.accelerator = Accelerator(mixed_precision="no", device_placement=False, deepspeed_plugin=plugin)
        self.deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        options = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
        adamw = torch.optim.AdamW(parameters.values(), lr=0.0, fused=True, **options)
        self.module, self.optimiser = self.accelerator.prepare(Objective(loss, parameters), adamw)
        self.scaler = torch.amp.GradScaler(device, enabled=half)
        # Numbers are gathered on the CPU, so that they do not wait for a GPU.
        self.group = torch.distributed.new_group(backend="gloo") if self.ranks > 1 else None

    def step_of_many(self) -> AbstractContextManager:
        """Around all forward and backward passes of a step.

        DeepSpeed exchanges gradients as they come, and the order would differ where batches of ranks differ in kind:
        so once, after all of them.
        """
        return self.module.coalesce_grad_reduction() if self.deepspeed else nullcontext()

    def one_of_step(self, last: bool) -> AbstractContextManager:
        """Around one forward and backward pass; gradients are exchanged with the ``last``."""
        return nullcontext() if last or self.deepspeed else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum of all ranks' losses."""
        loss = loss * self.ranks  # the exchange takes the mean
        if self.deepspeed:
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            self.scaler.scale(loss).backward()

    def step(self, rate: float) -> Tensor:
        """Update with this learning rate; returns the gradients' norm before clipping.

        A float16 base may overflow: then the step is left out and the scale halved.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if self.deepspeed:
            self.module.step()
            return torch.as_tensor(self.module.get_global_grad_norm())
        self.scaler.unscale_(self.optimiser)
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        return norm

    def gather(self, thing) -> list:
        """One thing of each rank."""
        things = [thing] * self.ranks
        if self.group:
            torch.distributed.all_gather_object(things, thing, group=self.group)
        return things

    def on_first(self, do: Callable[[], object]) -> None:
        """Let rank 0 alone do something while the others wait; its SpgddError is raised on all."""
        problem = None
        try:
            if self.rank == 0:
                do()
        except SpgddError as error:
            problem = error
        if problem := self.gather(problem)[0]:
            raise problem

    def state(self) -> State:
        """Values and moments on the CPU; every rank calls."""

        def whole(parameter: nn.Parameter, kind: str) -> Tensor:
            if not self.deepspeed:
                return parameter.detach() if kind == "value" else self.optimiser.state[parameter][kind]
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            if kind == "value":
                return safe_get_full_fp32_param(parameter)
            return safe_get_full_optimizer_state(parameter, kind)

        return {kind: {name: whole(parameter, kind).cpu() for name, parameter in self.parameters.items()}
                for kind in ("value", *MOMENTS)}  # fmt: skip

    def load(self, state: State, step: int) -> None:
        """What ``state`` gave after so many steps."""
        with self.step_of_many():  # of no effect, but AdamW makes its moments in it
            self.backward(self.module())
        self.step(0.0)
        if self.deepspeed:
            from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                value, *moments = (state[kind][name].to(parameter.device) for kind in ("value", *MOMENTS))
                parameter.copy_(value)
                if self.deepspeed:
                    safe_set_full_fp32_param(parameter, value)
                for kind, moment in zip(MOMENTS, moments, strict=True):
                    if self.deepspeed:
                        safe_set_full_optimizer_state(parameter, moment, kind)
                    else:
                        self.optimiser.state[parameter][kind].copy_(moment)
        for own in self.optimiser.state.values():
            own["step"].fill_(step)

    def close(self) -> None:
        """Leave the parameters, and accelerate as it was: it would hold to DeepSpeed in this process for ever."""
        if self.deepspeed:
            self.module.destroy()
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ[DEEPSPEED] = self.launched or "false"


def zero_plugin(settings: TrainingSettings, ranks: int) -> DeepSpeedPlugin:
    """What DeepSpeed is told. Precision, accumulation and learning rate are the loop's."""
    zero = settings.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if zero not in (1, 2):
        raise SpgddError(
            f"zero_optimization.stage must be 1 or 2 in the DeepSpeed file, received {zero!r}. Stage 3 would cut up "
            "the frozen models: to fit them into less memory, choose --quantize 4bit."
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise SpgddError(f"DeepSpeed cannot be used ({error}): pip install 'spgdd[train]'.") from error
    return DeepSpeedPlugin(hf_ds_config=settings.deepspeed | {
        "train_micro_batch_size_per_gpu": settings.batch // ranks, "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip, "zero_force_ds_cpu_optimizer": False,
    })  # fmt: skip
