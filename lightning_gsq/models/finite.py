"""Numbers that are not finite: in a model's weights, found when it is loaded, and in what its blocks compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.chain import Trace, find_blocks


def check_finite(model: nn.Module, place: str) -> None:
    """Looks at every parameter, and at buffers for NaN (a mask may hold infinities).

    Args:
        model: The model, on the CPU.
        place: Where it comes from, for the message.

    Raises:
        ConfigurationError: naming the first that holds one, and how many it holds.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            count = int((~torch.isfinite(parameter)).sum())
            _refuse(name, count, "not finite", place)
    for name, buffer in model.named_buffers():
        if _has_nan(buffer):
            _refuse(name, int(torch.isnan(buffer).sum()), "NaN", place)


def _refuse(name: str, count: int, what: str, place: str) -> None:
    values = "1 value that is" if count == 1 else f"{count} values that are"
    raise ConfigurationError(
        f"model.pretrained: {name} has {values} {what}; nothing that passes through it can be right, so mend or "
        f"replace the files of {place}"
    )


def _extremes(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest value, NaN if any is, without a copy of the tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta or tensor.itemsize < 2:
        return None
    smallest, largest = torch.aminmax(tensor)
    return smallest, largest


def _is_finite(tensor: Tensor) -> bool:
    extremes = _extremes(tensor)
    return extremes is None or all(bool(torch.isfinite(value)) for value in extremes)


def _has_nan(tensor: Tensor) -> bool:
    extremes = _extremes(tensor)
    return extremes is not None and bool(torch.isnan(extremes[0]))


def check_activations(model: PreTrainedModel, traced: Trace) -> None:
    """Looks at what enters and leaves every block in one forward pass.

    Raises:
        ConfigurationError: naming the first block whose output, or input, holds a number that is not finite, and for
            half precision the dtype that has room for it.
    """
    outputs = [*traced.inputs_BTD[1:], traced.output_BTD]
    for index, (entering_BTD, leaving_BTD) in enumerate(zip(traced.inputs_BTD, outputs, strict=True)):
        check_block(model, index, entering_BTD, leaving_BTD)


def check_block(model: PreTrainedModel, index: int, entering_BTD: Tensor, leaving_BTD: Tensor) -> None:
    """Looks at what enters and leaves one block.

    Raises:
        ConfigurationError: a number of them is not finite; as of :func:`check_activations`.
    """
    for hidden_BTD, what in ((entering_BTD, "what enters"), (leaving_BTD, "the output of")):
        if not _is_finite(hidden_BTD):
            prefix, blocks = find_blocks(model)
            raise ConfigurationError(
                f"model: {what} {prefix}.{index} (of {len(blocks)} blocks) is not finite{_way_out(hidden_BTD)}"
            )


def _way_out(hidden_BTD: Tensor) -> str:
    if hidden_BTD.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        return f": float16 ends at {largest:.0f}; load the model with --model.dtype bfloat16, or float32"
    return " although all its weights are; the model overflows on ordinary tokens"
