"""transformers with the compressed-tensors package: how it would load a folder, and what the package unpacks of one."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from lightning_gsq.export.contract import CheckFailedError
from lightning_gsq.export.planned import PlannedRun
from lightning_gsq.export.readers.packages import missing
from lightning_gsq.system.safetensors_headers import weight_files

PACKAGE = "compressed-tensors"
LINEAR = "Linear"
"""The target that stands for every linear layer."""
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def why_not_packed(run: PlannedRun, quantization: dict[str, Any]) -> str | None:
    """Why transformers cannot load a model with its linear layers packed; None if it can, or without the package.

    The model is loaded without weights: code that sets up weights before they come from a file stumbles over layers
    that have none to set up (Mamba, RWKV, GPT-BigCode, Falcon).

    Args:
        run: The run.
        quantization: ``quantization_config`` of config.json.
    """
    if missing(PACKAGE):
        return None
    config = copy.deepcopy(run.config)
    config.quantization_config = quantization
    try:
        with _silent():
            _class_of(run).from_pretrained(None, config=config, state_dict={}, device_map={"": "meta"})
    except Exception as error:  # whatever the model's code raises, it would raise it for the user
        return str(error) or type(error).__name__
    return None


def unpacked_model(run: PlannedRun, folder: Path) -> PreTrainedModel:
    """The model of a folder, each layer unpacked by the package itself under the scheme that config.json names for it.

    Raises:
        CheckFailedError: the package does not read it, or transformers has no place for a tensor.
    """
    try:
        with _silent():
            model, info = _class_of(run).from_pretrained(
                None,
                config=copy.deepcopy(run.config),
                state_dict=_unpacked(folder),
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the package raises, the file is not what it should be
        raise CheckFailedError(f"{PACKAGE} {version(PACKAGE)} cannot unpack {folder}: {error}") from error
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckFailedError(
            f"{folder} holds {sorted(info['unexpected_keys'])[:3]}, which the model has no place for, and lacks "
            f"{sorted(info['missing_keys'])[:3]}"
        )
    loaded: PreTrainedModel = model
    return loaded


def _class_of(run: PlannedRun) -> Any:
    """The model's own class; what ``from_pretrained`` returns depends on its arguments, which its types do not say."""
    return type(run.network)


def _unpacked(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, layers as dense matrices."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    content.pop("dequantize", None)
    groups = QuantizationConfig.model_validate(content).config_groups.values()
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    for name in [name for name in tensors if name.endswith(f".{PARTS[0]}")]:
        stem = name.removesuffix(f".{PARTS[0]}")
        # By name before by class, as vLLM matches.
        of_name = [group for group in groups if any(match_name(stem, target) for target in group.targets)]
        of_class = [group for group in groups if LINEAR in group.targets]
        parts = {part: tensors.pop(f"{stem}.{part}") for part in PARTS}
        tensors[f"{stem}.weight"] = PackedQuantizationCompressor.decompress(parts, (of_name or of_class)[0])["weight"]
    return tensors


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what transformers prints about weights that are not there."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
