"""Are the weights of a model all in its files, and nothing there that the model would need?

transformers gives a weight that no file holds random numbers and passes over what it has no place for. Here that is a
refusal, found from the headers of the files before a weight is read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.models.address import ModelSource, gguf_header
from lightning_gsq.models.empty import empty_model
from lightning_gsq.models.gguf_weights import compare_gguf
from lightning_gsq.models.loader_errors import as_refusals
from lightning_gsq.system.safetensors_headers import read_headers, weight_files

PACKED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|W_q|SCB|codes|codebooks"
    r"|(nested_)?absmax|(nested_)?quant_map|quant_state(\..*)?)$"
)
"""Parts of a weight in the layouts of GPTQ, AWQ, compressed-tensors, fp8, HQQ, LLM.int8, AQLM and bitsandbytes."""
COMPUTED = re.compile(r"(rotary_emb\.\w+|\.masked_bias|\.(attn|attention)\.bias|position_ids)$")
"""Tables and masks that old files hold and that are computed today."""


class UnusedWeightsWarning(UserWarning):
    """The files of a model hold weights that it has no use for."""


def check_headers(source: ModelSource, config: PretrainedConfig) -> None:
    """Compares the names and shapes in a local model's files with the model, without reading a weight.

    Weights of modules that the model does not have, such as further heads, are one warning. A model on the hub has no
    headers here, and quantized weights have other names and shapes; both are compared when they are loaded.

    Raises:
        ConfigurationError: see :func:`refuse_names`; for GGUF the names alone are compared.
    """
    if not source.files or (source.gguf_file is None and getattr(config, "quantization_config", None) is not None):
        return
    model = empty_model(source, config)
    if source.gguf_file is not None:
        with as_refusals(f"model.pretrained: cannot compare {source.shown} with its model", source.trust_remote_code):
            missing, belonging, unused = compare_gguf(gguf_header(source), model)
        refuse_names(source, missing, belonging=belonging)
    else:
        unused = refuse_info(source, model, _compare(source, model))
    warn_unused(source, unused)


def warn_unused(source: ModelSource, names: list[str]) -> None:
    """Says once that files hold weights of modules that the model does not have, if they do."""
    if names:
        warnings.warn(
            f"{source.shown} holds weights of modules that the model does not have, {len(names)} in all, which are "
            f"left out: {_some(names)}",
            UnusedWeightsWarning,
            stacklevel=2,
        )


def _compare(source: ModelSource, model: PreTrainedModel) -> Mapping[str, Collection[Any]]:
    """What transformers reports of loading the files' tensors: without values, they pass through the same renaming,
    splitting and fusing as with them."""
    headers = read_headers(weight_files(source.files[0].parent))
    tensors = {name: torch.empty(info.shape, dtype=info.torch_dtype, device="meta") for name, info in headers.items()}
    info: Mapping[str, Collection[Any]]
    with as_refusals(f"model.pretrained: cannot compare {source.shown} with its model", source.trust_remote_code):
        _, info = type(model).from_pretrained(  # type: ignore[misc]
            None,
            config=model.config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return info


def refuse_info(source: ModelSource, model: PreTrainedModel, info: Mapping[str, Collection[Any]]) -> list[str]:
    """Judges what transformers reports of loading a model; see :func:`refuse_names`.

    Args:
        source: The model, for messages.
        model: It.
        info: ``missing_keys``, ``mismatched_keys`` (name, shape in the file, shape in the model) and
            ``unexpected_keys``; tied weights and those that the model's class lists to be ignored are in none.

    Returns:
        Weights of modules that the model does not have, those included that its class leaves out.
    """
    unexpected = [name for name in sorted(info["unexpected_keys"]) if not COMPUTED.search(name)]
    belonging = [name for name in unexpected if _belongs(model, name)]
    mismatched = sorted(info["mismatched_keys"], key=str)
    refuse_names(source, sorted(info["missing_keys"]), mismatched, belonging, unexpected)
    return [*unexpected, *_passed_over(source, model)]


def _passed_over(source: ModelSource, model: PreTrainedModel) -> list[str]:
    """Weights in local files that the model's class leaves out without a word, such as those that predict several
    tokens (DeepSeek-V3, GLM-4.5)."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    if not source.files or source.gguf_file is not None:
        return []
    names, modules = read_headers(weight_files(source.files[0].parent)), dict(model.named_modules())
    matching = (name for name in names if any(re.search(pattern, name) for pattern in patterns))
    # A pattern may match what a model does have (that of GPT-2's mask matches a bias), or computes.
    return sorted(name for name in matching if not COMPUTED.search(name) and name.rpartition(".")[0] not in modules)


def refuse_names(
    source: ModelSource,
    missing: list[str],
    mismatched: list[tuple[str, Iterable[int], Iterable[int]]] = [],  # noqa: B006 - never changed
    belonging: list[str] = [],  # noqa: B006
    unexpected: list[str] = [],  # noqa: B006
) -> None:
    """Refuses a model whose files are not those of its configuration.

    Args:
        source: The model, for messages.
        missing: Weights that are in no file.
        mismatched: Weights of another shape: name, shape in the file, shape in the model.
        belonging: Weights in the files that belong to a module of the model which has no such weight.
        unexpected: All weights in the files that the model has no use for.

    Raises:
        ConfigurationError: there is any of the first three.
    """
    packed = [name for name in unexpected if PACKED_NAMES.search(name)]
    if packed and (missing or mismatched or belonging):
        raise ConfigurationError(
            f"model.pretrained: {source.shown} is already quantized (it holds {_some(packed)}); start from its "
            "full-precision original"
        )
    if missing:
        raise ConfigurationError(
            f"model.pretrained: weights of the model are not in the files of {source.shown}, {len(missing)} in all: "
            f"{_some(missing)}{_other_prefix(missing, unexpected)}"
        )
    if mismatched:
        name, stored, wanted = mismatched[0]
        more = f" ({len(mismatched)} weights differ so)" if len(mismatched) > 1 else ""
        raise ConfigurationError(
            f"model.pretrained: {name} has shape {tuple(stored)} in the files of {source.shown}, and {tuple(wanted)} "
            f"by its configuration{more}: they do not belong together"
        )
    if belonging:
        raise ConfigurationError(
            f"model.pretrained: the files of {source.shown} hold weights of modules that have none by its "
            f"configuration, {len(belonging)} in all: {_some(belonging)}; without them it would be another model"
        )


def _belongs(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is one of a module that the model has, or of a block that its configuration leaves out.

    One of a further head or tower is not, nor one of the blocks for the prediction of several tokens that some files
    hold behind the last one.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    parts = name.split(".")
    nearest = next(n for n in range(len(parts) - 1, -1, -1) if ".".join(parts[:n]) in modules)
    module, path = modules[".".join(parts[:nearest])], parts[:nearest]
    if isinstance(module, nn.ModuleList):
        config = model.config.get_text_config(decoder=True)
        further = int(getattr(config, "num_nextn_predict_layers", None) or 0)
        return not (parts[nearest].isdigit() and len(module) <= int(parts[nearest]) < len(module) + further)
    in_a_block = any(isinstance(modules[".".join(path[:n])], nn.ModuleList) for n in range(len(path)))
    return in_a_block or any(True for _ in module.parameters(recurse=False))


def _other_prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """What to say where the files name the missing weights with something before the name."""
    for name in missing:
        for other in unexpected:
            if other.endswith(f".{name}"):
                return (
                    f"; the files write {other}: take {other.removesuffix(name)!r} off the names there, which comes "
                    "from a wrapper around the model that was saved"
                )
    return ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
