"""What an export starts from: a finished run, one weight at a time.

A run folder holds the codes and scales of the quantized weights; every other parameter comes from the original model,
whose address stands in the recipe. :class:`FinishedRun` joins the two under the model's own parameter names:

    run = open_run("runs/x")
    run.weights["model.layers.0.mlp.down_proj.weight"]      what it is: scheme, shape, orientation
    run.tensor("model.layers.0.mlp.down_proj.weight")       its codes and scales
    run.parameter("model.embed_tokens.weight")              any other one, in the dtype that a file stores
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.in_turn import Values, emptied_copy, filled_in_turn
from lightning_gsq.run.block_files import OUTER
from lightning_gsq.run.block_plan import BlockPlan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.outer_weights import outer_kind
from lightning_gsq.run.substitution import replace
from lightning_gsq.system.fingerprint import file_digest
from lightning_gsq.system.memory import host_bytes
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight

KINDS = ("warm_start", "block", "end_to_end")
"""Whose result a run may have saved last."""


class FinishedRun(PlannedRun):
    """A run with all of its blocks quantized. The original model in it stays as it is.

    Args:
        folder: The run folder.
        recipe: Its ``recipe.yaml``.
        summary: Its ``summary.json``, empty where there is none yet.
        model: The original model, loaded, with the settings of the run.
        plan: The quantized weights of every block.

    Raises:
        ConfigurationError: a block is missing.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: dict[str, Any],
        summary: dict[str, Any],
        model: ModelQuantization,
        plan: list[BlockPlan],
    ) -> None:
        super().__init__(model, plan, recipe["settings"]["model"])
        self.folder, self.recipe, self.summary = folder, recipe, summary
        self.kind = folder.progress.get("model") or "block"
        if self.kind not in KINDS:
            raise ConfigurationError(
                f"run: {folder.root / 'progress.json'} is damaged (model: {self.kind!r}); remove it, and the command "
                "that started the run writes it anew"
            )
        for index in self.plans:
            if not folder.block_file(self.kind, index).is_file():
                raise ConfigurationError(
                    f"run: {folder.root} has no {folder.block_file(self.kind, index).name}; resume the run with the "
                    "command that started it"
                )
        outer_file = folder.block_file(outer_kind(self.kind), OUTER)
        if self.outer and not outer_file.is_file():
            raise ConfigurationError(
                f"run: {folder.root} has no {outer_file.name}; resume the run with the command that started it"
            )
        self.trained = self._read_trained()
        self.values = self.values | self.trained
        self._config = copy.deepcopy(self.network.config)
        head = self.network.get_output_embeddings()
        if any(self.network.get_submodule(name.rpartition(".")[0]) is head for name in self.trained):
            self._config.tie_word_embeddings = False
        self._cached: tuple[int | None, dict[str, QuantizedWeight]] | None = None

    def _read_trained(self) -> dict[str, Tensor]:
        """Parameters that the end-to-end phase trained beside the quantized ones, in the original's dtype."""
        dense = self.folder.read_dense(self.kind) if self.kind == "end_to_end" else None
        if dense is None:
            return {}
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        for name, value in dense[0].items():
            if name not in parameters or parameters[name].shape != value.shape:
                shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ConfigurationError(
                    f"run: {self.folder.dense_file(self.kind)} holds {name} in the shape {tuple(value.shape)}, the "
                    f"model has {shape}; it is the file of another run. Delete it to have that phase run again"
                )
        return {name: value.to(parameters[name].dtype) for name, value in dense[0].items()}

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """What everything here follows from: a digest of each file of the run, and of the original model."""
        files = [self.folder.block_file(self.kind, index) for index in self.plans]
        if self.model.outer.expected(self.network):
            files.append(self.folder.block_file(outer_kind(self.kind), OUTER))
        if self.trained:
            files.append(self.folder.dense_file(self.kind))
        model = self.recipe.get("fingerprints", {}).get("model", "")
        return {
            "original": str(model),
            **{str(file.relative_to(self.folder.root)): file_digest(file) for file in files},
        }

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the exported model: the original's, untied where the head was trained apart."""
        return self._config

    def tensor(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized weight that has one grid.

        Raises:
            ConfigurationError: it has salient weights, or the block's file is damaged.
        """
        weight = self.quantized(name)
        if not isinstance(weight, QuantizedTensor):
            raise ConfigurationError(f"format: {name} has salient weights; use native or dequantized")
        return weight

    def quantized(self, name: str) -> QuantizedWeight:
        """A quantized weight of any kind. Reads its block, and keeps that until another one is read.

        Raises:
            ConfigurationError: the block's file is damaged.
        """
        weight = self.weights[name]
        if self._cached is None or self._cached[0] != weight.block:
            self._cached = (weight.block, self._read(weight.block))
        return self._cached[1][weight.site.name]

    def _read(self, block: int | None) -> dict[str, QuantizedWeight]:
        if block is None:
            expected = self.model.outer.expected(self.network)
            return self.folder.read_block(outer_kind(self.kind), OUTER, expected)
        return self.folder.read_block(self.kind, block, self.plans[block].expected)

    def without(self, names: Iterable[str]) -> Self:
        """See :meth:`PlannedRun.without`; the values are the quantized ones, rounded to :attr:`dtype`."""
        names = list(names)
        inside = super().without(names)
        for name in names:
            shared, value = self.values[name].data_ptr(), self.dense(name, self.dtype)
            # A tied head is another name of the same numbers, and stays one.
            same = {key: value for key, other in self.values.items() if other.data_ptr() == shared}
            inside.values = inside.values | same
        return inside

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """A quantized weight in the shape of the model's parameter, dequantized in fp32 and rounded to ``dtype``."""
        return self.weights[name].site.from_matrix(self.quantized(name).dequantize(dtype)).contiguous()

    def fits(self, copies: int) -> bool:
        """Whether the host has room for so many copies of the model in fp32, with as much left for everything else."""
        count = sum(parameter.numel() for parameter in self.network.parameters())
        return 2 * copies * count * torch.float32.itemsize <= host_bytes()

    def value(self, name: str, weight_dtype: torch.dtype = torch.float32) -> Tensor:
        """What a parameter has in :meth:`reference`, in fp32."""
        if name in self.weights:
            return self.dense(name, weight_dtype).float()
        # As the original model has it, which the file may have rounded.
        return self.parameter(name).to(self._dtypes[name]).float()

    @functools.cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each parameter and buffer of the original model."""
        return {name: value.dtype for name, value in self.network.state_dict().items()}

    @torch.no_grad()
    def reference(
        self, weight_dtype: torch.dtype = torch.float32, *, kept: bool = True, values: Values | None = None
    ) -> PreTrainedModel:
        """A new model in fp32 with the run's weights in it: what a loaded export is compared with.

        Args:
            weight_dtype: Dtype that dequantized weights are rounded to on the way.
            kept: Whether the whole model may be in memory; else a block has its weights for as long as it runs.
            values: Gives parameters in place of :meth:`value`, by their names in the model.
        """
        wanted = values or functools.partial(self.value, weight_dtype=weight_dtype)
        model = emptied_copy(self.network)
        for name, value in self.trained.items():
            replace(model, name, value)
        state, prefix = model.state_dict(), find_blocks(model)[0]
        for name in self.other_names():
            if state[name].numel():
                state[name].copy_(self.parameter(name))
        del state
        model.float()
        parameters = dict(model.named_parameters())
        own = [name for name in parameters if not name.startswith(f"{prefix}.")]
        for name in own if values else [name for name in self.weights if name in own]:
            parameters[name].copy_(wanted(name))
        return filled_in_turn(model, wanted, kept=kept)
