"""Fused experts that are packed, run over tokens sorted by expert: one product for all experts, no loop over them.

transformers' classes of fused experts look up how they are run (its ``ExpertsInterface``). Here that is a way of its
own, chosen for every model that has packed experts. What it computes is what the classes' own loops compute: products
of few tokens with an expert sum in another order, others are the same numbers; a token's experts are summed in the
loops' order, in fp32 (most loops round to the model's dtype after each). Classes that leave no choice are in
:mod:`~lightning_gsq.packed.own_experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_gsq.packed.layers import PackedExperts

NAME = "lightning_gsq_packed"
"""What ``config._experts_implementation`` is for a model with packed experts."""
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From tokens sorted by expert ``S D``, their experts ``S`` and where each one's begin ``E + 1`` to outputs ``S D``."""


def _run(module: Any, hidden_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The forward pass of a module of experts; called by transformers as its method."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    if not isinstance(first, PackedExperts) and not isinstance(module.down_proj, PackedExperts):
        output_ND: Tensor = type(module).forward.__wrapped__(module, hidden_ND, index_NK, weights_NK)
        return output_ND  # experts of a block that was left as it is

    def compute(x_SD: Tensor, own_S: Tensor, offsets_E: Tensor) -> Tensor:
        hidden_SF = _with_bias(module, "gate_up_proj" if module.has_gate else "up_proj", x_SD, own_S, offsets_E)
        hidden_SF = module._apply_gate(hidden_SF) if module.has_gate else module.act_fn(hidden_SF)
        output_SD = _with_bias(module, "down_proj", hidden_SF, own_S, offsets_E)
        return module.post_expert_norm(output_SD) if module.has_post_expert_norm else output_SD

    return over_sorted(hidden_ND, index_NK, weights_NK, int(module.num_experts), compute)


def over_sorted(hidden_ND: Tensor, index_NK: Tensor, weights_NK: Tensor, experts: int, compute: Compute) -> Tensor:
    """The weighted sum of what each token's experts make of it, ``N D``.

    Args:
        hidden_ND: Tokens.
        index_NK: Each one's experts; a number beyond the last is no expert and adds nothing.
        weights_NK: Their weights.
        experts: ``E``.
        compute: What experts make of tokens that are sorted by expert.
    """
    tokens, chosen = index_NK.shape
    expert_S, order_S = index_NK.reshape(-1).sort(stable=True)
    offsets_E = torch.searchsorted(expert_S, torch.arange(experts + 1, device=expert_S.device))  # no expert comes last
    output_SD = compute(hidden_ND[order_S // chosen], expert_S.clamp(max=experts - 1), offsets_E)
    weights_S = weights_NK.reshape(-1)[order_S].masked_fill(expert_S >= experts, 0)
    output_SD = output_SD * weights_S[:, None]
    # Where each token's pairs are among the sorted ones, by expert; added one after the other, as index_add would not
    # say in which order it does on a GPU.
    place_NK = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    place_NK = place_NK.view(tokens, chosen).sort(dim=1).values
    total_ND = torch.zeros(tokens, output_SD.shape[1], dtype=torch.float32, device=output_SD.device)
    for k in range(chosen):
        total_ND += output_SD[place_NK[:, k]]
    return total_ND.to(hidden_ND.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, _run)


def _with_bias(module: Any, name: str, x_SI: Tensor, expert_S: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`product` with a weight of a module of experts, and the experts' biases where it has them."""
    y_SO = product(getattr(module, name), x_SI, offsets_E, module.is_transposed)
    return y_SO + getattr(module, f"{name}_bias")[expert_S] if module.has_bias else y_SO


def product(weight: PackedExperts | Tensor, x_SI: Tensor, offsets_E: Tensor, transposed: bool = False) -> Tensor:
    """``x w_e^T``, ``S O``; a weight that is not packed is taken expert by expert.

    Args:
        weight: Those of all experts.
        x_SI: Tokens, those of the first expert first.
        offsets_E: Where each expert's tokens begin, and where the last one's end.
        transposed: A weight that is not packed is ``E I O`` rather than ``E O I``.
    """
    if isinstance(weight, PackedExperts):
        return weight.grouped(x_SI, offsets_E)
    bounds = offsets_E.tolist()
    parts = [
        x_SI[first:end] @ (weight[expert] if transposed else weight[expert].mT)
        for expert, (first, end) in enumerate(pairwise(bounds))
    ]
    return torch.cat([*parts, parts[0].new_zeros(len(x_SI) - bounds[-1], parts[0].shape[1])])
