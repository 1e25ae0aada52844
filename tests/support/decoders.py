"""Random models of types that need something of the chain that the usual families do not."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    BloomConfig,
    DbrxConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    Llama4TextConfig,
    MambaConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    XGLMConfig,
)
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

from tests.support.tiny import COMMON, VOCABULARY, random_model

FOUR_BLOCKS = {
    **COMMON,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "sliding_window": 4}


def _gemma3n(reusing: int) -> PreTrainedModel:
    """Hidden states of four dimensions, inputs of each token for each block, keys and values of other blocks."""
    config = Gemma3nTextConfig(
        **FOUR_BLOCKS, **PER_LAYER, num_kv_shared_layers=reusing, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4
    )
    return random_model(config)


def dbrx_config(vocabulary: int = VOCABULARY) -> DbrxConfig:
    """Experts in rows of one matrix."""
    attention = DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8.0)
    attention.rope_theta = 10000.0
    experts = DbrxFFNConfig(hidden_size=32, ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)
    return DbrxConfig(
        vocab_size=vocabulary,
        d_model=32,
        n_layers=2,
        n_heads=4,
        max_seq_len=128,
        attn_config=attention,
        ffn_config=experts,
    )


DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bloom": lambda: random_model(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "dbrx": lambda: random_model(dbrx_config()),
    "gemma3n": lambda: _gemma3n(reusing=2),
    "gemma3n_alone": lambda: _gemma3n(reusing=0),
    "gemma4": lambda: random_model(
        Gemma4TextConfig(**FOUR_BLOCKS, **PER_LAYER, global_head_dim=8, num_kv_shared_layers=2)
    ),
    "llama4": lambda: random_model(
        Llama4TextConfig(**COMMON, head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1)
    ),
    "mamba": lambda: random_model(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=2)
    ),
    "mixtral": lambda: random_model(MixtralConfig(**COMMON, num_local_experts=4)),
    "openai_gpt": lambda: random_model(
        OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    ),
    "qwen3_next": lambda: random_model(
        Qwen3NextConfig(
            **{**COMMON, "num_key_value_heads": 2},
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
    "xglm": lambda: random_model(
        XGLMConfig(
            vocab_size=VOCABULARY, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48, max_position_embeddings=128
        )
    ),
}
