"""Parameters spread over the processes (FSDP2), for models that one device does not hold.

Of every parameter each process keeps an equal part. A unit's parameters are gathered when it runs, forward or backward,
and freed afterwards; gradients, optimizer state and the best state exist in parts only. So a device holds its share
of the model, one unit, and what lies outside of the units.

All processes gather together: each has to run the same number of forward passes, whatever share of the work it has.
"""

from __future__ import annotations

import copy
import functools
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError

Sharding = Literal["fsdp2"]
FSDP2: Sharding = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ``ModelParallelStrategy`` with one part of every parameter for each process."""

    def setup_environment(self) -> None:
        """Meets the other processes."""
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1
        super().setup_environment()


StrategyRegistry.register(FSDP2, FSDP2Strategy, description="FSDP2: a part of every parameter for each process")


def asked_for(strategy: str | Namespace | None) -> bool:
    """Whether the value of ``trainer.strategy`` asks for this.

    Raises:
        ConfigurationError: it asks for another way to spread a model.
    """
    if isinstance(strategy, str):
        name = strategy.lower()
        kind = StrategyRegistry[name]["strategy"] if name in StrategyRegistry else None
    else:
        name = getattr(strategy, "class_path", "")
        kind = pkgutil.resolve_name(name) if name else None
    if name == FSDP2:
        return True
    if isinstance(kind, type) and issubclass(kind, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigurationError(
            f"trainer.strategy: {name} is not supported; {FSDP2} spreads the model over the devices in the end-to-end "
            "phase (the others hold one block on a device, and run as ddp)"
        )
    return False


def private_copy(network: PreTrainedModel) -> PreTrainedModel:
    """The same modules again, with parameters of their own over the same values.

    What is sharded replaces its parameters and gets hooks; the model that the rest of a run works on keeps what it has.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, shared)


def shard(module: nn.Module, units: Iterable[nn.Module], mesh: DeviceMesh, methods: Iterable[str]) -> None:
    """Spreads a module over a mesh, one unit after another, so that the device never holds it all.

    Args:
        module: The module; what lies outside of the units is gathered during all of its forward passes.
        units: Parts of it, which are gathered while they run.
        mesh: The processes.
        methods: Names of the module's methods that are its forward passes.
    """
    inside: set[nn.Parameter] = set()
    for unit in units:
        _shard_one(unit, mesh, set())
        inside.update(unit.parameters())
    _shard_one(module, mesh, inside)
    for method in methods:
        register_fsdp_forward_method(module, method)


def _shard_one(unit: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    parameters = [parameter for parameter in unit.parameters() if parameter not in ignored]
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    indivisible = {parameter for parameter in parameters if parameter.ndim == 0 or parameter.numel() == 0}
    sharded = fully_shard(
        unit,
        mesh=mesh,
        reshard_after_forward=True,
        shard_placement_fn=functools.partial(_dimension, parts=mesh.size()),
        ignored_params=ignored | indivisible,
    )
    if mesh.device_type == "cpu":
        sharded.set_force_sum_reduction_for_comms(True)  # gloo computes no averages


def _dimension(parameter: Tensor, parts: int) -> Shard:
    """The first dimension that can be divided evenly (logits have few levels in front), or else, padded, the first."""
    even = (dimension for dimension, size in enumerate(parameter.shape) if size % parts == 0)
    return Shard(next(even, 0))


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are spread over the processes."""
    return isinstance(module, FSDPModule)


@contextmanager
def whole(unit: nn.Module) -> Iterator[None]:
    """While active, a sharded unit's parameters are gathered, for reading; all processes take part."""
    if not isinstance(unit, FSDPModule):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def passes_of_others(module: LightningModule, passes: int) -> int:
    """How many forward passes other processes make beyond this one's ``passes``; all have to take part in them."""
    most = module.trainer.strategy.reduce(torch.tensor(passes, device=module.device), reduce_op="max")
    return int(most) - passes


def idle_batch(device: torch.device) -> Tensor:
    """Token ids ``1 T`` for a forward pass that is run because other processes run one."""
    return torch.zeros(1, 2, dtype=torch.long, device=device)
