"""A model whose blocks have their weights, or have them in fp32, only while they run.

The model's own code runs as it is, generation and caches included. Every pass makes the weights of every block anew, so
that this is for models that are too large to be had as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models.chain import find_blocks

Values = Callable[[str], Tensor]
"""Gives a parameter by its name in the model."""


def emptied_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose blocks have parameters without numbers; those that something outside of them has too keep theirs."""
    _, blocks = find_blocks(model)
    inside = {id(parameter) for parameter in blocks.parameters()}
    held = {id(module) for module in blocks.modules()}
    kept = {
        id(parameter)
        for module in model.modules()
        if id(module) not in held
        for parameter in module.parameters(recurse=False)
    }
    memo: dict[int, Any] = {
        number: nn.Parameter(torch.empty(0), requires_grad=False) for number in inside if number not in kept
    }
    return copy.deepcopy(model, memo)


def filled_in_turn(model: PreTrainedModel, values: Values, *, kept: bool) -> PreTrainedModel:
    """Lets each block of an :func:`emptied_copy` have its parameters while it runs.

    Args:
        model: The copy; it is changed.
        values: Gives a parameter.
        kept: Whether a block keeps what it was given, for a model that may be had as a whole.
    """
    prefix, blocks = find_blocks(model)

    def fill(block: nn.Module, index: int) -> None:
        for name, parameter in block.named_parameters():
            if not parameter.numel():
                parameter.data = values(f"{prefix}.{index}.{name}")

    def empty(block: nn.Module, names: list[str]) -> None:
        for name in names:
            block.get_parameter(name).data = torch.empty(0)

    for index, block in enumerate(blocks):
        without = [name for name, parameter in block.named_parameters() if not parameter.numel()]
        block.register_forward_pre_hook(lambda block, _, index=index: fill(block, index))
        if not kept:
            block.register_forward_hook(lambda block, _, __, names=without: empty(block, names), always_call=True)
    return model


def float_in_turn(model: PreTrainedModel) -> PreTrainedModel:
    """Casts a model to fp32: what is outside of its blocks now, each block for as long as it runs."""
    _, blocks = find_blocks(model)
    inside = {id(module) for module in blocks.modules()}
    for module in model.modules():
        if id(module) in inside:
            continue
        if not any(id(child) in inside for child in module.modules()):
            nn.Module.float(module)  # a model's own `float` refuses quantized ones
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = _float(parameter.data)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _float(buffer))
    for block in blocks:
        _float_while_it_runs(block)
    return model


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _float_while_it_runs(block: nn.Module) -> None:
    before: list[Callable[[], None]] = []

    def put_back(parameter: nn.Parameter, data: Tensor) -> Callable[[], None]:
        return lambda: setattr(parameter, "data", data)

    def cast(*_: Any) -> None:
        before.extend(put_back(parameter, parameter.data) for parameter in block.parameters())
        for module in block.modules():
            before.append(lambda module=module, buffers=dict(module._buffers): module._buffers.update(buffers))  # type: ignore[misc]
        nn.Module.float(block)

    def undo(*_: Any) -> None:
        for step in before:
            step()
        before.clear()

    block.register_forward_pre_hook(cast)
    block.register_forward_hook(undo, always_call=True)
