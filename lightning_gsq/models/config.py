"""A model's configuration, and what it says of a model that cannot be quantized."""

from __future__ import annotations

import copy
import functools
import math

from transformers import AutoConfig, PretrainedConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.address import ModelSource, gguf_header, reaching
from lightning_gsq.models.classes import auto_class
from lightning_gsq.models.dequantizing import METHODS, method_of
from lightning_gsq.models.gguf_reader import quick_reader
from lightning_gsq.models.loader_errors import as_refusals


def load_config(source: ModelSource, quantized: bool = False) -> PretrainedConfig:
    """The model's configuration; the first thing that touches the hub.

    Args:
        source: The model.
        quantized: Whether one that is quantized already will do; those that are read as plain numbers
            (:mod:`lightning_gsq.models.dequantizing`) always do.

    Raises:
        ConfigurationError: the model cannot be found, is not a causal decoder, or is quantized already.
    """
    if source.gguf_file is not None and not source.files:
        gguf_header(source)  # one on the hub; a local one has been looked at
    place = "" if source.files else " (no such folder here, and as a hub name it cannot be read)"
    what = f"model.pretrained: cannot find or read {source.shown!r}{place}"
    with reaching(source), as_refusals(what, source.trust_remote_code), quick_reader():
        config = _read(source)
    method = method_of(config)
    if not quantized and method is not None and method not in METHODS and source.gguf_file is None:
        raise ConfigurationError(
            f"model.pretrained: {source.path} is already quantized ({method}); start from its full-precision original"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"model.pretrained: {config.model_type} is an encoder-decoder, not a causal decoder")
    _check_kind(source, config)
    return config


def _read(source: ModelSource) -> PretrainedConfig:
    """The configuration as transformers reads it: of a GGUF file once, which takes seconds for its vocabulary."""
    if source.gguf_file is None or not source.files:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source.arguments)
        return config
    state = source.files[0].stat()
    return copy.deepcopy(_of_gguf(source, state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=2)
def _of_gguf(source: ModelSource, mtime_ns: int, num_bytes: int) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(source.path, **source.arguments)
    return config


def max_length(config: PretrainedConfig) -> int | None:
    """The longest sequence the model takes, in tokens; None if its configuration names none."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None


def sliding_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of every block, in tokens; None for a block whose attention reaches over the whole context.

    A window as long as the longest sequence is none.
    """
    text = config.get_text_config(decoder=True)
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if not window or getattr(text, "use_sliding_window", None) is False or window >= (max_length(config) or math.inf):
        return [None] * text.num_hidden_layers
    # Without kinds of blocks (Mistral, Phi-3), all have it.
    slides = [kind == "sliding_attention" for kind in kinds] if kinds else [True] * text.num_hidden_layers
    return [window if slide else None for slide in slides]


def _check_kind(source: ModelSource, config: PretrainedConfig) -> None:
    """Refuses what has no decoder of text.

    Raises:
        ConfigurationError: transformers has no class that decodes text with such a model.
    """
    if auto_class(config, source.trust_remote_code) is None:
        raise ConfigurationError(
            f"model.pretrained: {source.shown} is a {config.model_type} model, which transformers has no decoder of "
            "text for"
        )
