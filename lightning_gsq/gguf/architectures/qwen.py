"""Qwen2, Qwen3 and Qwen3-MoE."""

from __future__ import annotations

from transformers import PretrainedConfig

from lightning_gsq.gguf.architectures.common import (
    base_fields,
    head_size,
    refuse,
    require_activation,
    rotary_fields,
)
from lightning_gsq.gguf.fields import uint
from lightning_gsq.gguf.file import Field


def qwen_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of Qwen2 and Qwen3."""
    require_activation(config, "hidden_act", "silu")
    return base_fields(config) | rotary_fields(config.rope_parameters, head_size(config))


def qwen_moe_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of Qwen3-MoE: every block has experts, and llama.cpp makes the weights of the chosen ones sum to one."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        refuse(
            "llama.cpp expects experts in every block of a Qwen3-MoE, this one has mlp_only_layers "
            f"{config.mlp_only_layers} and decoder_sparse_step {config.decoder_sparse_step}"
        )
    if not config.norm_topk_prob:
        refuse("llama.cpp makes the weights of a Qwen3-MoE's chosen experts sum to one, and norm_topk_prob is false")
    return qwen_fields(config) | {
        "expert_count": uint(config.num_experts),
        "expert_used_count": uint(config.num_experts_per_tok),
        "expert_feed_forward_length": uint(config.moe_intermediate_size),
    }
