"""What processes that hold different experts of a block still have in common, kept in common while it trains.

Attention and shared experts are trained by every process on its own tokens, so that their gradients are averaged, as
DDP would. An expert has the gradients of all tokens where it is, so that nothing is averaged there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_gsq.system.token_exchange import TokenExchange

EPSILON = 1e-6
"""Added to the norm that gradients are divided by, as torch.nn.utils.clip_grad_norm_ does."""


@torch.no_grad()
def share(tensors: Iterable[Tensor], exchange: TokenExchange) -> None:
    """Gives all processes the first one's tensors, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, 0, group=exchange.group)


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter], exchange: TokenExchange) -> None:
    """Averages the gradients of parameters that every process has."""
    for gradient in gradients(parameters):
        exchange.sum(gradient).div_(exchange.world)


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients of all these parameters; zeros where there was none, as of experts that no token has met."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def clip_norm(
    shared: Sequence[nn.Parameter], own: Sequence[nn.Parameter], limit: float, exchange: TokenExchange
) -> None:
    """Scales all gradients down to a norm over what processes share and what each has of its own.

    Args:
        shared: Parameters that every process has, their gradients averaged.
        own: This process's others.
        limit: The largest norm.
        exchange: The processes.
    """
    here, everywhere = (_squares(parameters, exchange.device) for parameters in (shared, own))
    norm = (here + exchange.sum(everywhere)).sqrt()
    factor = (limit / (norm + EPSILON)).clamp(max=1.0)
    for gradient in gradients([*shared, *own]):
        gradient.mul_(factor.to(gradient.dtype))


def _squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in gradients(parameters):
        total += gradient.float().square().sum()
    return total
