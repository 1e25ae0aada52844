"""Key-values that the architectures share, without the architecture's name before them."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import PretrainedConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.fields import real, text, uint
from lightning_gsq.gguf.file import Field

WAY_OUT = "start the run from a GGUF file of the model, or export to native or dequantized"


def refuse(what: str) -> NoReturn:
    """Refuses a model that llama.cpp computes otherwise.

    Args:
        what: What it has that llama.cpp does not compute.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(f"format: gguf: {what}; {WAY_OUT}")


def base_fields(config: PretrainedConfig) -> dict[str, Field]:
    """Sizes, heads, the epsilon of the norms and how far positions reach."""
    size = head_size(config)
    # llama.cpp attends to everything here, which is the same up to the length of a sliding window.
    context = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 1 << 31)
    return {
        "block_count": uint(config.num_hidden_layers),
        "context_length": uint(context),
        "embedding_length": uint(config.hidden_size),
        "feed_forward_length": uint(config.intermediate_size),
        "attention.head_count": uint(config.num_attention_heads),
        "attention.head_count_kv": uint(config.num_key_value_heads),
        "attention.key_length": uint(size),
        "attention.value_length": uint(size),
        "attention.layer_norm_rms_epsilon": real(config.rms_norm_eps),
    }


def head_size(config: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_fields(rope: dict[str, Any], size: int, further: tuple[str, ...] = ()) -> dict[str, Field]:
    """The rotary embedding: plain, or with all frequencies divided by one factor.

    Args:
        rope: What the configuration says of it.
        size: Channels of a head that turn.
        further: Other kinds that the caller takes care of.

    Raises:
        ConfigurationError: it is of another kind.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", *further):
        refuse(f"rotary embeddings of type {kind} are not written")
    fields = {"rope.dimension_count": uint(size), "rope.freq_base": real(rope["rope_theta"])}
    if kind == "linear":
        fields["rope.scaling.type"] = text("linear")
        fields["rope.scaling.factor"] = real(rope["factor"])
    return fields


def require_activation(config: PretrainedConfig, name: str, *expected: str) -> None:
    """Verifies the activation of the feed-forward layers.

    Args:
        config: The model's configuration.
        name: The entry that holds it.
        expected: Names of what llama.cpp computes.

    Raises:
        ConfigurationError: it is another.
    """
    value = getattr(config, name)
    if value not in expected:
        refuse(f"llama.cpp computes {expected[0]} in this architecture, the model {value}")
