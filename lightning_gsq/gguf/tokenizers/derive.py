"""The key-values of a tokenizer, without ``tokenizer.`` before them."""

from __future__ import annotations

import json

from gguf import GGUFValueType
from transformers import PreTrainedTokenizerBase

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.architectures.common import WAY_OUT
from lightning_gsq.gguf.fields import array, flag, text, uint
from lightning_gsq.gguf.file import Field
from lightning_gsq.gguf.tokenizers.byte_level import byte_level_fields, split_name
from lightning_gsq.gguf.tokenizers.sentencepiece import bpe_fields, unigram_fields
from lightning_gsq.gguf.tokenizers.vocabulary import vocabulary


def tokenizer_fields(size: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Field]:
    """Key-values of a tokenizer.

    Args:
        size: Rows of the embedding.
        tokenizer: The tokenizer.

    Raises:
        ConfigurationError: llama.cpp splits text otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {}, "added_tokens": []}
    tokens, kinds = vocabulary(size, tokenizer.get_vocab(), content)
    model, split = content["model"], split_name(content)
    if split is not None:
        fields = byte_level_fields(content, split)
    elif model.get("type") == "BPE" and model.get("byte_fallback"):
        fields = bpe_fields(content, tokens, kinds)
    elif model.get("type") == "Unigram":
        fields = unigram_fields(content, tokens, kinds)
    else:
        raise ConfigurationError(
            f"format: gguf: the tokenizer ({type(tokenizer).__name__}) is not one of those that can be written "
            "(byte-level BPE of GPT-2, SmolLM, Llama 3, Qwen2, GPT-4o or Tekken; SentencePiece with a token for every "
            f"byte; unigram); {WAY_OUT}"
        )
    kind = fields.pop("ggml.model")
    fields = {
        "ggml.model": kind,
        "ggml.pre": fields.pop("ggml.pre"),
        "ggml.tokens": array(tokens, GGUFValueType.STRING),
        "ggml.token_type": array(kinds, GGUFValueType.INT32),
        **fields,
        **_ends(tokenizer, kind.value),
    }
    if isinstance(tokenizer.chat_template, str):
        fields["chat_template"] = text(tokenizer.chat_template)
    return fields


def _ends(tokenizer: PreTrainedTokenizerBase, model: str) -> dict[str, Field]:
    """What stands around a text, and the numbers of special tokens."""
    ids = tokenizer("a")["input_ids"]
    fields = {"ggml.add_bos_token": flag(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)}
    ends = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    if ends or model != "gpt2":  # llama.cpp puts an end behind a unigram model's text by itself
        fields["ggml.add_eos_token"] = flag(ends)
    for key, kind in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is not None:
            fields[f"ggml.{key}_token_id"] = uint(token)
    return fields
