"""The architectures that are written from a Hugging Face folder, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.architectures import gemma, llama, phi, qwen
from lightning_gsq.gguf.architectures.common import WAY_OUT
from lightning_gsq.gguf.file import Field

QUERY_KEY_VALUE = ("attn_q", "attn_k", "attn_v")


def _no_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp holds models of one kind.

    Args:
        name: What it calls them.
        fields: Their key-values from a configuration, without the name before each; refuses what is computed otherwise.
        tensors: Tensors of the file that are no parameters, by name.
        interleaved: Rows of queries and keys lie with the halves of every head interleaved.
        shift: What a norm's stored weight is more than the model's parameter.
        own_head: Whether a file may have a head that is not the embedding.
        biases: Tensors that may have a bias.
    """

    name: str
    fields: Callable[[PretrainedConfig], dict[str, Field]]
    tensors: Callable[[PretrainedConfig], Mapping[str, Tensor]] = _no_tensors
    interleaved: bool = False
    shift: float = 0.0
    own_head: bool = True
    biases: tuple[str, ...] = ()


_LLAMA = Architecture(
    "llama",
    llama.llama_fields,
    llama.llama_tensors,
    interleaved=True,
    biases=(*QUERY_KEY_VALUE, "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "smollm3": Architecture("smollm3", llama.smollm3_fields, interleaved=True),
    "qwen2": Architecture("qwen2", qwen.qwen_fields, biases=QUERY_KEY_VALUE),
    "qwen3": Architecture("qwen3", qwen.qwen_fields),
    "qwen3_moe": Architecture("qwen3moe", qwen.qwen_moe_fields),
    "gemma": Architecture("gemma", gemma.gemma_fields, shift=1.0, own_head=False),
    "gemma2": Architecture("gemma2", gemma.gemma2_fields, shift=1.0, own_head=False),
    "gemma3_text": Architecture("gemma3", gemma.gemma3_fields, shift=1.0),
    "phi3": Architecture("phi3", phi.phi3_fields, phi.phi3_tensors),
}
"""By Hugging Face's model type."""
HEADLESS = {architecture.name for architecture in ARCHITECTURES.values() if not architecture.own_head}
"""llama.cpp's names of the architectures whose head is always the embedding."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The entry of a model.

    Raises:
        ConfigurationError: there is none.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ConfigurationError(
            f"format: gguf is written from a folder for {', '.join(ARCHITECTURES)} models, not for "
            f"{config.model_type}; {WAY_OUT}"
        )
    return architecture
