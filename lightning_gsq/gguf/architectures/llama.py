"""Llama, Mistral and SmolLM3."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_gsq.gguf.architectures.common import (
    base_fields,
    head_size,
    refuse,
    require_activation,
    rotary_fields,
)
from lightning_gsq.gguf.file import Field

ROTARY = "rope_freqs.weight"
NO_ROTATION_STEP = 4
"""llama.cpp rotates nothing in every fourth block of a SmolLM3, whatever the file says."""


def llama_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of Llama and Mistral."""
    require_activation(config, "hidden_act", "silu")
    return base_fields(config) | rotary_fields(config.rope_parameters, head_size(config), ("llama3",))


def llama_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Llama 3's scaling of the rotary frequencies, as fp32 divisors; nothing without scaling."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dimension = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dimension, 2, dtype=torch.float32) / dimension)
    return {ROTARY: plain / scaled}


def smollm3_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of SmolLM3, some of whose blocks rotate nothing."""
    require_activation(config, "hidden_act", "silu")
    rotated = [bool((block + 1) % NO_ROTATION_STEP) for block in range(config.num_hidden_layers)]
    if [bool(value) for value in config.no_rope_layers] != rotated:
        refuse(
            f"llama.cpp leaves out the rotation in every fourth block of a SmolLM3, this one's no_rope_layers are "
            f"{config.no_rope_layers}"
        )
    return base_fields(config) | rotary_fields(config.rope_parameters, head_size(config))
