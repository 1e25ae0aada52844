"""Gemma, Gemma 2 and the text model of Gemma 3.

Their norms multiply by ``1 + weight``; a file holds the sum. llama.cpp scales queries by the width of a head, but for
the largest model of a generation, which it knows by its number of blocks.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from lightning_gsq.gguf.architectures.common import (
    base_fields,
    head_size,
    refuse,
    require_activation,
    rotary_fields,
)
from lightning_gsq.gguf.fields import real, uint
from lightning_gsq.gguf.file import Field

GELU = ("gelu_pytorch_tanh", "gelu_new")
BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
"""Blocks of the model whose queries are scaled by ``hidden_size / num_attention_heads`` instead."""
SLIDING = "sliding_attention"


def gemma_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of the first Gemma."""
    # The first generation's files call gelu what is computed as its approximation.
    require_activation(config, "hidden_act", *GELU, "gelu")
    return base_fields(config) | rotary_fields(config.rope_parameters, head_size(config))


def gemma2_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of Gemma 2: capped logits, a sliding window in every second block."""
    caps = {key: getattr(config, key) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    for key, cap in caps.items():
        if not cap:
            refuse(f"llama.cpp caps the logits of a Gemma 2, this model has no {key}")
    fields = _base(config) | {key: real(cap) for key, cap in caps.items()}
    return fields | rotary_fields(config.rope_parameters, head_size(config)) | _window(config)


def gemma3_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Of Gemma 3: two rotary embeddings, one for the blocks with a sliding window."""
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        refuse("llama.cpp does not cap the logits of a Gemma 3, this model does")
    full, sliding = (config.rope_parameters[kind] for kind in ("full_attention", SLIDING))
    if sliding.get("rope_type", "default") != "default":
        refuse(f"rotary embeddings of type {sliding['rope_type']} in blocks with a sliding window are not written")
    fields = _base(config) | rotary_fields(full, head_size(config)) | _window(config)
    return fields | {"rope.freq_base_swa": real(sliding["rope_theta"])}


def _base(config: PretrainedConfig) -> dict[str, Field]:
    require_activation(config, "hidden_activation", *GELU)
    if config.use_bidirectional_attention:
        refuse("llama.cpp's text models attend backwards only, this one in both directions")
    by_width = config.num_hidden_layers == BY_WIDTH[config.model_type]
    scale = config.hidden_size // config.num_attention_heads if by_width else head_size(config)
    if config.query_pre_attn_scalar != scale:
        refuse(
            f"llama.cpp divides this architecture's queries by the root of {scale}, the model "
            f"(query_pre_attn_scalar) by that of {config.query_pre_attn_scalar}"
        )
    return base_fields(config) | {"context_length": uint(config.max_position_embeddings)}


def _window(config: PretrainedConfig) -> dict[str, Field]:
    """The sliding window, and after how many blocks one attends to everything."""
    slides = [kind == SLIDING for kind in config.layer_types]
    if not any(slides):
        return {"attention.sliding_window": uint(config.max_position_embeddings), _PERIOD: uint(1)}
    for period in range(2, len(slides) + 2):
        if slides == [block % period < period - 1 for block in range(len(slides))]:
            return {"attention.sliding_window": uint(config.sliding_window), _PERIOD: uint(period)}
    return refuse(f"blocks with a sliding window follow no period that llama.cpp knows: {config.layer_types}")


_PERIOD = "attention.sliding_window_pattern"
