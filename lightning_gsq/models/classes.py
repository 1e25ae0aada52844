"""Which class of transformers a configuration is loaded with, and what of a model is no part of its text decoder."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


def auto_class(config: PretrainedConfig, own_code: bool = False) -> Any:
    """The class of transformers that loads a whole model.

    A type that is a decoder of text and, around it, a model for more than text (Llama 4, Qwen3.5) is what
    ``architectures`` of its configuration says.

    Args:
        config: The configuration.
        own_code: Whether the model's own code may run.

    Returns:
        The class; None if transformers has no decoder for it.
    """
    if own_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    kind = config.model_type
    wider = (
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
        (MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, AutoModelForMultimodalLM),
    )
    architectures = set(getattr(config, "architectures", None) or ())
    for names, loader in wider:
        if kind in names and (kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or names[kind] in architectures):
            return loader
    return AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def outside_of_text(model: PreTrainedModel) -> list[str]:
    """Names of the modules of a model that its text decoder does without: towers, projectors; the outermost ones.

    Empty for a decoder of text.
    """
    text = model.config.get_text_config(decoder=True)
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    if text is model.config or not isinstance(decoder, nn.Module) or decoder is model:
        return []
    inside = {id(module) for module in decoder.modules()}
    inside |= {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    names: list[str] = []
    for name, module in model.named_modules():
        if any(id(part) in inside for part in module.modules()) or not any(True for _ in module.parameters()):
            continue
        if not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return names


def is_outside(parameter: str, modules: list[str]) -> bool:
    """Whether a parameter or buffer belongs to one of these modules."""
    return any(parameter.startswith(f"{name}.") for name in modules)


def outside_line(model: PreTrainedModel) -> str | None:
    """What is said of these modules before anything long starts; None where there are none."""
    names = outside_of_text(model)
    if not names:
        return None
    count = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    shown = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    return f"not quantized: {', '.join(shown)} ({count:,} weights), outside of the text decoder: kept as they are"
