"""transformers on a GGUF file: does it compute the same, and if it cannot, what does it read otherwise?

Its reader knows neither every block type nor every key-value: it takes the defaults of a configuration for those that
it does not know. A file that it reads otherwise is not compared, and the report says so.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel

from lightning_gsq.export.check import compare_logits
from lightning_gsq.export.contract import CheckFailedError
from lightning_gsq.export.formats.gguf_storage import SUPPORTED_BY_TRANSFORMERS
from lightning_gsq.export.source import FinishedRun
from lightning_gsq.gguf.file import GGUFFile
from lightning_gsq.models.gguf_reader import quick_reader

COMPUTES = (
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "layer_types",
    "mlp_bias",
    "moe_intermediate_size",
    "no_rope_layers",
    "norm_topk_prob",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)
"""Entries of a configuration that change what a model computes, beside the sizes that every file has."""


def note_of_transformers(run: FinishedRun, network: PreTrainedModel, file: GGUFFile) -> str:
    """How transformers reads a file: what a report says of it.

    Args:
        run: The run.
        network: The run's model with the values of the file.
        file: The file.

    Raises:
        CheckFailedError: it reads all of it, and computes something else.
    """
    name = f"transformers {version('transformers')}"
    if not {stored.number for stored in file.tensors.values()} <= SUPPORTED_BY_TRANSFORMERS:
        return "transformers cannot read these block types"
    whole_path = str(file.path.absolute())  # see ModelSource.arguments
    try:
        with quick_reader():
            config = AutoConfig.from_pretrained(file.path.parent, gguf_file=whole_path, local_files_only=True)
    except ValueError as error:
        if "not supported yet" not in str(error):
            raise CheckFailedError(f"{name} cannot read {file.path}: {error}") from error
        return "transformers reads no GGUF files of this architecture"
    other = read_otherwise(run.config, config)
    if other:
        return f"{name} ignores {', '.join(other)} of GGUF files: not compared"
    return f"{name}: logits differ by {_compare(run, network, file):.2g}"


def read_otherwise(config: PretrainedConfig, read: PretrainedConfig) -> list[str]:
    """Which entries that change what a model computes transformers' reader has another value for."""
    ours, theirs = config.to_dict(), read.to_dict()
    return [key for key in COMPUTES if key in ours and not _same(ours[key], theirs.get(key))]


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(_same(value, theirs.get(key)) for key, value in ours.items())
    if isinstance(ours, float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6)  # fp32 in the file
    return bool(ours == theirs)


def _compare(run: FinishedRun, network: PreTrainedModel, file: GGUFFile) -> float:
    """Largest difference of a logit between transformers' reading of the file and the network with its values."""
    try:
        with quick_reader():
            loaded = AutoModelForCausalLM.from_pretrained(
                file.path.parent,
                gguf_file=str(file.path.absolute()),
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
                trust_remote_code=False,
            ).eval()
    except Exception as error:  # whatever the package raises, the file is not what it should be
        raise CheckFailedError(f"transformers cannot load {file.path}: {error}") from error
    return compare_logits("transformers", network, loaded, run.tokenizer)[0]
