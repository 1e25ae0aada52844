"""Other weights in a model, for a while or for good: quantized ones, trained ones, or its own as a file stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.classes import is_outside, outside_of_text
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.quantized import QuantizedWeight


def install(block: nn.Module, plan: BlockPlan, tensors: dict[str, QuantizedWeight]) -> None:
    """Puts the dequantized weights into a block, in the block's dtype."""
    for site in plan.weights:
        parameter = block.get_parameter(site.name)
        dense = site.from_matrix(tensors[site.name].dequantize())
        parameter.data = dense.to(parameter.device, parameter.dtype).contiguous()


@contextmanager
def installed(
    model: ModelQuantization,
    plan: list[BlockPlan],
    tensors: list[dict[str, QuantizedWeight]],
    dense: Mapping[str, Tensor] | None = None,
    outer: Mapping[str, QuantizedWeight] | None = None,
) -> Iterator[None]:
    """The model with these weights inside the context, its own afterwards.

    Args:
        model: The model, loaded.
        plan: The quantized weights of each block.
        tensors: Their codes and scales.
        dense: Other parameters by name in the model; a head that was tied to the embedding is untied.
        outer: Quantized weights outside of the blocks, by name in the model; what is tied to one goes along.
    """
    _, blocks = find_blocks(model.network)
    originals = [
        {site.name: blocks[part.index].get_parameter(site.name).data for site in part.weights} for part in plan
    ]
    with ExitStack() as undo:
        undo.enter_context(outer_installed(model.network, outer or {}))
        for part, weights, parameters in zip(plan, tensors, originals, strict=True):
            install(blocks[part.index], part, weights)
            for name, data in parameters.items():
                undo.callback(setattr, blocks[part.index].get_parameter(name), "data", data)
        for name, value in (dense or {}).items():
            undo.enter_context(replaced(model.network, name, value))
        yield


@contextmanager
def outer_installed(network: PreTrainedModel, outer: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """The model with these weights outside of its blocks, inside the context; by name in the model."""
    originals = {name: network.get_parameter(name).data for name in outer}
    try:
        for name, data in originals.items():
            network.get_parameter(name).data = outer[name].dequantize(data.dtype).to(data.device)
        yield
    finally:
        for name, data in originals.items():
            network.get_parameter(name).data = data


@contextmanager
def replaced(network: PreTrainedModel, name: str, value: Tensor) -> Iterator[None]:
    """Another parameter under this name, inside the context; see :func:`replace`."""
    undo = replace(network, name, value)
    try:
        yield
    finally:
        undo()


def replace(network: PreTrainedModel, name: str, value: Tensor) -> Callable[[], None]:
    """Puts another parameter under this name, and under no other name that shared the original.

    Returns:
        What puts the original back.
    """
    owner, _, last = name.rpartition(".")
    module, config = network.get_submodule(owner), network.config
    original, tied = getattr(module, last), config.tie_word_embeddings

    def undo() -> None:
        setattr(module, last, original)
        config.tie_word_embeddings = tied

    setattr(module, last, nn.Parameter(value.to(original.device, original.dtype), requires_grad=False))
    if network.get_output_embeddings() is module:
        config.tie_word_embeddings = False
    return undo


@contextmanager
def as_stored(model: ModelQuantization, plan: list[BlockPlan]) -> Iterator[None]:
    """Inside the context, every parameter that is not quantized has the precision that the saved files give it."""
    quantized = {f"{block.name}.{site.name}" for block in plan for site in block.weights}
    quantized |= set(model.outer.expected(model.network))
    outside = outside_of_text(model.network)
    originals = {
        p: p.data
        for name, p in model.network.named_parameters()
        if name not in quantized and not is_outside(name, outside)
    }
    try:
        for parameter, data in originals.items():
            parameter.data = data.to(model.storage.output_dtype).to(data.dtype)
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data
