"""Phi-3, Phi-3.5 and Phi-4-mini: queries, keys and values in one matrix, gate and up in another."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_gsq.gguf.architectures.common import base_fields, head_size, require_activation, rotary_fields
from lightning_gsq.gguf.fields import real, uint
from lightning_gsq.gguf.file import Field

LONG = "longrope"


def phi3_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of Phi-3: a part of each head turns, with one list of factors for short texts and one for long ones."""
    require_activation(config, "hidden_act", "silu")
    rope = config.rope_parameters
    size = int(head_size(config) * rope.get("partial_rotary_factor", 1.0))
    fields = base_fields(config) | rotary_fields(rope, size, (LONG,))
    # llama.cpp attends to everything; zero is how its own converter marks a model without a window.
    fields["attention.sliding_window"] = uint(config.sliding_window or 0)
    fields["rope.scaling.original_context_length"] = uint(config.original_max_position_embeddings)
    if rope.get("rope_type", "default") == LONG:
        _, factor = ROPE_INIT_FUNCTIONS[LONG](config, torch.device("cpu"))
        fields["rope.scaling.attn_factor"] = real(factor)
    return fields


def phi3_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """The factors of the rotary frequencies in fp32; nothing without them."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != LONG:
        return {}
    return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float() for kind in ("long", "short")}
