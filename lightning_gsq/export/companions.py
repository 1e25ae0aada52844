"""What stands beside the weights in a folder: configuration, tokenizer, recipe; and the names of weights in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.models.saving import copy_processor, save_tokenizer

CONFIG = "config.json"


def file_names(run: PlannedRun, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the names, and in the pieces, that the model's family uses in files.

    In memory some families differ from their files, for example by fusing experts into one parameter.

    Args:
        run: The run.
        tensors: By name in the model; all parameters of a block have to come together.
    """
    named: dict[str, Tensor] = revert_weight_conversion(run.network, tensors)
    return named


def written_config(
    run: PlannedRun, quantization: dict[str, Any] | None, dtype: torch.dtype | None = None
) -> PretrainedConfig:
    """What becomes config.json; for the arguments see :func:`write_companions`."""
    config = run.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(run.network).__name__]
    config["dtype"] = str(dtype or run.dtype).removeprefix("torch.")
    if quantization is not None:
        config["quantization_config"] = quantization
    written: PretrainedConfig = run.config.__class__.from_dict(config)
    return written


def write_companions(
    run: FinishedRun,
    folder: Path,
    quantization: dict[str, Any] | None,
    dtype: torch.dtype | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes what stands beside the weights: config.json, generation_config.json, the tokenizer, recipe.yaml.

    Args:
        run: The run.
        folder: The folder.
        quantization: ``quantization_config`` of config.json; None for a model without one.
        dtype: The dtype that config.json asks readers to compute in; None for the parameters' own.
        more: Further entries of config.json.
    """
    written_config(run, quantization, dtype).save_pretrained(folder)
    if more:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | more
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if run.generation_config is not None:
        run.generation_config.save_pretrained(folder)
    save_tokenizer(run.tokenizer, folder)
    if run.outside:
        copy_processor(run.model.address.source(), folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe, sort_keys=False), encoding="utf-8")
