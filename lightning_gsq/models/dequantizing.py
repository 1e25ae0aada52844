"""Checkpoints that are published with quantized weights, read as plain numbers by transformers' own loaders.

DeepSeek-V3 is published in FP8, Kimi K2 in INT4 (compressed-tensors), gpt-oss in MXFP4, with nothing wider beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lightning_gsq.models.replaced import replaced

METHODS = {"fp8": "FP8", "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4"}
"""Methods with a loader that gives plain numbers, and what they are called."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class DequantizedWarning(UserWarning):
    """A model is quantized from weights that had been quantized before."""


def method_of(config: PretrainedConfig) -> str | None:
    """How the weights of a model's files are quantized; None if they are plain numbers."""
    stated = _stated(config)
    return None if stated is None else str(stated.get("quant_method", "unknown"))


def _stated(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a configuration, or that of its text decoder (Kimi-K2.5), says of it."""
    for part in (config, config.get_text_config(decoder=True)):
        stated: Any = getattr(part, "quantization_config", None)
        if stated is not None:
            return dict(stated if isinstance(stated, dict) else stated.to_dict())
    return None


def to_plain_numbers(config: PretrainedConfig, shown: str) -> bool:
    """Has a model loaded as plain numbers if its files are quantized by one of :data:`METHODS`, and says so.

    Args:
        config: Its configuration, changed in place.
        shown: Its address, for the message.

    Returns:
        Whether it is one of these.
    """
    method = method_of(config)
    if method not in METHODS:
        return False
    config.quantization_config = (_stated(config) or {}) | {"dequantize": True}
    warnings.warn(
        f"{shown} is published in {METHODS[method]}: its weights are read as plain numbers, and those are quantized "
        "here; an original with more bits, where there is one, gives better results",
        DequantizedWarning,
        stacklevel=3,
    )
    return True


@contextmanager
def ragged_blocks(config: PretrainedConfig | None) -> Iterator[None]:
    """Lets transformers read FP8 matrices whose sizes are no multiples of a block, such as DeepSeek-V3's of 576 rows.

    Its own loader divides a matrix evenly among the scales: it refuses these sizes, or, where they happen to divide,
    gives scales to wrong rows.

    Args:
        config: The configuration of a model that is read as plain numbers; None for any other.
    """
    if config is None or method_of(config) != "fp8":
        yield
        return
    block = (_stated(config) or {}).get("weight_block_size")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    evenly = Fp8Dequantize._dequantize_one

    def dequantized(self: Any, codes: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        if codes.dtype not in FP8 or not block or scales.ndim != codes.ndim:
            return evenly(self, codes, scales, output_dtype)
        sizes = codes.shape[-2:]
        ragged = any(size % length for size, length in zip(sizes, block, strict=True))
        grid = tuple(-(-size // length) for size, length in zip(sizes, block, strict=True))
        if not ragged or tuple(scales.shape[-2:]) != grid:
            return evenly(self, codes, scales, output_dtype)
        wide = scales.float().repeat_interleave(block[0], -2)[..., : sizes[0], :]
        wide = wide.repeat_interleave(block[1], -1)[..., : sizes[1]]
        return (codes.float() * wide).to(output_dtype or (scales.dtype if scales.itemsize > 1 else torch.bfloat16))

    with replaced(Fp8Dequantize, "_dequantize_one", dequantized):
        yield


def forget_quantization(model: PreTrainedModel) -> None:
    """Makes a model of plain numbers, loaded from quantized files, an ordinary one, and gives it one dtype.

    What it saves then is not quantized. Some loaders leave weights in the dtype of their scales.
    """
    # The renaming that was used to load it would quantize again when it is saved; without it, that of its type is used.
    for owner, names in (
        (model.config, ["quantization_config"]),
        (model.config.get_text_config(decoder=True), ["quantization_config"]),
        (model, ["hf_quantizer", "quantization_method", "_weight_conversions"]),
    ):
        for name in names:
            if name in vars(owner):
                delattr(owner, name)
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and parameter.dtype != model.dtype:
            parameter.data = parameter.data.to(model.dtype)
