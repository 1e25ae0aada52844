"""The key-values of a GGUF file: from the file that the run started from, or from a Hugging Face folder.

A file's own key-values are copied as they are, except those that say how its weights are stored. From a folder they
are derived: the hyperparameters of the Llama family and a byte-level BPE tokenizer. llama.cpp splits text by a rule
that it knows by name; a tokenizer with a rule that is not known here is refused, not written with one that almost fits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from gguf import GGUFValueType, LlamaFileType, TokenType
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.file import Field, GGUFFile

STORAGE_KEYS = {"general.file_type", "general.quantization_version", "general.alignment"}
QUANTIZATION_VERSION = 2
SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Regular expressions that split text in tokenizer.json, by llama.cpp's name of the rule."""


def storage_fields(type_name: str) -> dict[str, Field]:
    """What says how weights are stored: the most common type, where the ``gguf`` package has a number for it."""
    fields = {"general.quantization_version": _uint(QUANTIZATION_VERSION)}
    known = getattr(LlamaFileType, f"MOSTLY_{type_name}", None)
    if known is not None:
        fields["general.file_type"] = _uint(int(known))
    return fields


def fields_of_file(file: GGUFFile) -> dict[str, Field]:
    """A file's own key-values, without what says how its weights are stored or that it was one of several files."""
    return {k: v for k, v in file.fields.items() if k not in STORAGE_KEYS and not k.startswith("split.")}


def fields_of_model(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, architecture: str, name: str
) -> dict[str, Field]:
    """Key-values of a model of the Llama family.

    Args:
        config: The model's configuration.
        tokenizer: Its tokenizer.
        architecture: llama.cpp's name of the architecture.
        name: What the model is called.

    Raises:
        ConfigurationError: something in them has no counterpart in llama.cpp.
    """
    fields = {
        "general.architecture": _text(architecture),
        "general.type": _text("model"),
        "general.name": _text(name),
    }
    fields |= {f"{architecture}.{key}": value for key, value in _hyperparameters(config).items()}
    return fields | {f"tokenizer.{key}": value for key, value in _tokenizer_fields(config, tokenizer).items()}


def rotary_factors(config: PretrainedConfig) -> Tensor | None:
    """Llama 3's scaling of the rotary frequencies, as fp32 divisors, as llama.cpp expects it; None without scaling."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dimension = 2 * len(scaled)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dimension, 2, dtype=torch.float32) / dimension)
    return plain / scaled


def _hyperparameters(config: PretrainedConfig) -> dict[str, Field]:
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ConfigurationError(
            f"format: gguf: rotary embeddings of type {kind} are not written; export to dequantized and convert that "
            "with llama.cpp's convert_hf_to_gguf.py"
        )
    if config.hidden_act != "silu":
        raise ConfigurationError(
            f"format: gguf: llama.cpp computes silu in this architecture, the model {config.hidden_act}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # llama.cpp attends to everything here, which is the same up to the length of a sliding window.
    context = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 1 << 31)
    fields = {
        "block_count": _uint(config.num_hidden_layers),
        "context_length": _uint(context),
        "embedding_length": _uint(config.hidden_size),
        "feed_forward_length": _uint(config.intermediate_size),
        "attention.head_count": _uint(config.num_attention_heads),
        "attention.head_count_kv": _uint(config.num_key_value_heads),
        "attention.key_length": _uint(head_dim),
        "attention.value_length": _uint(head_dim),
        "attention.layer_norm_rms_epsilon": Field(config.rms_norm_eps, GGUFValueType.FLOAT32),
        "rope.dimension_count": _uint(head_dim),
        "rope.freq_base": Field(float(rope["rope_theta"]), GGUFValueType.FLOAT32),
        "vocab_size": _uint(config.vocab_size),
    }
    if kind == "linear":
        fields["rope.scaling.type"] = _text("linear")
        fields["rope.scaling.factor"] = Field(float(rope["factor"]), GGUFValueType.FLOAT32)
    return fields


def _tokenizer_fields(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Field]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    split = _split_name(content)
    if split is None:
        raise ConfigurationError(
            f"format: gguf: the tokenizer ({type(tokenizer).__name__}) is not one of the byte-level BPE tokenizers "
            "that can be written (GPT-2, SmolLM, Llama 3, Qwen2); start the run from a GGUF file of the model, whose "
            "tokenizer is copied, or export to dequantized and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    tokens, kinds = _vocabulary(config, tokenizer, content)
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    if not merges:
        raise ConfigurationError("format: gguf: the tokenizer has no merges, without which llama.cpp loads no file")
    fields = {
        "ggml.model": _text("gpt2"),
        "ggml.pre": _text(split),
        "ggml.tokens": Field(tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "ggml.token_type": Field(kinds, GGUFValueType.ARRAY, GGUFValueType.INT32),
        "ggml.merges": Field(merges, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "ggml.add_space_prefix": Field(False, GGUFValueType.BOOL),
        "ggml.add_bos_token": Field(_adds_bos(tokenizer), GGUFValueType.BOOL),
    }
    for key, kind in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is not None:
            fields[f"ggml.{key}_token_id"] = _uint(token)
    if isinstance(tokenizer.chat_template, str):
        fields["chat_template"] = _text(tokenizer.chat_template)
    return fields


def _vocabulary(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, content: Mapping[str, Any]
) -> tuple[list[str], list[int]]:
    """Every token of the embedding with llama.cpp's kind of it; rows without a token get a placeholder."""
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    kinds = [int(TokenType.UNUSED)] * config.vocab_size
    added = {token["id"]: token for token in content["added_tokens"]}
    for token, index in tokenizer.get_vocab().items():
        if index >= config.vocab_size:
            raise ConfigurationError(
                f"format: gguf: the token {token!r} has the number {index}, the embedding {config.vocab_size} rows"
            )
        special = added.get(index)
        kind = TokenType.NORMAL
        if special is not None:
            kind = TokenType.CONTROL if special["special"] else TokenType.USER_DEFINED
        tokens[index], kinds[index] = token, int(kind)
    return tokens, kinds


def _split_name(content: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the rule by which a tokenizer.json splits text, None if it has none of those known."""
    if content.get("model", {}).get("type") != "BPE" or content.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    steps = content.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex"):
        known = {pattern: name for name, pattern in SPLITS.items()}
        return known.get(steps[0]["pattern"].get("Regex")) if steps[0].get("behavior") == "Isolated" else None
    return None


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id and len(ids) > 1


def _uint(value: int) -> Field:
    return Field(int(value), GGUFValueType.UINT32)


def _text(value: str) -> Field:
    return Field(value, GGUFValueType.STRING)
