"""Tiny random models of every type of causal decoder that transformers knows: for ``sweep_decoders.py``."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

VOCABULARY, HIDDEN, HEADS, LAYERS, EXPERTS = 256, 64, 4, 4, 4
SIZES: dict[str, Any] = {
    # what configurations call their sizes -> a small one
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"], 96),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "shared_intermediate_size"], 96),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["shared_expert_intermediate_size", "expert_dim", "moe_latent_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"], HEADS),
    **dict.fromkeys(["encoder_attention_heads", "swa_num_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "n_kv_heads", "swa_num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "v_head_dim", "attention_head_dim", "swa_head_dim"], 16),
    **dict.fromkeys(["kv_channels", "attn_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "rotary_dim", "index_head_dim"], 16),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "index_n_heads"], 16),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts"], EXPERTS),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_selected_experts"], 2
    ),
    **dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "moe_num_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"], 256),
    **dict.fromkeys(["sliding_window", "attention_window", "local_attention_window", "index_topk"], 8),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_state_dim"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    **dict.fromkeys(["mamba_d_ssm", "mamba_intermediate_size"], 128),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 8),
    **dict.fromkeys(["num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"], 0),
    **dict.fromkeys(["hidden_size_per_layer_input", "attention_hidden_size", "lru_width"], None),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "decoder_start_token_id"], 1),
    "pad_token_id": 0,
    "encoder_hash_byte_group_vocab": 64,
    "rope_scaling": None,
}
PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "moe_layers", "no_rope_layers")
PATTERNS += ("activation_sparsity_pattern", "attn_layer_indices", "moe_layer_pattern", "hybrid_layer_pattern")
"""Lists with an entry for each block."""
MOST_WEIGHTS = 120_000_000
FURTHER: dict[str, dict[str, Any]] = {
    # what a type needs beside that
    "gemma3n_text": {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2},
    "gemma4_text": {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": HIDDEN, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {"layer_types": ["sliding_attention"] * LAYERS},
    "reformer": {"axial_pos_embds": False},
    "dots3_note": {"adapter_in_dim": HIDDEN},
    "dots3_note_text": {
        # blocks that see a window have sizes of their own
        "shared_experts_intermediate_size": 32,
        "per_layer_config": {
            index: {
                **dict.fromkeys(["num_attention_heads", "num_key_value_heads"], HEADS),
                **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"], 16),
                "v_head_dim": 16,
                "head_dim": 32,
            }
            for index in (1, 3)
        },
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    **{
        # rotary embeddings of time, height and width, whose dimensions are those of a head
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **share}}
        for kind, sections, share in (
            ("qwen2_vl_text", [2, 3, 3], {}),
            ("qwen2_5_vl_text", [2, 3, 3], {}),
            ("glm4v_text", [2, 3, 3], {}),
            ("glm4v_moe_text", [1, 1, 2], {"partial_rotary_factor": 0.5}),
        )
    },
}


def small(config: Any) -> dict[str, Any]:
    """What makes a configuration small: changes to its values."""
    changes = {name: value for name, value in SIZES.items() if value is not None and settable(config, name)}
    for name in PATTERNS:
        pattern = getattr(config, name, None) if settable(config, name) else None
        if isinstance(pattern, (list, tuple)) and pattern and len(pattern) != LAYERS:
            each = list(dict.fromkeys(pattern))  # one of each kind, and the first again
            changes[name] = (each * LAYERS)[:LAYERS]
    if settable(config, "kv_lora_rank"):  # latent attention has as many keys as queries
        changes |= {name: HEADS for name in ("num_key_value_heads",) if settable(config, name)}
    return changes


def settable(config: Any, name: str) -> bool:
    """Whether a configuration has a value of this name that can be given."""
    name = (getattr(type(config), "attribute_map", None) or {}).get(name, name)
    prop = getattr(type(config), name, None)
    if isinstance(prop, property) and prop.fset is None:
        return False
    try:
        return hasattr(config, name)
    except Exception:  # a value that differs from block to block has none for all
        return name in vars(config)


def configuration(kind: str) -> Any:
    """A small configuration of a type."""
    from transformers import AutoConfig

    plain = AutoConfig.for_model(kind)
    parts = {
        name: AutoConfig.for_model(part.model_type, **small(part) | FURTHER.get(part.model_type, {})).to_dict()
        for name, part in vars(plain).items()
        if getattr(part, "model_type", None) in CONFIG_MAPPING_NAMES
    }
    return AutoConfig.for_model(kind, **(parts or small(plain)) | FURTHER.get(kind, {}))


def build(kind: str) -> Any:
    """A random model of a type."""
    import torch

    from lightning_gsq.models.classes import auto_class

    config = configuration(kind)
    if getattr(config, "is_encoder_decoder", False):
        config.is_encoder_decoder = False
    config.is_decoder = True
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in auto_class(config).from_config(config, dtype=torch.float32).parameters())
    if count > MOST_WEIGHTS:
        raise ValueError(f"{count:,} weights with these sizes")
    model = auto_class(config).from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model(torch.arange(2, 15)[None] % VOCABULARY, use_cache=False)
    return model
