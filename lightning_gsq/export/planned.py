"""What will be exported, as far as it is known before a run has trained: the model, and which weights at how many bits.

A format looks at this to say whether it can hold the run; :class:`~lightning_gsq.export.source.FinishedRun` adds the
values.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.classes import auto_class, is_outside, outside_of_text
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.quantizers.from_file import start_file
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.quantized import stored_scale_bits
from lightning_gsq.weights.scheme import QuantScheme

USUAL_RATIO = 0.1
"""Share of salient weights that a search finds, about."""


@dataclass(frozen=True)
class ExportedWeight:
    """A quantized parameter of the model.

    Args:
        name: Its full name, such as ``model.layers.3.mlp.down_proj.weight``.
        scheme: Its grid and group size.
        site: Its shape and orientation; ``site.name`` is the name inside the block.
        block: The number of its block; None for the embedding and the head.
    """

    name: str
    scheme: QuantScheme
    site: LinearSite
    block: int | None

    @property
    def stem(self) -> str:
        """The name that parts of the weight are stored under: without the ending ``.weight``."""
        return self.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of its codes; ``O`` counts the rows of all experts."""
        return self.site.rows, self.site.in_features

    @property
    def count(self) -> int:
        """How many weights it has."""
        return self.shape[0] * self.shape[1]

    @property
    def group_length(self) -> int:
        """Weights that share a scale."""
        return self.scheme.group_length(self.site.in_features)

    def bits(self, scale_bits: int) -> float:
        """True bits a weight, codes and scales; about, where the salient part is still to be chosen."""
        if self.scheme.budget is not None:
            return self.scheme.budget
        bits, salient = plain_bits(self.scheme, self.site.in_features, scale_bits), self.scheme.salient
        if salient is None:
            return bits
        return bits + (salient.ratio or USUAL_RATIO) * (salient.bits - self.scheme.storage_bits)


def plain_bits(scheme: QuantScheme, columns: int, scale_bits: int) -> float:
    """Bits a weight of codes and scales in rows of so many columns, none of them salient."""
    return (scheme.grid.row_bits(columns) + stored_scale_bits(scheme, 1, columns, scale_bits)) / columns


class PlannedRun:
    """A run before, while and after it trains.

    Args:
        model: The original model, loaded, with the settings of the run.
        plan: The quantized weights of every block.
        settings: The run's settings of the model, as plain data.
    """

    def __init__(self, model: ModelQuantization, plan: list[BlockPlan], settings: Mapping[str, Any]) -> None:
        self.model, self.settings = model, settings
        self.plans = {block.index: block for block in plan}
        self.weights = {
            f"{block.name}.{site.name}": ExportedWeight(f"{block.name}.{site.name}", scheme, site, block.index)
            for block in plan
            for site, scheme in block.weights.items()
        }
        for name, (scheme, (rows, columns)) in model.outer.expected(model.network).items():
            site = LinearSite(name, 0, rows, columns, transposed=False)
            self.weights[name] = ExportedWeight(name, scheme, site, None)

    @property
    def outer(self) -> list[str]:
        """Names of the quantized weights outside of the blocks: the embedding (a head that is tied to it), the head."""
        return [name for name, weight in self.weights.items() if weight.block is None]

    @functools.cached_property
    def within_blocks(self) -> Self:
        """The run as a format sees it that holds no quantized embedding or head: both are plain numbers there."""
        return self.without(self.outer)

    def without(self, names: Iterable[str]) -> Self:
        """The run as a format sees it that holds these quantized weights outside of the blocks as plain numbers."""
        inside, dropped = copy.copy(self), set(names)
        inside.weights = {name: weight for name, weight in self.weights.items() if name not in dropped}
        inside.__dict__.pop("within_blocks", None)  # that of all weights
        return inside

    @property
    def network(self) -> PreTrainedModel:
        """The original model: for its names and structure."""
        return self.model.network

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the exported model."""
        return self.network.config

    @functools.cached_property
    def values(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the exported model that is not quantized is one of these."""
        return {name: value.detach() for name, value in self.network.state_dict().items()}

    @functools.cached_property
    def outside(self) -> list[str]:
        """Modules that the text decoder does without: towers, projectors; their parameters keep their dtype."""
        return outside_of_text(self.network)

    @property
    def auto_class(self) -> Any:
        """The class of transformers that loads the whole model."""
        return auto_class(self.network.config, self.model.address.trust_remote_code)

    def other_names(self) -> list[str]:
        """Names of all stored parameters and buffers that are not quantized, in the model's order.

        Parameters that share their memory with one before them (a head tied to the embedding) are left out.
        """
        seen: set[tuple[int, torch.Size]] = set()
        names = []
        for name, value in self.values.items():
            key = (value.data_ptr(), value.shape)
            if not (value.numel() and key in seen) and name not in self.weights:
                names.append(name)
            seen.add(key)
        return names

    def units(self) -> Iterator[list[str]]:
        """All stored names, in parts that are written together: one a block, one for each parameter outside of them."""
        others, quantized = self.other_names(), list(self.weights)
        prefix, blocks = find_blocks(self.network)
        inside: dict[int, list[str]] = {index: [] for index in range(len(blocks))}
        for name in others:
            if name.startswith(f"{prefix}."):
                inside[int(name.removeprefix(f"{prefix}.").partition(".")[0])].append(name)
            else:
                yield [name]
        for name in quantized:
            block = self.weights[name].block
            if block is None:
                yield [name]
            else:
                inside[block].append(name)
        yield from (names for names in inside.values() if names)

    def with_schemes(self, schemes: Mapping[str, QuantScheme]) -> Self:
        """The same with other schemes; those of weights that are not named stay."""
        other = copy.copy(self)
        other.weights = {
            name: replace(weight, scheme=schemes.get(name, weight.scheme)) for name, weight in self.weights.items()
        }
        return other

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer that is not quantized, as a file stores it: in :meth:`dtype_of`.

        This is the one place where such values come from: the original model, with what a run trained in its place.
        """
        return self.values[name].to(self.dtype_of(name))

    def dtype_of(self, name: str) -> torch.dtype:
        """Stored dtype of a parameter or buffer that is not quantized: :attr:`dtype` for floating point in the text
        decoder, its own for everything else."""
        own = self.values[name].dtype
        return self.dtype if own.is_floating_point and not is_outside(name, self.outside) else own

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The original model's settings for generation."""
        return self.network.generation_config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The original model's tokenizer."""
        return self.model.tokenizer

    @property
    def address(self) -> str:
        """Where the original model came from."""
        return self.model.address.pretrained

    @property
    def start_file(self) -> Path | None:
        """The file whose codes the run started from (``FromFile``); None for a run that rounded."""
        return start_file(self.settings)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Stored dtype of the scales."""
        fixed = {weight.scheme.layout.dtype for weight in self.weights.values()}
        (dtype,) = fixed if len(fixed) == 1 else (None,)
        return dtype or self.model.storage.scale_dtype

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of every parameter that is not quantized."""
        return self.model.storage.output_dtype
