"""Who computes: plain torch on one device, or DeepSpeed on one or many. The loop sees no difference.

Both keep the trained parameters and AdamW's moments in float32 and give them out whole, by name, so that a run may go
on with the other engine or with another number of ranks.
"""

import atexit
import os
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from spgdd.errors import SpgddError
from spgdd.training.settings import Settings

Parameters = Mapping[str, nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
LARGEST_SCALE, PATIENCE = 2.0**16, 2000  # of the loss in float16; good steps before it is doubled


def adamw(parameters: Parameters, settings: Settings) -> torch.optim.AdamW:
    options = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    return torch.optim.AdamW(parameters.values(), lr=0.0, fused=True, **options)


class LossScale:
    """What a loss is multiplied with so that gradients in float16 do not vanish: halved at each overflow."""

    def __init__(self, on: bool):
        self.on, self.value, self.good = on, LARGEST_SCALE if on else 1.0, 0

    @property
    def state(self) -> list:
        return [self.value, self.good]

    @state.setter
    def state(self, state: list) -> None:
        if self.on:
            self.value, self.good = state

    def update(self, finite: bool) -> None:
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good % PATIENCE == 0:
            self.value = min(2 * self.value, LARGEST_SCALE)


class Torch:
    """One process, one device."""

    rank, ranks = 0, 1

    def __init__(self, module: nn.Module, parameters: Parameters, settings: Settings, half: bool):
        self.module, self.parameters, self.settings, self.scale = module, parameters, settings, LossScale(half)
        self.device = next(iter(parameters.values())).device
        self.optimiser = adamw(parameters, settings)

    def accumulate(self):
        """Around all calls of ``backward`` before a ``step``."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale.value).backward()

    def step(self, rate: float) -> Tensor:
        """Update with this learning rate; returns the gradients' norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters.values()]
        norm = torch.nn.utils.get_total_norm(gradients) / self.scale.value
        torch._foreach_mul_(gradients, (self.settings.clip / (norm + 1e-6)).clamp(max=1.0) / self.scale.value)
        if finite := not self.scale.on or bool(norm.isfinite()):
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.step()
        if self.scale.on:
            self.scale.update(finite)
        self.optimiser.zero_grad()
        return norm

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""
        return values

    def gather(self, thing) -> list:
        """One thing of each rank."""
        return [thing]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors on the CPU by kind ("value" or one of MOMENTS) and parameter; every rank calls, rank 0 receives."""
        found = {"value": {name: parameter.detach().cpu() for name, parameter in self.parameters.items()}}
        for kind in MOMENTS:
            found[kind] = {name: self.optimiser.state[p][kind].cpu() for name, p in self.parameters.items()}
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """What ``state`` gave after so many steps."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state["value"][name])
            moments = {kind: state[kind][name].to(parameter.device, copy=True) for kind in MOMENTS}
            self.optimiser.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}


def aligned(parameters: Parameters) -> Parameters:
    """In the order in which each of them, laid end to end as ZeRO does, starts at a multiple of its own alignment.

    Behind one of a single value all would start at odd places, where kernels on a GPU stop with "misaligned address".
    """
    return dict(sorted(parameters.items(), key=lambda item: -(item[1].numel() & -item[1].numel())))


