"""Routed experts of a block spread over processes: each holds, runs and trains a contiguous range of them.

transformers keeps the experts of a layer fused in tensors whose first dimension is that of the experts, in modules
whose classes look up how they are run (its ``ExpertsInterface``). Here that is a way of its own: tokens go to all
processes (:mod:`lightning_gsq.system.token_exchange`), and the class's own forward pass runs on the pairs of a token
and one of its experts that this process holds, one expert a row. A spread block is a block like any other, with fewer
experts: what finds, watches, rounds and trains its weights need not know.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.system.token_exchange import TokenExchange

NAME = "lightning_gsq_expert_parallel"
TOLERANCE = 1e-4


def fused_experts(block: nn.Module) -> dict[str, Any]:
    """The modules of fused experts of a block whose classes leave a choice how they are run, by name."""
    return {name: m for name, m in block.named_modules() if hasattr(m, "has_gate") and hasattr(m, "num_experts")}


def fused_parameters(module: Any) -> dict[str, nn.Parameter]:
    """The parameters of such a module that are one part an expert, by name in it."""
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.ndim > 1 and len(p) == int(module.num_experts)}


def share_of(experts: int, rank: int, world: int) -> range:
    """The experts of one process: contiguous, as many as others have, or one more."""
    return range(experts * rank // world, experts * (rank + 1) // world)


@dataclass
class _Routes:
    """What the spread modules of one block have in common.

    Args:
        exchange: The processes.
        sizes: Of each module that has run, what no tokens look like: its arguments, in the order in which modules run.
    """

    exchange: TokenExchange
    sizes: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Place:
    """Where one module of experts stands: its name in the block, its experts in the whole, and the routes."""

    name: str
    held: range
    routes: _Routes


def spread(block: nn.Module, exchange: TokenExchange, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy of a block on a device with this process's experts alone; what it computes is what the block would.

    Args:
        block: The block, left as it is; the other experts' weights are not touched.
        exchange: The processes, all of which make and run their own copy.
        device: Where to.
        dtype: Dtype of all its floating-point parameters.
    """
    modules, kept = fused_experts(block), {}
    held = {name: share_of(int(m.num_experts), exchange.rank, exchange.world) for name, m in modules.items()}
    for name, module in modules.items():
        part = slice(held[name].start, held[name].stop)
        for parameter in fused_parameters(module).values():
            own = parameter.detach()[part].to(device, dtype, copy=True)
            kept[id(parameter)] = nn.Parameter(own, requires_grad=False)
    copied = copy.deepcopy(block, kept).to(device, dtype)
    routes = _Routes(exchange)
    for name, module in fused_experts(copied).items():
        module.place = _Place(name, held[name], routes)
        module.num_experts = len(held[name])
        module.config._experts_implementation = NAME
    return copied


