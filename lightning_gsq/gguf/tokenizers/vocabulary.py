"""Tokens by their numbers, and what llama.cpp calls their kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from lightning_gsq.errors import ConfigurationError

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary(size: int, vocab: Mapping[str, int], content: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Every token of the embedding with llama.cpp's kind of it; rows without a token get a placeholder.

    Args:
        size: Rows of the embedding.
        vocab: Numbers by token.
        content: The tokenizer.json.

    Raises:
        ConfigurationError: a token has no row.
    """
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [int(TokenType.UNUSED)] * size
    added = {token["id"]: token for token in content["added_tokens"]}
    for token, index in vocab.items():
        if index >= size:
            raise ConfigurationError(
                f"format: gguf: the token {token!r} has the number {index}, the embedding {size} rows"
            )
        special = added.get(index)
        kind = TokenType.NORMAL
        if special is not None:
            kind = TokenType.CONTROL if special["special"] else TokenType.USER_DEFINED
        tokens[index], kinds[index] = token, int(kind)
    return tokens, kinds


def mark(tokens: list[str], kinds: list[int], unknown: int | None) -> None:
    """Marks, in a vocabulary of SentencePiece's kind, the tokens of single bytes and the unknown one."""
    for index, token in enumerate(tokens):
        if kinds[index] == TokenType.NORMAL and BYTE.fullmatch(token):
            kinds[index] = int(TokenType.BYTE)
    if unknown is not None:
        kinds[unknown] = int(TokenType.UNKNOWN)
