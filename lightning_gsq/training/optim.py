"""Lion and Adam as one pass over each parameter, with stochastic rounding for bfloat16.

A logit moves by steps far smaller than bfloat16 resolves (near 0.1 a unit in the last place is 5e-4), so rounding to
nearest would lose them. Rounded stochastically, up with the probability of the part cut off, a value is right on
average: bfloat16 logits train like fp32 ones at half the memory. What is stored in bfloat16, state included, is
rounded so; fp32 is stored as it is. Random bits come from a counter and a seed (``noise.py`` of the sampling op), so a
resumed run repeats exactly.

Each update is a plain function of one parameter, its gradient and its state, which ``torch.compile`` makes one loop
that reads and writes each of them once; without a compiler it runs as it is.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.ops.gumbel_softmax.noise import counters, hash32, seed_words
from lightning_gsq.system.compiling import compile_function, compiler_available
from lightning_gsq.system.seeding import seed_of
from lightning_gsq.system.sharding import local

__all__ = ["Adam", "Lion"]

Backend = Literal["auto", "compile", "eager"]


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bfloat16, away from zero with the probability of the part cut off.

    Args:
        x: fp32; infinities and zeros stay.
        bits: int32 of the same shape, of which the lower 16 bits are random.
    """
    return ((x.view(torch.int32) + (bits & 0xFFFF)) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _store(target: Tensor, value: Tensor, seed: Tensor, stream: int) -> None:
    if target.dtype == torch.bfloat16:
        columns = target.shape[-1] if target.ndim else 1
        position = counters(target.numel() // max(1, columns), columns, columns, 0, target.device).view(target.shape)
        value = round_stochastically(value, hash32(hash32(position ^ seed[0]) ^ seed[1] ^ stream))
    target.copy_(value)


def _lion(parameter: Tensor, gradient: Tensor, momentum: Tensor, numbers: Tensor, seed: Tensor) -> None:
    rate, decay, beta1, beta2 = numbers
    p, g, m = parameter.float(), gradient.float(), momentum.float()
    _store(parameter, p * (1 - rate * decay) - rate * torch.sign(beta1 * m + (1 - beta1) * g), seed, 0)
    _store(momentum, beta2 * m + (1 - beta2) * g, seed, 1)


def _adam(parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor, seed: Tensor) -> None:
    rate, decay, beta1, beta2, correction1, correction2, epsilon = numbers
    p, g = parameter.float(), gradient.float()
    m = beta1 * first.float() + (1 - beta1) * g
    v = beta2 * second.float() + (1 - beta2) * g * g
    step = rate * (m / correction1) / (torch.sqrt(v / correction2) + epsilon)
    _store(parameter, p * (1 - rate * decay) - step, seed, 0)
    _store(first, m, seed, 1)
    _store(second, v, seed, 2)


@functools.cache
def _compiled(update: Callable[..., None]) -> Callable[..., None]:
    return compile_function(update, dynamic=True)


class _FusedOptimizer(torch.optim.Optimizer, ABC):
    """What the two share: state of the parameters' dtype, and one call of the update for each parameter."""

    update: Callable[..., None]
    state_names: tuple[str, ...]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        seed: int,
        backend: Backend,
        **defaults: float,
    ) -> None:
        if lr < 0:
            raise ConfigurationError(f"lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ConfigurationError(f"betas must lie in [0, 1), got {tuple(betas)}")
        if weight_decay < 0:
            raise ConfigurationError(f"weight_decay must not be negative, got {weight_decay}")
        if backend not in ("auto", "compile", "eager"):
            raise ConfigurationError(f"backend must be auto, compile or eager, got {backend!r}")
        self.seed, self.backend = seed, backend
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay, **defaults})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.bfloat16):
                    raise ConfigurationError(
                        f"parameters must be float32 or bfloat16, got {parameter.dtype}; torch.optim takes others"
                    )

    @abstractmethod
    def _numbers(self, group: dict[str, Any], step: int) -> list[float]:
        """What the update is told beside its tensors, in its order."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state.update({name: torch.zeros_like(parameter) for name in self.state_names})
                state["step"] += 1
                device = parameter.device
                numbers = torch.tensor(self._numbers(group, state["step"]), dtype=torch.float32).to(device)
                seed = seed_words(seed_of(self.seed, "optimizer", index, state["step"])).to(device)
                # Everything is elementwise: each process updates its own part of a sharded parameter.
                tensors = (parameter, parameter.grad, *(state[name] for name in self.state_names))
                self._function(device.type)(*(local(tensor) for tensor in tensors), numbers, seed)
        return loss

    def _function(self, device_type: str) -> Callable[..., None]:
        update = type(self).update
        if self.backend == "compile" or (self.backend == "auto" and compiler_available(device_type)):
            return _compiled(update)
        return update


class Lion(_FusedOptimizer):
    """Lion (arXiv 2302.06675): steps of the sign of an interpolated momentum, with decoupled weight decay.

    Args:
        params: fp32 or bfloat16 parameters, or groups of them.
        lr: Step size.
        betas: Weights of the momentum in the step and in its own update.
        weight_decay: Decay a step, times the learning rate.
        seed: Seed of the stochastic rounding.
        backend: "compile" (one fused loop a parameter), "eager" (plain PyTorch), or "auto" for the first where a
            compiler is there.

    Raises:
        ConfigurationError: an argument is out of range, or a parameter neither fp32 nor bfloat16.
    """

    update = staticmethod(_lion)
    state_names = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, seed, backend)

    def _numbers(self, group: dict[str, Any], step: int) -> list[float]:
        return [group["lr"], group["weight_decay"], *group["betas"]]


class Adam(_FusedOptimizer):
    """Adam (arXiv 1412.6980), with decoupled weight decay as in AdamW (arXiv 1711.05101).

    Args:
        params: fp32 or bfloat16 parameters, or groups of them.
        lr: Step size.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decay a step, times the learning rate.
        seed: Seed of the stochastic rounding.
        backend: "compile" (one fused loop a parameter), "eager" (plain PyTorch), or "auto" for the first where a
            compiler is there.

    Raises:
        ConfigurationError: an argument is out of range, or a parameter neither fp32 nor bfloat16.
    """

    update = staticmethod(_adam)
    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, seed, backend, eps=eps)

    def _numbers(self, group: dict[str, Any], step: int) -> list[float]:
        beta1, beta2 = group["betas"]
        corrections = [1 - beta1**step, 1 - beta2**step]
        return [group["lr"], group["weight_decay"], beta1, beta2, *corrections, group["eps"]]
