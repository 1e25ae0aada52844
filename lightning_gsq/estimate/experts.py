"""Fused experts that run without looking at values: every expert gets as many tokens as every other.

Which expert a token goes to is a value, which tensors without content have not. The memory that experts take depends
on how many tokens all of them have together (tokens times experts a token), which is known; here they get equal shares.
Expert by expert, as ``fit`` runs them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_gsq.estimate.quantities import Weights
from lightning_gsq.estimate.skeleton import BlockSkeleton
from lightning_gsq.models.expert_parallel import fused_experts, fused_parameters, held_weights

NAME = "lightning_gsq_equal_shares"


@contextmanager
def equal_shares(block: nn.Module) -> Iterator[None]:
    """Inside the context, the fused experts of a block run on equal shares, where their class leaves a choice."""
    configs = {id(c): c for m in block.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: config._experts_implementation for key, config in configs.items() if _has_choice(config)}
    for key in before:
        configs[key]._experts_implementation = NAME
    try:
        yield
    finally:
        for key, value in before.items():
            configs[key]._experts_implementation = value


def most_experts(block: nn.Module) -> int:
    """Experts of the block's largest module of fused experts whose class leaves a choice; 0 without one."""
    return max((int(module.num_experts) for module in fused_experts(block).values()), default=0)


def thinner(block: nn.Module, experts: int) -> nn.Module:
    """A copy of a block on the meta device with no more than so many of its fused experts; routers stay."""
    copied = copy.deepcopy(block)
    for module in fused_experts(copied).values():
        for name, parameter in fused_parameters(module).items():
            setattr(module, name, nn.Parameter(parameter[:experts].clone(), requires_grad=False))
        module.num_experts = min(experts, int(module.num_experts))
    return copied


def one_share(block: BlockSkeleton, weights: Weights, devices: int) -> tuple[BlockSkeleton, Weights]:
    """The largest share of a block and of its weights where that many devices share its experts."""
    spread = held_weights(block.module, 0, 1)
    shares = {
        replace(site, experts=-(-site.experts // devices)) if site.experts and site.name in spread else site: scheme
        for site, scheme in weights.items()
    }
    return replace(block, module=thinner(block.module, -(-most_experts(block.module) // devices))), shares


def exchanged_bytes(block: nn.Module, width: int, tokens: int, devices: int) -> int:
    """Bytes of what a device gets of all devices' tokens, and gives back, while the block's experts run.

    Hidden states of all tokens and what its experts make of them; the same for each pair of a token and an expert.

    Args:
        block: The block.
        width: Features of the hidden states.
        tokens: Of a device, at once.
        devices: How many share the experts.
    """
    chosen = [module.config.get_text_config(decoder=True) for module in fused_experts(block).values()]
    if devices == 1 or not chosen:
        return 0
    pairs = tokens * max(int(getattr(config, "num_experts_per_tok", 1) or 1) for config in chosen)
    return 2 * (devices * tokens + pairs) * width * torch.float32.itemsize


def _has_choice(config: Any) -> bool:
    return getattr(config, "_experts_implementation", None) is not None


def _run(self: Any, hidden_ND: Tensor, top_k_index_NK: Tensor, top_k_weights_NK: Tensor) -> Tensor:
    """The forward pass of a class of experts; called by transformers as its method."""
    output_ND = torch.zeros_like(hidden_ND)
    pairs, experts = top_k_index_NK.numel(), int(self.num_experts)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in range(experts):
        count = pairs * (expert + 1) // experts - pairs * expert // experts
        if not count:
            continue
        tokens = torch.zeros(count, dtype=torch.long)
        inner = _multiply(self, hidden_ND[tokens], first, expert)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        outer = _multiply(self, inner, "down_proj", expert)
        outer = outer * top_k_weights_NK[tokens, :1]
        output_ND.index_add_(0, tokens, outer.to(output_ND.dtype))
    return output_ND


def _multiply(module: Any, inputs: Tensor, name: str, expert: int) -> Tensor:
    """The product with one expert's matrix."""
    matrix = getattr(module, name)[expert]
    output = inputs @ matrix if module.is_transposed else nn.functional.linear(inputs, matrix)
    return output + getattr(module, f"{name}_bias")[expert] if module.has_bias else output


ALL_EXPERTS_FUNCTIONS.register(NAME, _run)
