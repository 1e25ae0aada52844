"""What an export starts from: a finished run, one weight at a time.

A run folder holds the codes and scales of the quantized weights; every other parameter comes from the original model,
whose address stands in the recipe. :class:`FinishedRun` joins the two under the model's own parameter names:

    run = open_run("runs/x")
    run.weights["model.layers.0.mlp.down_proj.weight"]      what it is: scheme, shape, orientation
    run.tensor("model.layers.0.mlp.down_proj.weight")       its codes and scales
    run.parameter("model.embed_tokens.weight")              any other one, in the dtype that a file stores
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models import loading
from lightning_gsq.models.chain import find_blocks
from lightning_gsq.models.linear_weights import LinearSite
from lightning_gsq.run.block_plan import BlockPlan, make_plan
from lightning_gsq.run.folder import RunFolder
from lightning_gsq.run.recipe import model_fingerprint
from lightning_gsq.run.substitution import replaced
from lightning_gsq.training import ModelQuantization
from lightning_gsq.weights.assignment import SchemeOverride
from lightning_gsq.weights.quantized import QuantizedTensor, QuantizedWeight
from lightning_gsq.weights.salient_part import SalientPart
from lightning_gsq.weights.scheme import QuantScheme

_MODEL_SETTINGS = (
    # settings of a run that say what its weights are; the others say how they were trained
    "pretrained",
    "include",
    "exclude",
    "blocks",
    "scale_dtype",
    "dtype",
    "output_dtype",
    "revision",
    "trust_remote_code",
)


@dataclass(frozen=True)
class ExportedWeight:
    """A quantized parameter of the model.

    Args:
        name: Its full name, such as ``model.layers.3.mlp.down_proj.weight``.
        scheme: Its grid and group size.
        site: Its shape and orientation; ``site.name`` is the name inside the block.
        block: The number of its block.
    """

    name: str
    scheme: QuantScheme
    site: LinearSite
    block: int

    @property
    def stem(self) -> str:
        """The name that parts of the weight are stored under: without the ending ``.weight``."""
        return self.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)`` of its codes; ``O`` counts the rows of all experts."""
        return self.site.rows, self.site.in_features

    @property
    def group_length(self) -> int:
        """Weights that share a scale."""
        return self.scheme.group_length(self.site.in_features)


def quantized_weights(plan: list[BlockPlan]) -> list[ExportedWeight]:
    """The weights of a plan under their full names."""
    return [
        ExportedWeight(f"{own.name}.{site.name}", scheme, site, own.index)
        for own in plan
        for site, scheme in own.weights.items()
    ]


