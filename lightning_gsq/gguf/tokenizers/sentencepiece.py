"""SentencePiece's models: BPE with a score a piece (Llama 2, Mistral, Gemma), and unigram.

llama.cpp's BPE joins the neighbours whose union has the highest score, where tokenizer.json lists pairs to join, the
first ones first. Both do the same where each union has all of its pairs in one run of that list: the runs then give the
scores. Its unigram model finds the most probable split, as tokenizer.json's does.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGUFValueType, TokenType

from lightning_gsq.errors import ConfigurationError
from lightning_gsq.gguf.fields import array, flag, text
from lightning_gsq.gguf.file import Field
from lightning_gsq.gguf.tokenizers.vocabulary import mark

SPACE = "▁"
UNUSED_SCORE = -1e4
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def bpe_fields(content: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Field]:
    """Scores and the space before a text, of a BPE model with a token for every byte. Marks tokens' kinds.

    Raises:
        ConfigurationError: it is not one of SentencePiece's kind.
    """
    model = content["model"]
    prefix = _space_prefix(content, tokens)
    if prefix is None:
        raise ConfigurationError(
            "format: gguf: the tokenizer's normalizer and pre_tokenizer are none of SentencePiece's that are known here"
        )
    unknown = model.get("unk_token")
    mark(tokens, kinds, None if unknown is None else model["vocab"][unknown])
    if sum(kind == TokenType.BYTE for kind in kinds) != 256:
        raise ConfigurationError("format: gguf: the tokenizer has no token for some of the bytes (<0x00> … <0xFF>)")
    scores = _scores(model)
    other = {int(TokenType.NORMAL): 0.0}
    values = [scores.get(token, other.get(kind, UNUSED_SCORE)) for token, kind in zip(tokens, kinds, strict=True)]
    return {
        "ggml.model": text("llama"),
        "ggml.pre": text("default"),
        "ggml.scores": array(values, GGUFValueType.FLOAT32),
        "ggml.add_space_prefix": flag(prefix),
    }


def unigram_fields(content: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Field]:
    """Scores, the map of characters and the space before a text, of a unigram model. Marks tokens' kinds.

    Raises:
        ConfigurationError: it does something that llama.cpp does not.
    """
    model = content["model"]
    if model.get("byte_fallback"):
        raise ConfigurationError(
            "format: gguf: the tokenizer is a unigram model that falls back to bytes, llama.cpp's has none"
        )
    normalizer, before = content.get("normalizer"), content.get("pre_tokenizer") or {}
    usual = normalizer is None or normalizer["type"] == "Precompiled"
    if not usual or before.get("type") != "Metaspace" or before.get("replacement") != SPACE:
        raise ConfigurationError(
            "format: gguf: the tokenizer is a unigram model; those are written with a Metaspace pre_tokenizer and no "
            "normalizer or a Precompiled one"
        )
    mark(tokens, kinds, model.get("unk_id"))
    scores = dict(model["vocab"])
    fields = {
        "ggml.model": text("t5"),
        "ggml.pre": text("default"),
        "ggml.scores": array([scores.get(token, UNUSED_SCORE) for token in tokens], GGUFValueType.FLOAT32),
        "ggml.add_space_prefix": flag(before.get("prepend_scheme", "always") != "never"),
        "ggml.remove_extra_whitespaces": flag(False),
    }
    if normalizer is not None:
        charsmap = base64.b64decode(normalizer["precompiled_charsmap"])
        fields["ggml.precompiled_charsmap"] = array(list(charsmap), GGUFValueType.UINT8)
    return fields


def _space_prefix(content: Mapping[str, Any], tokens: Sequence[str]) -> bool | None:
    """Whether a text gets a space before it; None for a normalizer or pre_tokenizer of another kind."""
    normalizer, before = content.get("normalizer"), content.get("pre_tokenizer")
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if before is not None and before["type"] == "Metaspace" and before["replacement"] == SPACE and steps == [None]:
        # Where it also splits, no token may reach over a split.
        whole = not before.get("split", True) or not any(SPACE in token[1:] for token in tokens)
        return before.get("prepend_scheme", "always") != "never" if whole else None
    # After the normalizer there is no space left to split at.
    if before is not None and not (before["type"] == "Split" and before["pattern"] == {"String": " "}):
        return None
    if steps == [_ESCAPE]:
        return False
    return True if steps == [{"type": "Prepend", "prepend": SPACE}, _ESCAPE] else None


def _scores(model: Mapping[str, Any]) -> dict[str, float]:
    """The score of each union: minus the number of its run in the list of merges.

    Raises:
        ConfigurationError: joining by these scores is not what the list says.
    """
    vocab = model["vocab"]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if not pairs:
        raise ConfigurationError("format: gguf: the tokenizer has no merges, without which llama.cpp joins nothing")
    scores: dict[str, float] = {}
    last = ""
    for left, right in pairs:
        union = left + right
        if union != last and union in scores:
            raise _other_order(union)
        scores.setdefault(union, -float(len(scores)))
        last = union
    listed = set(pairs)
    for union in scores:
        for middle in range(1, len(union)):
            pair = union[:middle], union[middle:]
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                raise _other_order(union)
    return scores


def _other_order(union: str) -> ConfigurationError:
    return ConfigurationError(
        f"format: gguf: the tokenizer joins {union!r} in an order that scores of tokens, by which llama.cpp joins, "
        "cannot say"
    )