@torch.compiler.disable
def _run(module: Any, hidden_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The forward pass of a module of experts; called by transformers as its method."""
    place = module.place
    exchange: TokenExchange = place.routes.exchange
    like = (hidden_ND, index_NK, weights_NK)
    place.routes.sizes.setdefault(place.name, tuple(x.detach().new_empty(0, *x.shape[1:]) for x in like))
    size = exchange.largest(len(hidden_ND))
    hidden_MD, weights_MK = exchange.send(size, hidden_ND, weights_NK)
    partial_MD = _of_own_experts(module, place.held, hidden_MD, exchange.experts_of(size, index_NK), weights_MK)
    return exchange.back(len(hidden_ND), partial_MD, hidden_MD, weights_MK, *module.parameters())


ALL_EXPERTS_FUNCTIONS.register(NAME, _run)


def _of_own_experts(module: Any, held: range, hidden_MD: Tensor, index_MK: Tensor, weights_MK: Tensor) -> Tensor:
    """What the experts that a module holds make of tokens, ``M D``; zeros for those that others hold."""
    token_P, place_P = torch.where((index_MK >= held.start) & (index_MK < held.stop))
    pairs = index_MK[token_P, place_P, None] - held.start, weights_MK[token_P, place_P, None]
    output_PD = _original(module)(module, hidden_MD[token_P], *pairs)
    return torch.zeros_like(hidden_MD).index_add_(0, token_P, output_PD.to(hidden_MD.dtype))


def _original(module: Any) -> Any:
    """The class's own forward pass, expert by expert."""
    return type(module).forward.__wrapped__


def exchange_of(block: nn.Module) -> TokenExchange | None:
    """The processes that a block's experts are spread over; None where they are not, or where it has none."""
    routes = _routes(block)
    return None if routes is None else routes.exchange


def _routes(block: nn.Module) -> _Routes | None:
    places: Any = (module.place for module in block.modules() if hasattr(module, "place"))
    return next((place.routes for place in places), None)


def held_weights(block: nn.Module, rank: int, world: int) -> dict[str, range]:
    """The experts that a process holds of each parameter that is spread, by name in a block, whole or spread."""
    held: dict[str, range] = {}
    for name, module in fused_experts(block).items():
        experts = module.place.held if hasattr(module, "place") else share_of(int(module.num_experts), rank, world)
        held |= {f"{name}.{own}": experts for own in fused_parameters(module)}
    return held


@contextmanager
def in_step(block: nn.Module, passes: int, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Makes as many passes through a block's experts as the process that makes most; the last ones without a token.

    Args:
        block: The block, spread or not.
        passes: Forward passes through it that are made inside the context.
        weights: Parameters in place of its own, by name.
    """
    further = passes_of_others(block, passes)
    yield
    for _ in range(further):
        without_tokens(block, weights)


def passes_of_others(block: nn.Module, passes: int) -> int:
    """How many passes through a block another process makes beyond this one's; 0 where nothing is spread.

    Asked before the first of them: afterwards this process would not know where the others are.
    """
    exchange = exchange_of(block)
    return 0 if exchange is None else exchange.largest(passes) - passes


def without_tokens(block: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """A pass through a spread block's experts alone, for the tokens of others; arguments as of :func:`in_step`."""
    routes = _routes(block)
    assert routes is not None
    for name, sizes in routes.sizes.items():
        own = {key.removeprefix(f"{name}."): w for key, w in (weights or {}).items() if key.startswith(f"{name}.")}
        torch.func.functional_call(block.get_submodule(name), own, sizes)


def check_parts(module: Any, parts: int) -> None:
    """Verifies that what fused experts compute is the sum of what so many parts of them compute, on a few numbers.

    Args:
        module: The experts.
        parts: How many processes there will be.

    Raises:
        ConfigurationError: it is not: the class computes something that cannot be taken apart.
    """
    inputs = module.gate_up_proj if module.has_gate else module.up_proj
    experts, generator = int(module.num_experts), torch.Generator().manual_seed(0)
    columns = inputs.shape[-2 if module.is_transposed else -1]
    hidden = torch.randn(2 * parts, columns, generator=generator).to(inputs)
    # Every part has tokens, and every token experts far apart.
    index = torch.arange(2 * parts, device=inputs.device)[:, None] * experts // (2 * parts)
    index = torch.cat([index, (index + experts // 2) % experts], dim=1)
    weights = torch.rand(index.shape, generator=generator).to(inputs)
    with torch.no_grad():
        whole = _original(module)(module, hidden, index, weights)
        total = torch.zeros_like(whole, dtype=torch.float32)
        for rank in range(parts):
            held = share_of(experts, rank, parts)
            total += _of_own_experts(_some_of(module, held), held, hidden, index, weights).float()
    # In half precision either sum is rounded as often as a token has experts.
    tolerance = max(TOLERANCE, 8 * torch.finfo(whole.dtype).eps)
    if not float((total - whole.float()).abs().max()) <= tolerance * float(whole.float().abs().max()):
        raise ConfigurationError(
            f"model.expert_parallel: what {type(module).__name__} computes is not the sum of what its experts compute "
            "one by one, so that they cannot be spread; leave it out"
        )


def _some_of(module: Any, held: range) -> Any:
    """The module with some of its experts, whose parameters are views."""
    some = copy.copy(module)
    some.__dict__["_parameters"] = dict(module._parameters)
    for name, parameter in fused_parameters(module).items():
        own = parameter.detach()[held.start : held.stop]
        some._parameters[name] = nn.Parameter(own, requires_grad=False)
    some.__dict__["num_experts"] = len(held)
    return some
