"""Other weights in a model, for a while or for good: quantized ones, trained ones, or its own as a file stores them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.classes import is_outside, outside_of_text
from lightning_gsq.run.block_files import Blocks
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.quantized import QuantizedWeight


def install(block: nn.Module, plan: BlockPlan, tensors: dict[str, QuantizedWeight]) -> None:
    """Puts the dequantized weights into a block, in the block's dtype."""
    for site in plan.weights:
        parameter = block.get_parameter(site.name)
        dense = site.from_matrix(tensors[site.name].dequantize())
        parameter.data = dense.to(parameter.device, parameter.dtype).contiguous()


@dataclass(frozen=True)
class Substitution:
    """What a model's weights are replaced by for a while: all at once, or each block's when its turn comes.

    Args:
        model: The model, loaded.
        plan: The quantized weights of each block.
        tensors: Their codes and scales, a block when it is asked for; None leaves the blocks' weights as they are.
        outer: Quantized weights outside of the blocks, by name in the model; what is tied to one goes along.
        dense: Other parameters by name in the model; a head that was tied to the embedding is untied.
        rounded: Whether parameters that are not quantized have the precision that the saved files give them.
    """

    model: ModelQuantization
    plan: Sequence[BlockPlan] = ()
    tensors: Sequence[Blocks] | None = None
    outer: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    rounded: bool = False

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside the context, the whole model has these weights."""
        with ExitStack() as inside:
            inside.enter_context(self.outside())
            for index in range(len(find_blocks(self.model.network)[1])):
                inside.enter_context(self.block(index))
            yield

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Inside the context, what is outside of the blocks has them, and norms that trained."""
        network = self.model.network
        with ExitStack() as inside:
            inside.enter_context(outer_installed(network, self.outer))
            for name, value in self.dense.items():
                inside.enter_context(replaced(network, name, value))
            if self.rounded:
                prefix, towers = f"{find_blocks(network)[0]}.", outside_of_text(network)
                quantized = set(self.model.outer.expected(network))
                inside.enter_context(
                    self._rounding(
                        parameter
                        for name, parameter in network.named_parameters()
                        if not (name.startswith(prefix) or name in quantized or is_outside(name, towers))
                    )
                )
            yield

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Inside the context, a block has them; its number is that in the model."""
        block = find_blocks(self.model.network)[1][index]
        number = self._numbers.get(index)
        sites = (
            {} if number is None else {site.name: block.get_parameter(site.name) for site in self.plan[number].weights}
        )
        originals = {name: parameter.data for name, parameter in sites.items()}
        try:
            if number is not None and self.tensors is not None:
                install(block, self.plan[number], self.tensors[number])
            with ExitStack() as inside:
                if self.rounded:
                    others = [parameter for name, parameter in block.named_parameters() if name not in sites]
                    inside.enter_context(self._rounding(others))
                yield
        finally:
            for name, data in originals.items():
                sites[name].data = data

    @functools.cached_property
    def _numbers(self) -> dict[int, int]:
        """The position in the plan of each block that is planned."""
        return {part.index: number for number, part in enumerate(self.plan)}

    @contextmanager
    def _rounding(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside the context, these have the precision that the saved files give them."""
        originals = {parameter: parameter.data for parameter in parameters}
        try:
            for parameter, data in originals.items():
                parameter.data = data.to(self.model.storage.output_dtype).to(data.dtype)
            yield
        finally:
            for parameter, data in originals.items():
                parameter.data = data


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