class FinishedRun:
    """A run with all of its blocks quantized.

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
        self.folder, self.recipe, self.summary, self.model = folder, recipe, summary, model
        self.plans = {own.index: own for own in plan}
        self.weights = {weight.name: weight for weight in quantized_weights(plan)}
        self.kind = folder.progress.get("model", "block")
        for index in self.plans:
            if not folder.block_file(self.kind, index).is_file():
                raise ConfigurationError(
                    f"run: {folder.root} has no {folder.block_file(self.kind, index).name}; resume the run with the "
                    "command that started it"
                )
        # Parameters that the end-to-end phase trained beside the quantized ones take the place of the original's.
        trained = folder.read_dense(self.kind) if self.kind == "end_to_end" else None
        self._trained = ExitStack()
        for name, value in (trained[0] if trained else {}).items():
            self._trained.enter_context(replaced(self.network, name, value))
        self._cached: tuple[int, dict[str, QuantizedWeight]] | None = None

    @property
    def network(self) -> PreTrainedModel:
        """The original model: for its names and structure. Its values come from :meth:`parameter`."""
        return self.model.network

    @property
    def config(self) -> PretrainedConfig:
        """The original model's configuration."""
        return self.network.config

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
        return self.model.pretrained

    @property
    def scale_dtype(self) -> torch.dtype:
        """Stored dtype of the scales."""
        return self.model.scale_dtype

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of every parameter that is not quantized."""
        return self.model.output_dtype

    def tensor(self, name: str) -> QuantizedTensor:
        """Codes and scales of a quantized weight that has one grid.

        Raises:
            ConfigurationError: it has salient weights, or the block's file is damaged.
        """
        found = self.quantized(name)
        if not isinstance(found, QuantizedTensor):
            raise ConfigurationError(f"format: {name} has salient weights; use native or dequantized")
        return found

    def quantized(self, name: str) -> QuantizedWeight:
        """A quantized weight of any kind. Reads its block, and keeps that until another one is read.

        Raises:
            ConfigurationError: the block's file is damaged.
        """
        weight = self.weights[name]
        if self._cached is None or self._cached[0] != weight.block:
            blocks = self.folder.read_block(self.kind, weight.block, self.plans[weight.block].expected)
            self._cached = (weight.block, blocks)
        return self._cached[1][weight.site.name]

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """A quantized weight in the shape of the model's parameter, dequantized in fp32 and rounded to ``dtype``."""
        return self.weights[name].site.from_matrix(self.quantized(name).dequantize(dtype)).contiguous()

    @torch.no_grad()
    def reference(self, weight_dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The original model in fp32 with the run's weights in it: what a loaded export is compared with.

        Changes :attr:`network`, in place: quantized weights are the run's from then on, the others those of a file.

        Args:
            weight_dtype: Dtype that dequantized weights are rounded to on the way.
        """
        for name in self.other_names():
            self.network.state_dict()[name].copy_(self.parameter(name))
        self.network.float()
        for name in self.weights:
            self.network.get_parameter(name).copy_(self.dense(name, weight_dtype))
        return self.network

    def other_names(self) -> list[str]:
        """Names of all stored parameters and buffers that are not quantized, in the model's order.

        Parameters that share their memory with one before them (a head tied to the embedding) are left out.
        """
        seen: set[tuple[int, torch.Size]] = set()
        names = []
        for name, value in self.network.state_dict().items():
            key = (value.data_ptr(), value.shape)
            if name not in self.weights and not (value.numel() and key in seen):
                seen.add(key)
                names.append(name)
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
            inside[self.weights[name].block].append(name)
        yield from (names for names in inside.values() if names)

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer that is not quantized, as a file stores it: floating point in :attr:`dtype`.

        This is the one place where such values come from: the original model, with what a run trained put into it.
        """
        value = self.network.state_dict(keep_vars=False)[name].detach()
        return value.to(self.dtype) if value.is_floating_point() else value


def open_run(folder: str | Path) -> FinishedRun:
    """Opens a finished run and loads its original model.

    Args:
        folder: The run folder.

    Raises:
        ConfigurationError: it is no run folder, the run is not finished, or its original model is not there or has
            changed.
    """
    root = Path(folder).expanduser()
    recipe = _read_recipe(root)
    run_folder = RunFolder(root, create=False)
    model = _model_of(recipe, root)
    source = loading.resolve(model.pretrained, model.revision, model.trust_remote_code)
    model.load(source)
    known = recipe.get("fingerprints", {}).get("model")
    if known is not None and known != model_fingerprint(model):
        raise ConfigurationError(
            f"run: {model.pretrained} is no longer the model that the run in {root} quantized; put the original back"
        )
    return FinishedRun(run_folder, recipe, run_folder.summary, model, make_plan(model))


def _read_recipe(root: Path) -> dict[str, Any]:
    file = root / "recipe.yaml"
    if not file.is_file():
        raise ConfigurationError(f"run: {root} is not a run folder (no recipe.yaml)")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"run: {file} cannot be read: {error}") from error
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("settings", {}).get("model"), Mapping):
        raise ConfigurationError(f"run: {file} is not the recipe of a run: it has no settings of a model")
    return dict(recipe)


def _model_of(recipe: Mapping[str, Any], root: Path) -> ModelQuantization:
    """The model with the settings of a run, not loaded yet."""
    known = recipe["settings"]["model"]
    try:
        return ModelQuantization(
            scheme=QuantScheme(**_with_salient(known["scheme"])),
            overrides={
                name: SchemeOverride(**_with_salient(own)) for name, own in (known.get("overrides") or {}).items()
            },
            **{key: known[key] for key in _MODEL_SETTINGS if key in known},
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"run: the recipe in {root} is not one of this version: {error}") from error


def _with_salient(fields: Mapping[str, Any]) -> dict[str, Any]:
    salient = fields.get("salient")
    return {**fields, "salient": SalientPart(**salient) if salient else None}
