"""How a Hugging Face model of the Llama family lies in a GGUF file: architecture, tensor names, order of rows.

llama.cpp rotates neighbouring rows of a query or key head together where Hugging Face's Llama rotates row ``i`` with
row ``i + d/2``; files of the ``llama`` architecture therefore hold those two matrices with the halves of every head
interleaved. Rows are independent of each other, so codes and scales move with them and nothing is rounded. The Qwen
architectures are rotated by halves in llama.cpp too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig

from lightning_gsq.errors import ConfigurationError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of the architecture by Hugging Face's model type."""


@dataclass(frozen=True)
class Layout:
    """Names and row orders of one model.

    Args:
        architecture: llama.cpp's name.
        blocks: Number of transformer blocks.
        heads: Query heads.
        kv_heads: Key-value heads.
    """

    architecture: str
    blocks: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Layout:
        """The layout of a model.

        Raises:
            ConfigurationError: its family is not among those that can be written.
        """
        architecture = ARCHITECTURES.get(config.model_type)
        if architecture is None:
            raise ConfigurationError(
                f"format: gguf holds {', '.join(ARCHITECTURES)} models, not {config.model_type}; export to "
                "dequantized and convert that with llama.cpp's convert_hf_to_gguf.py, or use native"
            )
        return cls(architecture, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)

    @functools.cached_property
    def _names(self) -> gguf.TensorNameMap:
        (kind,) = (own for own, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(kind, self.blocks)

    def name_of(self, parameter: str) -> str:
        """The name in the file of a parameter of the model.

        Raises:
            ConfigurationError: it has none.
        """
        name: str | None = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigurationError(
                f"format: gguf has no name for the parameter {parameter} in a file of the {self.architecture} "
                "architecture; export to native or dequantized"
            )
        return name

    def rows_of(self, name: str, rows: int) -> Tensor | None:
        """Which row of the model's matrix (or bias) stands in each row of the file's; None where the order is the same.

        Args:
            name: The tensor's name in the file.
            rows: Rows of the matrix.
        """
        heads = {"attn_q": self.heads, "attn_k": self.kv_heads}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            return None
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
