"""Fused experts that are packed, run over tokens sorted by expert: one product for all experts, no loop over them.

transformers' classes of fused experts look up how they are run (its ``ExpertsInterface``). Here that is a way of its
own, chosen for every model that has packed experts. What it computes is what the classes' own loops compute: products
of few tokens with an expert sum in another order, others are the same numbers; a token's experts are summed in the
loops' order, in fp32 (most loops round to the model's dtype after each). Classes that leave no choice index or multiply
:class:`~lightning_gsq.packed.layers.PackedExperts` themselves.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_gsq.packed.layers import PackedExperts

NAME = "lightning_gsq_packed"
"""What ``config._experts_implementation`` is for a model with packed experts."""


def _run(module: Any, hidden_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The forward pass of a module of experts; called by transformers as its method."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    if not isinstance(first, PackedExperts) and not isinstance(module.down_proj, PackedExperts):
        output_ND: Tensor = type(module).forward.__wrapped__(module, hidden_ND, index_NK, weights_NK)
        return output_ND  # experts of a block that was left as it is
    (tokens, chosen), experts = index_NK.shape, int(module.num_experts)
    expert_S, order_S = index_NK.reshape(-1).sort(stable=True)
    # A number beyond the last expert is no expert; those come last.
    offsets_E = torch.searchsorted(expert_S, torch.arange(experts + 1, device=expert_S.device))
    own_S = expert_S.clamp(max=experts - 1)
    hidden_SF = _product(
        module, "gate_up_proj" if module.has_gate else "up_proj", hidden_ND[order_S // chosen], own_S, offsets_E
    )
    hidden_SF = module._apply_gate(hidden_SF) if module.has_gate else module.act_fn(hidden_SF)
    output_SD = _product(module, "down_proj", hidden_SF, own_S, offsets_E)
    if module.has_post_expert_norm:
        output_SD = module.post_expert_norm(output_SD)
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


def _product(module: Any, name: str, x_SI: Tensor, expert_S: Tensor, offsets_E: Tensor) -> Tensor:
    """``x w_e^T``, and the expert's bias; a weight that is not packed is taken expert by expert.

    Args:
        module: The experts.
        name: The weight.
        x_SI: Tokens, those of the first expert first.
        expert_S: Their experts.
        offsets_E: Where each expert's tokens begin, and where the last one's end.
    """
    weight = getattr(module, name)
    if isinstance(weight, PackedExperts):
        y_SO = weight.grouped(x_SI, offsets_E)
    else:
        bounds = offsets_E.tolist()
        pairs = pairwise(bounds)
        parts = [
            x_SI[first:end] @ (weight[expert] if module.is_transposed else weight[expert].mT)
            for expert, (first, end) in enumerate(pairs)
        ]
        y_SO = torch.cat([*parts, parts[0].new_zeros(len(x_SI) - bounds[-1], parts[0].shape[1])])
    return y_SO + getattr(module, f"{name}_bias")[expert_S] if module.has_bias else y_SO
