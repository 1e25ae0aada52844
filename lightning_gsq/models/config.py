"""A model's configuration, and what it says of a model that cannot be quantized."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.address import ModelSource, gguf_header
from lightning_gsq.models.loader_errors import as_refusals

OTHER_SENSES = ("vision_config", "audio_config", "speech_config", "image_token_id", "image_token_index")
"""What the configuration of a model that sees or hears holds beside that of its text decoder."""


def load_config(source: ModelSource, quantized: bool = False) -> PretrainedConfig:
    """The model's configuration; the first thing that touches the hub.

    Args:
        source: The model.
        quantized: Whether one that is quantized already will do.

    Raises:
        ConfigurationError: the model cannot be found, is not a causal decoder, or is quantized already.
    """
    if source.gguf_file is not None and not source.files:
        gguf_header(source)  # one on the hub; a local one has been looked at
    place = "" if source.files else " (no such folder here, and as a hub name it cannot be read)"
    with as_refusals(f"model.pretrained: cannot find or read {source.shown!r}{place}", source.trust_remote_code):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source.arguments)
    if not quantized and getattr(config, "quantization_config", None) is not None and source.gguf_file is None:
        method: Any = config.quantization_config
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method.quant_method
        raise ConfigurationError(
            f"model.pretrained: {source.path} is already quantized ({method}); start from its full-precision original"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"model.pretrained: {config.model_type} is an encoder-decoder, not a causal decoder")
    _check_kind(source, config)
    return config


def max_length(config: PretrainedConfig) -> int | None:
    """The longest sequence the model takes, in tokens; None if its configuration names none."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None


def _check_kind(source: ModelSource, config: PretrainedConfig) -> None:
    """Refuses what is no decoder of text, by what it is.

    Raises:
        ConfigurationError: it is a vision-language or speech model, an encoder, or something else.
    """
    own_code = source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or own_code:
        return
    text = config.get_text_config(decoder=True)
    if text is not config or any(hasattr(config, name) for name in OTHER_SENSES):
        inside = f" around a text decoder ({text.model_type})" if text is not config else ""
        raise ConfigurationError(
            f"model.pretrained: {source.shown} is a {config.model_type} model, one for more than text{inside}; only "
            "decoders of text are quantized: give that decoder alone, saved as a model of its own"
        )
    raise ConfigurationError(
        f"model.pretrained: {source.shown} is a {config.model_type} model, which transformers has no causal decoder for"
    )
