"""The key-values of a GGUF file: from the file that the run started from, or from a Hugging Face folder.

A file's own key-values are copied as they are, in their order; those that say how its weights are stored are
replaced where they no longer hold.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguf import LlamaFileType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lightning_gsq.gguf.architectures.table import architecture_of
from lightning_gsq.gguf.fields import text, uint
from lightning_gsq.gguf.file import Field, GGUFFile
from lightning_gsq.gguf.tokenizers.derive import tokenizer_fields

FILE_TYPE = "general.file_type"
ALIGNMENT = "general.alignment"
QUANTIZATION_VERSION = 2


def with_storage(fields: Mapping[str, Field], type_name: str) -> dict[str, Field]:
    """Key-values with how weights are stored: the most common type, where the ``gguf`` package has a number for it.

    What they say of it already is replaced where it stands.
    """
    fields = {**fields, "general.quantization_version": uint(QUANTIZATION_VERSION)}
    file_type = getattr(LlamaFileType, f"MOSTLY_{type_name}", None)
    if file_type is None:
        fields.pop(FILE_TYPE, None)
    else:
        fields[FILE_TYPE] = uint(int(file_type))
    return fields


def fields_of_file(file: GGUFFile) -> dict[str, Field]:
    """A file's own key-values, without its alignment and that it was one of several files."""
    return {k: v for k, v in file.fields.items() if k != ALIGNMENT and not k.startswith("split.")}


def fields_of_model(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Field]:
    """Key-values of a model that comes from a folder.

    Args:
        config: The model's configuration.
        tokenizer: Its tokenizer.
        name: What the model is called.

    Raises:
        ConfigurationError: something in them has no counterpart in llama.cpp.
    """
    architecture = architecture_of(config)
    fields = {
        "general.architecture": text(architecture.name),
        "general.type": text("model"),
        "general.name": text(name),
    }
    entries = architecture.fields(config) | {"vocab_size": uint(config.vocab_size)}
    fields |= {f"{architecture.name}.{key}": value for key, value in entries.items()}
    text_fields = tokenizer_fields(config.vocab_size, tokenizer)
    return fields | {f"tokenizer.{key}": value for key, value in text_fields.items()}
