"""Tokens on their way to the processes that hold their experts, and back (expert parallelism).

Every process holds some experts, and hidden states of its own tokens. Forward, all processes get the hidden states of
all (all-gather); each computes what its experts make of them, and every token's own process gets the sum over the
processes (reduce-scatter). Backward, gradients take the same way in the other direction. Weights never travel.

A loss is the mean over a process's own tokens, and what is wanted is the mean over processes: on their way to the
experts gradients are divided by the number of processes, and multiplied by it on their way on to what was before, whose
gradients are averaged as in any data-parallel training.

All processes take part in each exchange: each has to make as many, in the same order, whatever share of the tokens it
has; one that has none left sends none.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Newer versions of PyTorch have other names for both, and warn at the old ones.

NOBODY = -1
"""In the place of an expert's number where there is no token."""


class TokenExchange:
    """The processes that exchange tokens.

    They talk in a group of their own, so that nothing that other code sends comes between. All processes have to make
    it at the same time.

    Args:
        rank: Number of this process.
        world: How many there are.
        device: Where their tensors are.
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.group = dist.new_group()

    def largest(self, count: int) -> int:
        """The largest of the processes' counts."""
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def send(self, size: int, hidden_ND: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and routing weights of all processes' tokens, ``M = world * size`` of them; differentiable.

        Args:
            size: The most tokens that a process has; zeros fill up.
            hidden_ND: Those of this process's tokens.
            weights_NK: How much each of their experts counts.
        """
        hidden_MD, weights_MK = _Send.apply(self, size, hidden_ND, weights_NK)
        return hidden_MD, weights_MK

    def experts_of(self, size: int, index_NK: Tensor) -> Tensor:
        """The experts of all these tokens, ``M K``; :data:`NOBODY` fills up."""
        return self._gather(_filled_up(index_NK, size, NOBODY))

    def back(self, count: int, partial_MD: Tensor, *sources: Tensor) -> Tensor:
        """The sum over processes of what they made of this process's ``count`` tokens, ``N D``; differentiable.

        Args:
            count: ``N``.
            partial_MD: What this process made of all tokens.
            sources: What that depends on, or would if any token had come: their backward passes run in every process.
        """
        result: Tensor = _Back.apply(self, count, partial_MD, *sources)
        return result

    def _gather(self, x: Tensor) -> Tensor:
        everybody = x.new_empty(self.world * len(x), *x.shape[1:])
        _all_gather(everybody, x.contiguous(), group=self.group)
        return everybody

    def _scatter(self, x: Tensor) -> Tensor:
        own = x.new_empty(len(x) // self.world, *x.shape[1:])
        _reduce_scatter(own, x.contiguous(), group=self.group)
        return own


def _filled_up(x: Tensor, size: int, value: float = 0) -> Tensor:
    if len(x) == size:
        return x
    return torch.cat([x, x.new_full((size - len(x), *x.shape[1:]), value)])


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: TokenExchange, size: int, hidden_ND: Tensor, weights_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.count = exchange, len(hidden_ND)
        return tuple(exchange._gather(_filled_up(x, size)) for x in (hidden_ND, weights_NK))  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: TokenExchange = ctx.exchange
        returned = (exchange._scatter(grad)[: ctx.count] * exchange.world for grad in grads)
        return None, None, *returned


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: TokenExchange, count: int, partial_MD: Tensor, *sources: Tensor) -> Tensor:
        ctx.exchange, ctx.size = exchange, len(partial_MD) // exchange.world
        return exchange._scatter(partial_MD)[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: TokenExchange = ctx.exchange
        grad_MD = exchange._gather(_filled_up(grads[0], ctx.size)) / exchange.world
        return None, None, grad_MD, *(None for _ in ctx.needs_input_grad[3:])


class OwnGradientsStrategy(DDPStrategy):
    """Several processes, each with parameters of its own: the module itself averages what gradients are to be averaged.

    Lightning's strategy otherwise, which would wrap the module and make all parameters those of the first process.
    """

    def configure_ddp(self) -> None:
        """Wraps nothing."""
