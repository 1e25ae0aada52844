"""Loading a model and its tokenizer by an address; the other files about it are reached through this one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lightning_gsq.models.address import ModelSource, finished_model, num_bytes, reaching, resolve
from lightning_gsq.models.classes import auto_class
from lightning_gsq.models.computed_weights import in_files
from lightning_gsq.models.config import load_config, max_length
from lightning_gsq.models.dequantizing import forget_quantization, method_of, ragged_blocks, to_plain_numbers
from lightning_gsq.models.finite import check_finite
from lightning_gsq.models.gguf_reader import quick_reader
from lightning_gsq.models.loader_errors import as_refusals
from lightning_gsq.models.weight_names import check_headers, refuse_info, warn_unused

__all__ = [
    "Dtype",
    "ModelSource",
    "check_headers",
    "finished_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_length",
    "num_bytes",
    "resolve",
]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigurationError: there is none, or it cannot be read.
    """
    if not source.files:
        load_config(source, quantized=True)  # a hub name that nobody has is no model without a tokenizer
    what = f"model.pretrained: {source.shown} has no readable tokenizer (tokenizer.json and what else the original has)"
    with reaching(source), as_refusals(what, source.trust_remote_code), quick_reader():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    return tokenizer


def load_model(
    source: ModelSource, dtype: Dtype = "auto", quantized: bool = False, scratch: Path | None = None
) -> PreTrainedModel:
    """The model on the CPU, in evaluation mode, without gradients; every weight of it from its files, and finite.

    GGUF weights are dequantized, and so are those of :mod:`lightning_gsq.models.dequantizing`. Fused experts run one by
    one, so that each shows as a matrix product. A model for more than text is loaded as a whole.

    Args:
        source: The model.
        dtype: Dtype of its parameters; "auto" for that of its files.
        quantized: Whether one that is quantized already will do; its weights stay as they are stored.
        scratch: Folder for weights that are computed on loading, where memory is short; None for a temporary one that
            is gone when the model is there.

    Raises:
        ConfigurationError: it cannot be loaded as a causal decoder, a weight is not in its files, or is not finite.
    """
    config = load_config(source, quantized)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    # A quantized model has other names until its weights are replaced, and one on the hub has no headers here.
    compare_first = bool(source.files) and method_of(config) is None
    plain = source.gguf_file is None and not quantized and to_plain_numbers(config, source.shown)
    if compare_first:
        check_headers(source, config)
    options: dict[str, Any] = {"config": config, "dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if source.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)
        if dtype == "auto":
            options["dtype"] = torch.float32  # a dequantized value has no half-precision original
    else:
        options["use_safetensors"] = True
    # The GGUF reader prints a progress bar of its own that no setting turns off.
    quiet = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext()
    model: PreTrainedModel
    info: dict[str, Any]
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    with (
        reaching(source),
        as_refusals(f"model.pretrained: cannot load {source.shown}", source.trust_remote_code),
        quiet,
        quick_reader(),
        ragged_blocks(config if plain else None),
        in_files(scratch, source, config, chosen),
    ):
        model, info = auto_class(config, source.trust_remote_code).from_pretrained(
            source.path, **source.arguments, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    if plain:
        forget_quantization(model)
    unused = refuse_info(source, model, info)
    if not compare_first:
        warn_unused(source, unused)
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # a GPT-2 from a GGUF file comes column by column
    check_finite(model, source.shown)
    return model.eval()