class DeepSpeed:
    """ZeRO stage 1, 2 or 3 over the processes that `deepspeed`, torchrun or mpirun started; alone without them."""

    def __init__(self, module: nn.Module, parameters: Parameters, settings: Settings, half: bool):
        try:
            import deepspeed
        except ImportError as error:
            raise SpgddError(f"DeepSpeed cannot be used ({error}): pip install 'spgdd[train]'.") from error
        start_processes()
        parameters = aligned(parameters)
        self.parameters, self.scale = parameters, LossScale(half)
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        on_gpus = torch.distributed.get_backend() != "gloo"
        self.group = torch.distributed.new_group(backend="gloo") if on_gpus else None  # numbers need not wait for a GPU
        self.engine, self.optimiser, *_ = deepspeed.initialize(
            model=module, model_parameters=list(parameters.values()), optimizer=adamw(parameters, settings),
            config=deepspeed_config(settings, self.ranks),
        )  # fmt: skip
        self.engine.set_gradient_accumulation_boundary(True)  # every step of ours is one of its optimiser
        self.module, self.device, self.stage = self.engine, self.engine.device, self.engine.zero_optimization_stage()
        if self.stage == 3:  # ranks run these parts as often as their batches need: they cannot fetch them together
            module.language.scored = sys.maxsize  # and the output layer once
            ours = [parameter for name, parameter in parameters.items() if not name.startswith("language.")]
            known = {id(parameter) for parameter in self.optimiser.persistent_parameters}
            self.optimiser.persistent_parameters.extend(p for p in ours if id(p) not in known)
            self.have_ours = lambda: ours[0].all_gather(ours)
            self.have_ours()

    def accumulate(self):
        # Exchanged once a step and in one order: as they come, the order would differ where batches differ in kind.
        return self.engine.coalesce_grad_reduction()

    def backward(self, loss: Tensor) -> None:
        if self.scale.on:
            self.optimiser.override_loss_scale(self.scale.value)
        self.engine.backward(loss * self.ranks, scale_wrt_gas=False)  # it takes the mean over the ranks

    def step(self, rate: float) -> Tensor:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.engine.step()
        if self.scale.on:
            self.scale.update(not self.optimiser.overflow)
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def sum(self, values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, thing) -> list:
        things = [None] * self.ranks
        torch.distributed.all_gather_object(things, thing, group=self.group)
        return things

    def state(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = {kind: {} for kind in ("value", *MOMENTS)}
        for name, parameter in self.parameters.items():
            for kind, table in found.items():
                whole = (safe_get_full_fp32_param(parameter) if kind == "value"
                         else safe_get_full_optimizer_state(parameter, kind))  # fmt: skip
                if self.rank == 0:
                    table[name] = whole.cpu()
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        from deepspeed import utils, zero

        cut, third = self.optimiser, self.stage == 3  # AdamW works on a rank's part of all parameters end to end
        for flat in cut.fp32_partitioned_groups_flat if third else cut.single_partition_of_fp32_groups:
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            cut.optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **moments}
        if not third:
            cut._lazy_init_hp_params_optimizer_state()  # what its first step would do
        put_value = utils.safe_set_local_fp32_param if third else utils.safe_set_full_fp32_param
        put_moment = utils.safe_set_local_optimizer_state if third else utils.safe_set_full_optimizer_state
        for name, parameter in self.parameters.items():
            with zero.GatheredParameters([parameter], modifier_rank=0, enabled=third):
                parameter.copy_(state["value"][name])
            for kind in state:
                value = state[kind][name].to(self.device)
                if third:  # of parts of equal size, the last one padded; its setter of the whole forgets the padding
                    size = parameter.partition_numel()
                    value = nn.functional.pad(value.flatten(), (0, size * self.ranks - value.numel()))
                    value = value[size * self.rank : size * (self.rank + 1)]
                put_value(parameter, value) if kind == "value" else put_moment(parameter, value, kind)
        if third:
            self.have_ours()


ENGINES: dict[str, Callable[..., Torch | DeepSpeed]] = {"torch": Torch, "deepspeed": DeepSpeed}


def start_processes() -> int:
    """Join the processes of this run, once; returns this one's number on its host, which is that of its GPU."""
    import deepspeed

    if "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:  # no launcher: a run of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}  # fmt: skip
    if not torch.distributed.is_initialized():
        warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)  # at each of its exchanges
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of inference on a CPU: takes a compiler
        deepspeed.init_distributed(verbose=False)
        atexit.register(leave_processes)
    return int(os.environ.get("LOCAL_RANK", "0"))


def leave_processes() -> None:
    """At the end of Python: a group that is left open is torn down with its threads at work, which can abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def micro_batch(settings: Settings, ranks: int) -> int:
    """Examples that a rank takes at once."""
    if settings.batch % ranks:
        raise SpgddError(f"{ranks} ranks cannot share a batch of {settings.batch}: choose a multiple of {ranks}.")
    share = settings.batch // ranks
    return min(settings.micro_batch or share, share)


def deepspeed_config(settings: Settings, ranks: int) -> dict:
    """What DeepSpeed is told. Precision and learning rate are the loop's, so that both engines compute the same."""
    micro = micro_batch(settings, ranks)
    accumulation = -(-settings.batch // (ranks * micro))
    if settings.sections.get("gradient_accumulation_steps", accumulation) != accumulation:
        raise SpgddError(
            f"gradient_accumulation_steps is {settings.sections['gradient_accumulation_steps']} in the DeepSpeed file, "
            f"but batch {settings.batch} = {ranks} ranks x micro_batch {micro} x {accumulation}."
        )
    zero = settings.sections.get("zero_optimization", {}).get("stage", 0)
    if zero not in (1, 2, 3):
        raise SpgddError(f"zero_optimization.stage must be 1, 2 or 3 in the DeepSpeed file, received {zero!r}.")
    if zero == 3 and settings.compile:
        raise SpgddError("ZeRO-3 fetches weights layer by layer, which torch.compile cannot: add --no-compile.")
    return settings.sections | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.clip,
        "zero_force_ds_cpu_optimizer": False,
    }
