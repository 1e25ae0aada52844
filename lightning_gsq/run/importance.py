"""An importance matrix of llama.cpp in place of the run's own second moments.

``--model.imatrix FILE`` gives the mean squares that warm starts weigh errors with; no calibration text passes through
the blocks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.architectures.table import ARCHITECTURES
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.gguf.imatrix import InputSquares, read_imatrix
from lightning_gsq.gguf.layout import names_in_file
from lightning_gsq.gguf.names import Names
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.training import ModelQuantization


@dataclass(frozen=True)
class Importance:
    """What a file says of the weights of a run.

    Args:
        of: fp32 mean squares ``E I`` by the weight's full name; one row for a plain weight.
    """

    of: Mapping[str, Tensor]

    def hessians(self, name: str, device: torch.device, held: range | None = None) -> list[Tensor]:
        """In place of the means of ``2 x xᵀ`` over the inputs of each matrix of a weight: their diagonals alone.

        Args:
            name: The weight's full name.
            device: Where to.
            held: The experts of it that are wanted; None for all.
        """
        mean_EI = self.of[name] if held is None else self.of[name][held.start : held.stop]
        return [torch.diag(2 * mean_I.to(device)) for mean_I in mean_EI]


def read_importance(model: ModelQuantization, plan: Sequence[BlockPlan]) -> Importance | None:
    """Reads ``model.imatrix``, and verifies that it is of this model; None where there is no such option.

    Args:
        model: The model, loaded.
        plan: The weights to quantize.

    Raises:
        ConfigurationError: the file is damaged, lacks a weight, or has other widths.
    """
    if model.start.imatrix is None:
        return None
    path = Path(model.start.imatrix).expanduser()
    for block in plan:
        for site, scheme in block.weights.items():
            if scheme.mixed:
                raise ConfigurationError(
                    f"model.imatrix: the salient part of {block.name}.{site.name} ({scheme}) is chosen by the inputs "
                    f"themselves; got {model.start.imatrix}, leave it out"
                )
    sites = {f"{block.name}.{site.name}": site for block in plan for site in block.weights}
    try:
        entries, names = read_imatrix(path).entries, names_of(model)
        return Importance({name: _of_weight(names, name, site, entries, path) for name, site in sites.items()})
    except ConfigurationError as error:
        raise ConfigurationError(f"model.imatrix: {error}") from None


def _of_weight(names: Names, name: str, site: LinearSite, entries: Mapping[str, InputSquares], path: Path) -> Tensor:
    # Gates and upward matrices see the same inputs: what is said of the first holds for both.
    stored, experts = names.of(name, entries)[0], max(site.experts, 1)
    if stored not in entries:
        raise ConfigurationError(
            f"{path} says nothing of {stored} ({name}); it is of another model, or was made without this weight: leave "
            "the weight out with --model.exclude, or --model.imatrix with its own second moments"
        )
    mean_EI = entries[stored].mean()
    if len(mean_EI) == 1 and experts > 1:  # the older form
        mean_EI = mean_EI.view(experts, -1) if mean_EI.numel() % experts == 0 else mean_EI
    if tuple(mean_EI.shape) != (experts, site.in_features):
        raise ConfigurationError(
            f"{path} has {mean_EI.shape[0]} x {mean_EI.shape[1]} numbers for {stored}, and {name} has {experts} x "
            f"{site.in_features} inputs: it is of another model"
        )
    return mean_EI


def names_of(model: ModelQuantization) -> Names:
    """The names of a model's weights in llama.cpp's files.

    Raises:
        ConfigurationError: llama.cpp knows no such architecture.
    """
    config: PretrainedConfig = model.network.config
    source = model.address.source(need_weights=False)
    if source.gguf_file is not None and source.files:
        return names_in_file(GGUFFile(source.files[0]), config)
    architecture = ARCHITECTURES.get(config.model_type)
    blocks = int(config.get_text_config(decoder=True).num_hidden_layers)
    return Names(config.model_type if architecture is None else architecture.name, blocks)
